"""Commands that run the model on this device: `bench`, `generate`, `convert`, `eval`. Torch loads inside them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hardware.files import UserError, known, plain
from runtime.config import DTYPE_BYTES, DecodingConfig, require
from runtime.measurement import ForwardKind, Measurement, append_jsonl, interval_name

if TYPE_CHECKING:
    from runtime.bench import Identity
    from runtime.model.zaya import Zaya

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Model = Annotated[str, typer.Option(help="A bundled checkpoint's name, or a checkpoint folder.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N (ROCm too).")]
Type = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads (default: torch's own choice).")]
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
    app.command()(convert)
    app.command("eval")(evaluate)


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
    loaded = _load(model, device, dtype, threads)
    from runtime.bench import identify

    identity = identify(loaded, model, _command())
    records: list[Measurement] = []
    ratios: dict[int, tuple[float, float, float]] = {}

    def keep(record: Measurement) -> None:
        records.append(record)
        if out is not None:
            append_jsonl(out, record)
        if not as_json:
            print(_line(record), flush=True)

    with _progress("bench") as progress:
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
        _print_json({"records": plain(records), "speedup_over_autoregressive": ratios})


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

    from runtime.bench import (
        fair_count,
        generation_record,
        interleave,
        paired_ratio,
        sample_generation,
        task_prompts,
    )

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
    loaded = _load(model, device, dtype, threads)
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
        return _print_json({"text": written, "token_ids": result.tokens[0], "decoding": used, **counters})
    print(written)
    print(
        f"\n{counters['tokens']} tokens in {result.steps[0]} steps and {result.forwards} forwards "
        f"({result.decoding.sampler}, {result.acceptance_length:.2f} tokens a step), "
        f"{result.decode_seconds:.3f} s, {result.tokens_per_second:.1f} tokens/s; ended by {result.finish_reasons[0]}"
    )


def convert(
    recipe: Annotated[str, typer.Option(help="A bundled recipe's name, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; a run of the same recipe in it is resumed.")],
    start: Annotated[
        str | None, typer.Option("--from", help="A checkpoint to start from (default: random weights).")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a recipe's stages: pretraining, and the conversion to block diffusion."""
    from runtime.conversion.recipe import load_recipe

    loaded = load_recipe(recipe)
    require(threads is None or threads >= 1, f"threads >= 1 must hold, but got {threads}")
    from runtime.conversion.train import train

    folder = train(loaded, out, start_from=start, threads=threads)
    losses = json.loads((out / "losses.json").read_text(encoding="utf-8"))
    if as_json:
        return _print_json({"checkpoint": str(folder), "losses": losses})
    last = losses[-1]
    shown = ", ".join(f"{key} loss {last[key]:.3f}" for key in ("next_token", "mask") if key in last)
    print(f"{folder}: {shown} (curve in {out / 'losses.json'})")


def evaluate(
    model: Model = "zaya-nano",
    before: Annotated[str | None, typer.Option(help="The checkpoint ahead of the conversion, for its losses.")] = None,
    problems: Annotated[int, typer.Option(help="Held-out problems per family.")] = 40,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer to a task.")] = 150,
    batch: Annotated[int, typer.Option(help="Problems decoded together.")] = 16,
    seed: Annotated[int, typer.Option(help="Of problems and sampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the whole evaluation.")] = None,
    write_card: Annotated[Path | None, typer.Option("--card", help="Markdown file for the model card.")] = None,
    recipe: Annotated[str, typer.Option(help="The recipe of the model, for the card.")] = "zaya-nano",
    losses: Annotated[
        Path | None, typer.Option(help="The run's losses.json, for the card (default: beside the weights).")
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure losses, acceptance lengths and right answers per task family, and write the model card."""
    require(batch >= 1, f"batch >= 1 must hold, but got {batch}")
    loaded = _load(model, device, "float32", threads)
    earlier = _load(before, device, "float32", threads) if before else None
    from runtime.checkpoint import find_checkpoint
    from runtime.conversion.card import card, read_losses, table
    from runtime.conversion.evaluate import evaluate as run
    from runtime.conversion.evaluate import write_evaluation
    from runtime.conversion.recipe import load_recipe

    chosen = load_recipe(recipe)
    curve = read_losses(losses or find_checkpoint(model) / "losses.json") if write_card else []
    with _progress("eval") as progress:
        found = run(
            loaded,
            name=Path(model).name,
            command=_command(),
            before=earlier,
            problems=problems,
            max_new_tokens=max_new_tokens,
            batch=batch,
            seed=seed,
            progress=progress,
        )
    if out is not None:
        write_evaluation(found, out)
    if write_card is not None:
        from hardware.files import write_atomic

        write_atomic(write_card, card(found, chosen, curve, sum(p.numel() for p in loaded.parameters())))
    if as_json:
        return _print_json(plain(found))
    print(table(found))


def _load(model: str, device: str, dtype: str, threads: int | None) -> Zaya:
    if dtype not in DTYPE_BYTES:
        raise known("dtype", dtype, DTYPE_BYTES)
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise known("device", device, ("cpu", "cuda", "cuda:N"))
    require(threads is None or threads >= 1, f"threads >= 1 must hold, but got {threads}")
    import torch

    from runtime.checkpoint import find_checkpoint, load_model

    find_checkpoint(model)  # its errors come first
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"no device {device}: torch sees {torch.cuda.device_count()} CUDA or ROCm devices here")
    if threads is not None:
        torch.set_num_threads(threads)
    return load_model(model, device=device, dtype=dtype)  # type: ignore[arg-type]


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


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr; yields a call that takes what comes next and the share done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(title), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda label, done: bar.update(task, description=label, completed=done)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))
