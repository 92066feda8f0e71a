"""Commands that run the model on this device: `bench`, `generate`. Torch loads inside them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hardware.files import UserError, plain
from runtime.config import DecodingConfig, require
from runtime.measurement import ForwardKind, Measurement, append_jsonl, interval_name
from runtime.options import Device, Json, Model, Threads, Type, command_line, load, print_json, progress_bar

if TYPE_CHECKING:
    from runtime.bench import Identity
    from runtime.model.zaya import Zaya

SamplerName = Annotated[str | None, typer.Option("--sampler", help="autoregressive or two_forward.")]
DraftTokens = Annotated[int | None, typer.Option(help="Draft tokens K of a two_forward step (default 16).")]
Mixing = Annotated[float | None, typer.Option(help="Share w of autoregressive logits; 1 (default) is lossless.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature; 0 (default) is greedy.")]
DraftTemperature = Annotated[float | None, typer.Option(help="Temperature of the drafts; 0 (default) is greedy.")]
Anchor = Annotated[bool | None, typer.Option("--anchor-draft/--mask-draft", help="First draft from the anchor's row.")]


def register(app: typer.Typer) -> None:
    """Add this package's commands to the root command."""
    app.command()(bench)
    app.command()(generate)


def bench(
    model: Model = "zaya-nano",
    batch: Annotated[str, typer.Option(help="Sequences at once, as 1,4,16.")] = "1,4",
    slots: Annotated[str, typer.Option(help="Slots per sequence: 1 times a decode, more a draft and a verify.")] = "1",
    context: Annotated[str, typer.Option(help="Cached tokens per sequence, as 128,512.")] = "128",
    new_tokens: Annotated[int, typer.Option(help="Generate so many tokens per prompt; 0: time forwards only.")] = 0,
    prompts: Annotated[int, typer.Option(help="Prompts per sample at least; families and batches stay even.")] = 10,
    sampler: SamplerName = None,
    draft_tokens: DraftTokens = None,
    mixing_weight: Mixing = None,
    temperature: Temperature = None,
    draft_temperature: DraftTemperature = None,
    anchor_draft: Anchor = None,
    repeats: Annotated[int, typer.Option(help="Samples per point.")] = 10,
    seed: Annotated[int, typer.Option(help="Of prompts and sampling.")] = 0,
    device: Device = "cpu",
    dtype: Type = "float32",
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(help="JSONL file to append each record to, as soon as it exists.")] = None,
    as_json: Json = False,
) -> None:
    """Time forwards over a grid, or with --new-tokens whole generations beside autoregressive ones."""
    batches, widths, contexts = _integers("batch", batch), _integers("slots", slots), _integers("context", context)
    decoding = _decoding(sampler, draft_tokens, mixing_weight, temperature, draft_temperature, anchor_draft)
    require(repeats >= 1, f"repeats >= 1 must hold, but got {repeats}")
    require(new_tokens >= 0, f"new_tokens >= 0 must hold, but got {new_tokens}")
    loaded = load(model, device, dtype, threads)
    from runtime.bench import identify

    identity = identify(loaded, model, command_line())
    records: list[Measurement] = []
    ratios: dict[int, tuple[float, float, float]] = {}

    def keep(record: Measurement) -> None:
        records.append(record)
        if out is not None:
            append_jsonl(out, record)
        if not as_json:
            print(_line(record), flush=True)

    with progress_bar("bench") as progress:
        if new_tokens:
            for size in batches:
                ratio = _generations(
                    loaded, identity, decoding, size, prompts, new_tokens, repeats, seed, keep, progress
                )
                if decoding.sampler == "autoregressive":
                    continue
                ratios[size] = ratio
                if not as_json:
                    print(_speedup(size, ratio, repeats), flush=True)
        else:
            _forwards(loaded, identity, batches, widths, contexts, repeats, keep, progress)
    if as_json:
        print_json({"records": plain(records), "speedup_over_autoregressive": ratios})


def _forwards(
    model: Zaya,
    identity: Identity,
    batches: list[int],
    widths: list[int],
    contexts: list[int],
    repeats: int,
    keep: Callable[[Measurement], None],
    progress: Callable[[str, float], None],
) -> None:
    from runtime.bench import measure_forward, prefill

    points: list[tuple[ForwardKind, int]] = []
    for width in widths:
        if width == 1:
            points.append(("decode", 1))
        else:
            points += [("draft", width)] if model.config.mask_token_id is not None else []
            points.append(("verify", width))
    cells = [(size, length) for size in batches for length in contexts]
    for place, (size, length) in enumerate(cells):
        filled = prefill(model, size, length, max(widths))
        for index, (kind, width) in enumerate(points):
            progress(f"batch {size}, context {length}, {kind}", (place + index / len(points)) / len(cells))
            keep(
                measure_forward(
                    model,
                    identity,
                    kind=kind,
                    batch=size,
                    slots=width,
                    context=length,
                    prefilled=filled,
                    repeats=repeats,
                )
            )


def _generations(
    model: Zaya,
    identity: Identity,
    decoding: DecodingConfig,
    size: int,
    count: int,
    new_tokens: int,
    repeats: int,
    seed: int,
    keep: Callable[[Measurement], None],
    progress: Callable[[str, float], None],
) -> tuple[float, float, float]:
    """Keep the records of one batch size; return the speedup over autoregressive decoding, with its interval."""
    from functools import partial

    from runtime.bench import interleave, paired_ratio
    from runtime.bench_generation import fair_count, generation_record, sample_generation, task_prompts

    prompts = task_prompts(model, fair_count(count, size), seed=seed)
    runs = {"autoregressive": DecodingConfig(temperature=decoding.temperature), decoding.sampler: decoding}
    samples = interleave(
        {
            name: partial(sample_generation, model, prompts, run, batch=size, max_new_tokens=new_tokens, seed=seed)
            for name, run in runs.items()
        },
        repeats,
        progress=lambda done: progress(f"batch {size}", done / len(runs) / (repeats + 1)),
    )
    for name, run in runs.items():
        keep(generation_record(model, identity, prompts, run, samples[name], batch=size, max_new_tokens=new_tokens))
    rates = {name: [s.tokens_per_second for s in found] for name, found in samples.items()}
    return paired_ratio(rates[decoding.sampler], rates["autoregressive"])


def generate(
    model: Model = "zaya-nano",
    prompt: Annotated[str | None, typer.Option(help="Text to continue (default: standard input).")] = None,
    deployment: Annotated[
        Path | None, typer.Option(help="A tuned deployment.yaml instead of the options below.")
    ] = None,
    sampler: SamplerName = None,
    draft_tokens: DraftTokens = None,
    mixing_weight: Mixing = None,
    temperature: Temperature = None,
    draft_temperature: DraftTemperature = None,
    anchor_draft: Anchor = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens, if no end comes before.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = "cpu",
    dtype: Type = "float32",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a text, and say how many forwards that took."""
    options = (sampler, draft_tokens, mixing_weight, temperature, draft_temperature, anchor_draft)
    require(
        deployment is None or all(option is None for option in options),
        "a deployment sets the sampler: give --deployment or sampler options, not both",
    )
    decoding = _decoding(*options)
    loaded = load(model, device, dtype, threads)
    from runtime.checkpoint import find_checkpoint
    from runtime.engine import generate as run
    from runtime.tokenizer import BOS, ByteTokenizer, load_tokenizer

    tokenizer = load_tokenizer(find_checkpoint(model))
    first = BOS if isinstance(tokenizer, ByteTokenizer) else loaded.config.bos_token_id
    text = prompt if prompt is not None else sys.stdin.read()
    ids = [*([] if first is None else [first]), *tokenizer.encode(text)]
    result = run(loaded, [ids], deployment or decoding, max_new_tokens=max_new_tokens, seed=seed)
    written = tokenizer.decode(result.tokens[0])
    used = plain(result.decoding)
    counters = {
        "tokens": len(result.tokens[0]),
        "steps": result.steps[0],
        "forwards": result.forwards,
        "slots": result.slots,
        "acceptance_length": result.acceptance_length,
        "acceptance_histogram": result.acceptance_histogram,
        "experts_per_layer": {kind: c.experts_per_layer() for kind, c in result.counters.items()},
        "finish_reason": result.finish_reasons[0],
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "tokens_per_second": result.tokens_per_second,
    }
    if as_json:
        return print_json({"text": written, "token_ids": result.tokens[0], "decoding": used, **counters})
    print(written)
    print(
        f"\n{counters['tokens']} tokens in {result.steps[0]} steps and {result.forwards} forwards "
        f"({result.decoding.sampler}, {result.acceptance_length:.2f} tokens a step), "
        f"{result.decode_seconds:.3f} s, {result.tokens_per_second:.1f} tokens/s; ended by {result.finish_reasons[0]}"
    )


def _decoding(
    sampler: str | None,
    draft_tokens: int | None,
    mixing_weight: float | None,
    temperature: float | None,
    draft_temperature: float | None,
    anchor_draft: bool | None,
) -> DecodingConfig:
    """The given options over the defaults; without --sampler, two_forward where an option of it is given."""
    given: dict[str, Any] = {
        "draft_tokens": draft_tokens,
        "mixing_weight": mixing_weight,
        "draft_temperature": draft_temperature,
        "anchor_draft": anchor_draft,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if sampler is None:
        sampler = "two_forward" if given else "autoregressive"
    if temperature is not None:
        given["temperature"] = temperature
    return DecodingConfig(sampler, **given)  # type: ignore[arg-type]


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--{name} must be whole numbers with commas between them, but is {text!r}") from None


def _line(record: Measurement) -> str:
    where = f"batch {record.workload.batch:<3} context {record.context:<5}"
    if record.kind == "generation":
        length = record.acceptance_length
        return (
            f"{record.decoding.sampler:<15} {where} {record.tokens_per_second:9.1f} tokens/s +-{record.spread:.0%}"
            + (f"  {length:.2f} tokens a step (K = {record.decoding.draft_tokens})" if length is not None else "")
        )
    return (
        f"{record.forward:<6} {where} slots {record.slots:<3} {record.median_seconds * 1e3:9.3f} ms "
        f"+-{record.spread:.0%}  {record.experts_per_layer:.1f} experts a layer"
    )


def _speedup(batch: int, found: tuple[float, float, float], rounds: int) -> str:
    ratio, low, high = found
    return f"batch {batch}: {ratio:.2f}x autoregressive decoding ({interval_name(rounds)} {low:.2f}-{high:.2f})"
