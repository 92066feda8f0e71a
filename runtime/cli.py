"""Commands that run the model on this device: `bench`, `generate`. Torch loads inside them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from hardware.files import UserError, known, plain
from runtime.bench_lines import line, speedup, total
from runtime.config import DecodingConfig, require
from runtime.measurement import Batching, ForwardKind, Measurement, append_jsonl
from runtime.options import (
    Anchor,
    Device,
    DraftTemperature,
    DraftTokens,
    EngineName,
    Json,
    Levels,
    Mixing,
    Model,
    SamplerName,
    Steps,
    Temperature,
    Threads,
    Threshold,
    Type,
    Verify,
    command_line,
    decoding_of,
    integers,
    load,
    print_json,
    progress_bar,
)

if TYPE_CHECKING:
    from runtime.bench import Identity
    from runtime.engine import GenerationResult
    from runtime.model.zaya import Zaya


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
    batching: Annotated[
        str, typer.Option(help="closed: batches that drain; continuous: slots are refilled; or both.")
    ] = "closed",
    prompts: Annotated[int, typer.Option(help="Prompts per sample at least; families and batches stay even.")] = 10,
    sampler: SamplerName = None,
    draft_tokens: DraftTokens = None,
    mixing_weight: Mixing = None,
    temperature: Temperature = None,
    draft_temperature: DraftTemperature = None,
    anchor_draft: Anchor = None,
    levels: Levels = None,
    steps: Steps = None,
    threshold: Threshold = None,
    verify: Verify = None,
    operators: Annotated[
        bool, typer.Option("--operators", help="Time each operator of a forward too, where it stands.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Samples per point.")] = 10,
    seed: Annotated[int, typer.Option(help="Of prompts and sampling.")] = 0,
    device: Device = "cpu",
    dtype: Type = "float32",
    engine: EngineName = "auto",
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(help="JSONL file to append each record to, as soon as it exists.")] = None,
    as_json: Json = False,
) -> None:
    """Time forwards over a grid, or with --new-tokens whole generations beside autoregressive ones.

    Two throughputs are told apart: tokens per second of all decoding, the drain included, and of the steps with a
    sequence in every slot. Of forwards, --levels adds the one of single_forward, and --operators says where their
    time goes.
    """
    batches, widths, contexts = integers("batch", batch), integers("slots", slots), integers("context", context)
    decoding = decoding_of(
        sampler=sampler,
        draft_tokens=draft_tokens,
        mixing_weight=mixing_weight,
        temperature=temperature,
        draft_temperature=draft_temperature,
        anchor_draft=anchor_draft,
        levels=levels,
        steps=steps,
        threshold=threshold,
        verify=verify,
    )
    require(repeats >= 1, f"repeats >= 1 must hold, but got {repeats}")
    require(new_tokens >= 0, f"new_tokens >= 0 must hold, but got {new_tokens}")
    require(
        not (operators and new_tokens), "operators are those of forwards: give --operators or --new-tokens, not both"
    )
    if batching not in (*get_args(Batching), "both"):
        raise known("batching", batching, (*get_args(Batching), "both"))
    loaded = load(model, device, dtype, threads, engine)
    from runtime.bench import identify

    identity = identify(loaded, model, command_line())
    records: list[Measurement] = []
    modes: tuple[Batching, ...] = get_args(Batching) if batching == "both" else (batching,)  # type: ignore[assignment]
    ratios: dict[str, dict[int, tuple[float, float, float]]] = {mode: {} for mode in modes}

    def keep(record: Measurement) -> None:
        records.append(record)
        if out is not None:
            append_jsonl(out, record)
        note(line(record))

    def note(text: str) -> None:
        if not as_json:
            print(text, flush=True)

    with progress_bar("bench") as progress:
        if new_tokens:
            for size in batches:
                found = _generations(
                    loaded, identity, decoding, size, modes, prompts, new_tokens, repeats, seed, keep, progress
                )
                for mode, ratio in found.items():
                    ratios[mode][size] = ratio
                    note(speedup(mode, size, ratio, repeats))
        else:
            _forwards(loaded, identity, decoding, batches, widths, contexts, operators, repeats, keep, note, progress)
    if as_json:
        print_json({"records": plain(records), "speedup_over_autoregressive": ratios})


def _forwards(
    model: Zaya,
    identity: Identity,
    decoding: DecodingConfig,
    batches: list[int],
    widths: list[int],
    contexts: list[int],
    operators: bool,
    repeats: int,
    keep: Callable[[Measurement], None],
    note: Callable[[str], None],
    progress: Callable[[str, float], None],
) -> None:
    """Keep a record of every forward, and with `operators` one of each of its operators behind it."""
    from runtime.bench import measure_forward, prefill
    from runtime.operators import measure_operators, require_apart, total_seconds

    if operators:
        require_apart(model)

    points: list[tuple[ForwardKind, int]] = []
    for width in widths:
        if width == 1:
            points.append(("decode", 1))
        else:
            points += [("draft", width)] if model.config.mask_token_id is not None else []
            points.append(("verify", width))
    if decoding.sampler == "single_forward":
        points.append(("single", decoding.slots))
    cells = [(size, length) for size in batches for length in contexts]
    for place, (size, length) in enumerate(cells):
        filled = prefill(model, size, length, max(width for _, width in points))
        for index, (kind, width) in enumerate(points):
            progress(f"batch {size}, context {length}, {kind}", (place + index / len(points)) / len(cells))
            at: dict[str, Any] = {
                "kind": kind,
                "batch": size,
                "slots": width,
                "context": length,
                "levels": decoding.levels if kind == "single" else (0,),
                "prefilled": filled,
                "repeats": repeats,
            }
            forward = measure_forward(model, identity, **at)
            keep(forward)
            if operators:
                parts = measure_operators(model, identity, **at)
                for record in parts:
                    keep(record)
                note(total(total_seconds(parts), forward.median_seconds))


def _generations(
    model: Zaya,
    identity: Identity,
    decoding: DecodingConfig,
    size: int,
    modes: tuple[Batching, ...],
    count: int,
    new_tokens: int,
    repeats: int,
    seed: int,
    keep: Callable[[Measurement], None],
    progress: Callable[[str, float], None],
) -> dict[str, tuple[float, float, float]]:
    """Keep the records of one batch size; the speedups over autoregressive decoding, with intervals, by batching."""
    from itertools import count as count_from

    from runtime.bench import interleave, paired_ratio
    from runtime.bench_generation import fair_count, generation_record, sample_generation, task_prompts

    prompts = task_prompts(model, fair_count(count, size), seed=seed)
    ways = {run.sampler: run for run in (decoding.autoregressive, decoding)}
    runs = {f"{name}, {mode}": (run, mode) for mode in modes for name, run in ways.items()}
    seeds = {key: count_from(seed, len(prompts)) for key in runs}  # the same rounds have the same seeds
    samples = interleave(
        {
            key: lambda key=key, run=run, mode=mode: sample_generation(  # type: ignore[misc]
                model, prompts, run, batch=size, batching=mode, max_new_tokens=new_tokens, seed=next(seeds[key])
            )
            for key, (run, mode) in runs.items()
        },
        repeats,
        progress=lambda done: progress(f"batch {size}", done / len(runs) / (repeats + 1)),
    )
    for key, (run, mode) in runs.items():
        settings: dict[str, Any] = {"batch": size, "batching": mode, "max_new_tokens": new_tokens}
        keep(generation_record(model, identity, prompts, run, samples[key], **settings))
    rates = {key: [s.tokens_per_second for s in found] for key, found in samples.items()}
    if len(ways) == 1:
        return {}
    return {
        mode: paired_ratio(rates[f"{decoding.sampler}, {mode}"], rates[f"autoregressive, {mode}"]) for mode in modes
    }


def generate(
    model: Model = "zaya-nano",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue, may be repeated (default: standard input).")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts; each line, with its line end, is one.")] = None,
    deployment: Annotated[
        Path | None, typer.Option(help="A tuned deployment.yaml instead of the options below.")
    ] = None,
    ignore_mismatch: Annotated[
        bool, typer.Option("--ignore-mismatch", help="Follow a deployment of another model, device or software, too.")
    ] = False,
    sampler: SamplerName = None,
    draft_tokens: DraftTokens = None,
    mixing_weight: Mixing = None,
    temperature: Temperature = None,
    draft_temperature: DraftTemperature = None,
    anchor_draft: Anchor = None,
    levels: Levels = None,
    steps: Steps = None,
    threshold: Threshold = None,
    verify: Verify = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens, if no end comes before.")] = 128,
    stop_token: Annotated[
        list[int] | None, typer.Option(help="Id of a token that ends a text, may be repeated (default: the model's).")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Texts decoded at once, the others wait (default: all of them).")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = "cpu",
    dtype: Type = "float32",
    engine: EngineName = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue texts, and say how many forwards that took."""
    options: dict[str, Any] = {
        "sampler": sampler,
        "draft_tokens": draft_tokens,
        "mixing_weight": mixing_weight,
        "temperature": temperature,
        "draft_temperature": draft_temperature,
        "anchor_draft": anchor_draft,
        "levels": levels,
        "steps": steps,
        "threshold": threshold,
        "verify": verify,
    }
    require(
        deployment is None or all(option is None for option in options.values()),
        "a deployment sets the sampler: give --deployment or sampler options, not both",
    )
    require(not (stream and as_json), "--json prints one document at the end: give --stream or --json, not both")
    decoding = decoding_of(**options)
    texts = _texts(prompt, prompts)
    loaded = load(model, device, dtype, threads, engine)
    from runtime.checkpoint import find_checkpoint
    from runtime.engine import generate as run
    from runtime.tokenizer import BOS, ByteTokenizer, load_tokenizer

    tokenizer = load_tokenizer(find_checkpoint(model))
    first = BOS if isinstance(tokenizer, ByteTokenizer) else loaded.config.bos_token_id
    ids = [[*([] if first is None else [first]), *tokenizer.encode(text)] for text in texts]
    result = run(
        loaded,
        ids,
        deployment or decoding,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop_tokens=stop_token,
        batch=batch,
        ignore_mismatch=ignore_mismatch,
        on_tokens=_Stream(tokenizer.decode, len(texts)) if stream else None,
    )
    written = [tokenizer.decode(tokens) for tokens in result.tokens]
    if as_json:
        return print_json(
            {
                "results": [
                    {"text": text, "token_ids": tokens, "tokens": len(tokens), "steps": steps, "finish_reason": reason}
                    for text, tokens, steps, reason in zip(
                        written, result.tokens, result.steps, result.finish_reasons, strict=True
                    )
                ],
                "decoding": plain(result.decoding),
                "served": [plain(served._asdict()) for served in result.served],
                "batching": result.batching,
                "forwards": result.forwards,
                "slots": result.slots,
                "acceptance_length": result.acceptance_length,
                "acceptance_histogram": result.acceptance_histogram,
                "experts_per_layer": {kind: c.experts_per_layer() for kind, c in result.counters.items()},
                "prefill_seconds": result.prefill_seconds,
                "decode_seconds": result.decode_seconds,
                "tokens_per_second": result.tokens_per_second,
                "full_tokens_per_second": result.full_tokens_per_second,
            }
        )
    if not stream:
        for index, text in enumerate(written):
            print(f"{_heading(index, len(texts))}{text}")
    print(_summary(result))


class _Stream:
    """Prints text as it comes. Of several texts every piece is a line that names its own."""

    def __init__(self, decode: Callable[[list[int]], str], texts: int) -> None:
        self._decode, self._texts = decode, texts
        self._tokens: list[list[int]] = [[] for _ in range(texts)]
        self._printed = [0] * texts

    def __call__(self, index: int, tokens: list[int], finish_reason: str | None) -> None:
        self._tokens[index] += tokens
        text = self._decode(self._tokens[index])
        if finish_reason is None and text.endswith("\ufffd"):
            return  # a character of which only some bytes are there
        piece, self._printed[index] = text[self._printed[index] :], len(text)
        alone = self._texts == 1
        shown = piece if alone else f"{_heading(index, self._texts)}{piece!r}"
        print(shown, end="" if alone and finish_reason is None else "\n", flush=True)


def _heading(index: int, texts: int) -> str:
    return "" if texts == 1 else f"[{index + 1}/{texts}] "


def _texts(prompts: list[str] | None, file: Path | None) -> list[str]:
    """The prompts given, those of the file, or standard input."""
    require(prompts is None or file is None, "the prompts come from --prompt or from --prompts, not both")
    try:
        if file is None:
            texts = prompts or [sys.stdin.read()]
            for text in texts:  # bytes that are no UTF-8 arrive from the shell as lone surrogates
                text.encode()
            return texts
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read {file or 'the prompt'}: {error}") from error
    texts = [f"{line}\n" for line in lines if line.strip()]
    require(len(texts) > 0, f"{file} has no prompt")
    return texts


def _summary(result: GenerationResult) -> str:
    tokens, reasons = sum(map(len, result.tokens)), ", ".join(sorted(set(result.finish_reasons)))
    samplers = ", then ".join(dict.fromkeys(served.decoding.sampler for served in result.served))
    engines = ", then ".join(dict.fromkeys(served.kernels.engine for served in result.served))
    full = result.full_tokens_per_second
    return (
        f"\n{tokens} tokens in {sum(result.steps)} steps and {result.forwards} forwards "
        f"({samplers}, {engines}, {result.acceptance_length:.2f} tokens a step), "
        f"{result.decode_seconds:.3f} s, {result.tokens_per_second:.1f} tokens/s"
        + (f" ({full:.1f} while every slot was full)" if full is not None and len(result.tokens) > 1 else "")
        + f"; ended by {reasons}"
    )
