"""`ridgepoint predict` and `sweep`. Torch-free; tables are imported when used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hardware.files import plain
from hardware.profile import load_profile
from perfmodel import analysis_cli, evidence_cli, serving_cli
from perfmodel import cli_options as options
from perfmodel.terminal import Json, ms, print_json, print_table
from runtime.config import Workload

if TYPE_CHECKING:
    from perfmodel.prediction import Prediction

GROUPED_BY = ("model", "hardware", "parallel", "setting", "dtype", "expert_coverage", "engine")
LONG_GRID_POINTS = 300_000  # from which a sweep shows its progress


def register(app: typer.Typer) -> None:
    """Add this package's commands to the root command."""
    app.command()(predict)
    app.command()(sweep)
    analysis_cli.register(app)
    serving_cli.register(app)
    evidence_cli.register(app)


def predict(
    model: options.Model,
    hardware: options.Hardware,
    batch: options.Batch = 1,
    context: options.Context = 2048,
    sampler: options.Sampler = "autoregressive",
    draft_tokens: options.DraftTokens = 16,
    acceptance_length: options.Length = None,
    acceptance_rate: options.Rate = None,
    acceptance_histogram: options.Histogram = None,
    known_acceptance: options.KnownAcceptance = None,
    levels: options.Levels = None,
    steps: options.Steps = None,
    threshold: options.Threshold = None,
    steps_per_block: options.Fillings = None,
    verify: options.Verify = False,
    mixing_weight: Annotated[float, typer.Option(help="Share of the autoregressive logits; 1 is lossless.")] = 1.0,
    temperature: options.Temperature = 0.0,
    dtype: options.DType = None,
    weights: options.Weights = None,
    expert_weights: options.ExpertWeights = None,
    activations: options.Activations = None,
    cache_dtype: options.CacheDType = None,
    tensor_parallel: options.TensorParallel = 1,
    expert_parallel: options.ExpertParallel = 1,
    expert_coverage: options.Coverage = None,
    engine: options.Engine = None,
    request_spread: Annotated[
        float | None,
        typer.Option(help="How unlike requests of a closed batch are: variation of their steps over the mean."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict one decoding step: its time, what binds it, tokens per second and the speedup over autoregression."""
    from perfmodel.decoding import predict as run
    from perfmodel.economics import BASIS
    from perfmodel.model_spec import load_spec
    from perfmodel.parallel import Parallel

    device = load_profile(hardware)
    decoding = options.decoding_of(
        sampler, draft_tokens, None if levels is None else [levels], steps, threshold, steps_per_block, verify,
        mixing_weight=mixing_weight, temperature=temperature,
    )  # fmt: skip
    acceptance = options.acceptance_of(acceptance_length, acceptance_rate, acceptance_histogram, known_acceptance)
    form = acceptance.of(decoding) if acceptance.known else acceptance
    element: Any = options.dtype_of(dtype, device)
    prediction = run(
        load_spec(model),
        device,
        Workload(batch=batch, prompt_tokens=max(1, context), dtype=element),
        decoding,
        context=context,
        acceptance_length=form.length,
        histogram=form.histogram,
        acceptance_rates=form.rates,
        fillings=steps_per_block,
        expert_coverage=expert_coverage,
        engine=engine,
        precision=options.precision_of(model, dtype, device, weights, expert_weights, activations, cache_dtype),
        parallel=Parallel(tensor_parallel, expert_parallel),
        request_spread=request_spread,
    )
    if as_json:
        named = {"acceptance": plain(acceptance.known)} if acceptance.known else {}
        return print_json(plain(prediction) | named | {"economics": BASIS})
    _print_prediction(prediction)
    if acceptance.known:
        print(f"accepted drafts as in {acceptance.known}")


def sweep(
    model: options.Model,
    hardware: options.Devices,
    batch: options.Batches = "1,2,4,8,16,32,64,128",
    context: options.Contexts = "1024,4096,16384,65536",
    draft_tokens: options.DraftTokensAxis = "16",
    sampler: options.Samplers = "two_forward",
    acceptance_length: options.Length = None,
    acceptance_rate: options.Rate = None,
    acceptance_histogram: options.Histogram = None,
    known_acceptance: options.KnownAcceptance = None,
    levels: options.LevelSets = None,
    steps: options.Steps = None,
    threshold: options.Threshold = None,
    steps_per_block: options.Fillings = None,
    verify: options.Verify = False,
    dtype: options.DType = None,
    weights: options.Weights = None,
    expert_weights: options.ExpertWeights = None,
    activations: options.Activations = None,
    cache_dtype: options.CacheDType = None,
    tensor_parallel: options.TensorParallel = 1,
    expert_parallel: options.ExpertParallel = 1,
    expert_coverage: options.Coverage = None,
    engine: options.Engine = None,
    out: Annotated[Path | None, typer.Option(help="Write a .csv or .parquet instead of printing a table.")] = None,
    as_json: Json = False,
) -> None:
    """Predict every combination of device, sampler, level set, batch, context and draft tokens at once."""
    import numpy as np

    from perfmodel.economics import BASIS
    from perfmodel.steps import title
    from perfmodel.sweep import sweep as run
    from perfmodel.tables import check_table_path, write_table

    if out is not None:
        check_table_path(out)
    batches, contexts, drafts = (
        options.numbers(name, text, int)
        for name, text in (("batch", batch), ("context", context), ("draft-tokens", draft_tokens))
    )
    samplers = options.names("sampler", sampler)
    chosen = options.decodings_of(samplers, max(drafts), levels, steps, threshold, steps_per_block, verify)
    acceptance = options.acceptance_of(acceptance_length, acceptance_rate, acceptance_histogram, known_acceptance)
    jobs = options.settings_of(chosen, levels, drafts, acceptance)
    devices = [load_profile(name) for name in options.names("hardware", hardware)]
    stored = [options.precision_of(model, dtype, d, weights, expert_weights, activations, cache_dtype) for d in devices]
    places = [
        options.setting_of(model, device, precision, expert_coverage, engine, tensor_parallel, expert_parallel)
        for device, precision in zip(devices, stored, strict=True)
    ]
    tables = []
    per_draft = len(places) * len(batches) * len(contexts)
    with _progress(sum(per_draft * len(job.draft_tokens) for job in jobs)) as progress:
        for at in places:
            for job in jobs:
                grid = run(
                    at, job.decoding, batch=batches, context=contexts, draft_tokens=job.draft_tokens,
                    acceptance_length=job.acceptance_lengths, progress=progress,
                    fillings=steps_per_block if job.decoding.sampler == "denoising" else None,
                ).columns()  # fmt: skip
                if not job.decoding.drafts:
                    grid["draft_tokens"] = np.zeros_like(grid["draft_tokens"])
                header = {"model": at.spec.name, "hardware": at.device.hardware.name, "engine": at.engine.name,
                          "sampler": job.decoding.sampler, "setting": title(job.decoding), "dtype": str(at.precision),
                          "parallel": str(at.parallel), "expert_coverage": str(at.coverage)}  # fmt: skip
                points = len(grid["batch"])
                tables.append({name: np.full(points, text) for name, text in header.items()} | grid)
    columns = _joined(tables)
    count = len(columns["batch"])
    if out is not None:
        write_table(out, columns)
    if out is not None and not as_json:
        print(f"written: {out} ({count} operating points)")
        return
    rows = _records(columns)
    if as_json:
        return print_json({"model": model, "out": str(out) if out else None, "economics": BASIS, "rows": rows})
    _print_points(rows)


def _joined(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Tables under each other; a column that one of them lacks is NaN there."""
    import numpy as np

    names = dict.fromkeys(name for table in tables for name in table)
    return {
        name: np.concatenate([table.get(name, np.full(len(table["batch"]), np.nan)) for table in tables])
        for name in names
    }


def _records(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a row, None for NaN."""
    listed = [[None if v != v else v for v in column.tolist()] for column in columns.values()]
    return [dict(zip(columns, values, strict=True)) for values in zip(*listed, strict=True)]


@contextmanager
def _progress(points: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr for a long grid; nothing for a short one."""
    if points < LONG_GRID_POINTS:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("operating points", total=points)
        yield lambda done: bar.advance(task, done)


def _node(hardware: str, parallel: str) -> str:
    return hardware if parallel == "one device" else f"{hardware} {parallel}"


def _print_points(rows: list[dict[str, Any]]) -> None:
    """A table for each device and setting."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(
            row[name] for name in ("model", "hardware", "parallel", "setting", "dtype", "expert_coverage", "engine")
        )
        groups.setdefault(key, []).append(row)
    for (model, hardware, parallel, setting, dtype, coverage, engine), members in groups.items():
        print_table(
            f"{model} on {_node(hardware, parallel)}, {setting}, {dtype}, experts {coverage}, engine {engine}",
            (
                "batch",
                "context",
                "K",
                "length",
                "step ms",
                "bound ms",
                "AR ms",
                "tokens/s",
                "speedup",
                "experts",
                "$/Mtoken",
                "fits",
            ),
            [
                (
                    str(r["batch"]),
                    str(r["context"]),
                    str(r["draft_tokens"]),
                    f"{r['acceptance_length']:.2f}",
                    ms(r["step_seconds"]),
                    ms(r["bound_step_seconds"]),
                    ms(r["autoregressive_step_seconds"]),
                    f"{r['tokens_per_second']:.0f}",
                    f"{r['speedup_over_autoregressive']:.2f}",
                    f"{r['experts_per_layer']:.1f}",
                    "" if r.get("dollars_per_million_tokens") is None else f"{r['dollars_per_million_tokens']:.3g}",
                    "yes" if r["fits"] else "no",
                )
                for r in members
            ],
        )


def _print_prediction(p: Prediction) -> None:
    from perfmodel.steps import title

    w, d = p.workload, p.decoding
    drafts = f", K = {d.draft_tokens}, {p.acceptance_length:.2f} tokens a step" if d.drafts else ""
    print_table(
        f"{p.model} on {_node(p.hardware, str(p.parallel))}: {title(d)}{drafts}, batch {w.batch}, context {p.context}, "
        f"{p.precision}, engine {p.engine}, experts {p.expert_coverage}",
        ("operator", "GFLOP", "MB", "launches", "ms", "bound ms", "of the step", "bound"),
        [
            (
                o.name,
                f"{o.flops / 1e9:.3g}",
                f"{o.bytes / 1e6:.4g}",
                f"{o.launches:.0f}",
                ms(o.seconds),
                ms(o.bound_seconds),
                f"{o.seconds / p.step_seconds:.0%}",
                o.bound,
            )
            for o in p.operators
        ],
    )
    for f in p.forwards:
        often = "" if f.times == 1 else f", {f.times:.3g} times"
        experts = f"{f.experts_per_layer:.1f} experts a layer"
        print(f"{f.name:8} {f.slots} slots: {ms(f.seconds)} ms{often}, {experts}, {f.bound}")
    interval = p.step_seconds_interval
    within = "" if interval is None else f", 80% interval {ms(interval[0])} to {ms(interval[1])}"
    print(f"step     {ms(p.step_seconds)} ms (roofline {ms(p.bound_step_seconds)} ms{within}), {p.bound}")
    rate = f"{p.tokens_per_second:.0f} tokens/s (roofline {p.bound_tokens_per_second:.0f})"
    print(f"rate     {rate}, {p.tokens_per_forward:.2f} tokens a forward")
    if p.closed_batch_tokens_per_second is not None and w.batch > 1:
        print(f"closed   {p.closed_batch_tokens_per_second:.0f} tokens/s where requests that finish are not replaced")
    print(
        f"speedup  {p.speedup_over_autoregressive:.2f}x over autoregressive decoding "
        f"({ms(p.autoregressive_step_seconds)} ms a token)"
    )
    costs = []
    if p.joules_per_million_tokens is not None:
        costs.append(f"{p.joules_per_million_tokens / 1e3:.3g} kJ (from the TDP, an upper estimate of power)")
    if p.dollars_per_million_tokens is not None:
        costs.append(f"${p.dollars_per_million_tokens:.3g} (from the price per device-hour)")
    if costs:
        print(f"cost     per million tokens, estimated: {', '.join(costs)}")
