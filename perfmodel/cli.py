"""`ridgepoint predict` and `sweep`. Torch-free; tables are imported when used."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hardware.files import UserError, plain, write_atomic
from hardware.profile import HardwareProfile, load_profile
from perfmodel import evidence_cli
from perfmodel.terminal import Json, ms, print_json, print_table
from runtime.config import SAMPLER_NAMES, DecodingConfig, Workload, require

if TYPE_CHECKING:
    from perfmodel.prediction import Prediction

ModelOption = Annotated[str, typer.Option(help="A known model, or a checkpoint's folder or config.json.")]
HardwareOption = Annotated[str, typer.Option(help="A known device, or a profile's YAML file.")]
SamplerOption = Annotated[str, typer.Option(help=f"{', '.join(SAMPLER_NAMES[:-1])} or {SAMPLER_NAMES[-1]}.")]
LevelsOption = Annotated[
    str | None, typer.Option(help="dense, or single_forward's levels as ascending numbers with commas, 0 first.")
]
StepsOption = Annotated[int | None, typer.Option(help="Most forwards that fill a denoising block (default 1).")]
ThresholdOption = Annotated[
    float | None, typer.Option(help="Probability from which denoising decides a token early; see --steps-per-block.")
]
FillingsOption = Annotated[
    float | None, typer.Option(help="Mean forwards that fill a denoising block, as measured (default: the most).")
]
VerifyOption = Annotated[bool, typer.Option("--verify", help="A verification follows denoising.")]
DTypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on a CPU).")
]
CoverageOption = Annotated[
    str, typer.Option(help="uniform, uniform(SKIP_SHARE), correlated(RHO), all, min or measured:FILE.json.")
]
EngineOption = Annotated[
    str | None, typer.Option(help="A known engine, or its YAML file (default: ours for the kind of device).")
]
LengthOption = Annotated[float | None, typer.Option(help="Tokens committed per step, the verifier's own included.")]


def register(app: typer.Typer) -> None:
    """Add this package's commands to the root command."""
    app.command()(predict)
    app.command()(sweep)
    evidence_cli.register(app)


def predict(
    model: ModelOption,
    hardware: HardwareOption,
    batch: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 1,
    context: Annotated[int, typer.Option(help="Cached tokens per sequence.")] = 2048,
    sampler: SamplerOption = "autoregressive",
    draft_tokens: Annotated[int, typer.Option(help="Drafts per step, K.")] = 16,
    acceptance_length: LengthOption = None,
    acceptance_histogram: Annotated[
        str | None, typer.Option(help="Steps that accepted 0, 1, 2... drafts, as numbers with commas.")
    ] = None,
    levels: LevelsOption = None,
    steps: StepsOption = None,
    threshold: ThresholdOption = None,
    steps_per_block: FillingsOption = None,
    verify: VerifyOption = False,
    mixing_weight: Annotated[float, typer.Option(help="Share of the autoregressive logits; 1 is lossless.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    dtype: DTypeOption = None,
    expert_coverage: CoverageOption = "uniform",
    engine: EngineOption = None,
    as_json: Json = False,
) -> None:
    """Predict one decoding step: its time, what binds it, tokens per second and the speedup over autoregression."""
    from perfmodel.decoding import predict as run
    from perfmodel.model_spec import load_spec

    device = load_profile(hardware)
    decoding = _decoding(
        sampler, draft_tokens, levels, steps, threshold, steps_per_block, verify,
        mixing_weight=mixing_weight, temperature=temperature,
    )  # fmt: skip
    workload = Workload(batch=batch, prompt_tokens=max(1, context), dtype=_dtype(dtype, device))  # type: ignore[arg-type]
    prediction = run(
        load_spec(model),
        device,
        workload,
        decoding,
        context=context,
        acceptance_length=acceptance_length,
        histogram=_numbers("acceptance-histogram", acceptance_histogram, float) if acceptance_histogram else None,
        fillings=steps_per_block,
        expert_coverage=expert_coverage,
        engine=engine,
    )
    if as_json:
        return print_json(plain(prediction))
    _print_prediction(prediction)


def sweep(
    model: ModelOption,
    hardware: HardwareOption,
    batch: Annotated[str, typer.Option(help="Numbers with commas.")] = "1,2,4,8,16,32,64,128",
    context: Annotated[str, typer.Option(help="Numbers with commas.")] = "1024,4096,16384,65536",
    draft_tokens: Annotated[str, typer.Option(help="Numbers with commas.")] = "16",
    sampler: SamplerOption = "two_forward",
    acceptance_length: LengthOption = None,
    acceptance_rate: Annotated[
        float | None, typer.Option(help="Probability that a draft is accepted, the same at every position.")
    ] = None,
    levels: LevelsOption = None,
    steps: StepsOption = None,
    threshold: ThresholdOption = None,
    steps_per_block: FillingsOption = None,
    verify: VerifyOption = False,
    dtype: DTypeOption = None,
    expert_coverage: CoverageOption = "uniform",
    engine: EngineOption = None,
    out: Annotated[Path | None, typer.Option(help="Write a .csv instead of printing a table.")] = None,
    as_json: Json = False,
) -> None:
    """Predict every combination of batch, context and draft tokens at once."""
    from perfmodel.decoding import setting
    from perfmodel.model_spec import load_spec
    from perfmodel.steps import title
    from perfmodel.sweep import acceptance_by_draft_tokens
    from perfmodel.sweep import sweep as run

    device = load_profile(hardware)
    axes = {
        name: _numbers(name, text, int)
        for name, text in (("batch", batch), ("context", context), ("draft-tokens", draft_tokens))
    }
    widest = max(axes["draft-tokens"])
    decoding = _decoding(sampler, widest, levels, steps, threshold, steps_per_block, verify)
    lengths = acceptance_by_draft_tokens(decoding, axes["draft-tokens"], length=acceptance_length, rate=acceptance_rate)
    at = setting(load_spec(model), device, _dtype(dtype, device), expert_coverage=expert_coverage, engine=engine)
    grid = run(
        at,
        decoding,
        batch=axes["batch"],
        context=axes["context"],
        draft_tokens=axes["draft-tokens"],
        acceptance_length=lengths,
        fillings=steps_per_block,
    )
    rows = list(grid.rows())
    header = {"model": model, "hardware": device.name, "engine": at.engine.name, "sampler": sampler,
              "setting": title(decoding), "dtype": at.device.dtype, "expert_coverage": str(at.coverage)}  # fmt: skip
    if out is not None:
        _write_csv(out, [header | row for row in rows])
    if as_json:
        return print_json({**header, "out": str(out) if out else None, "rows": rows})
    if out is not None:
        print(f"written: {out} ({len(rows)} operating points)")
        return
    print_table(
        f"{model} on {device.name}, {title(decoding)}, {at.device.dtype}, experts {at.coverage}, "
        f"engine {at.engine.name}",
        ("batch", "context", "K", "length", "step ms", "bound ms", "AR ms", "tokens/s", "speedup", "experts", "fits"),
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
                "yes" if r["fits"] else "no",
            )
            for r in rows
        ],
    )


def _dtype(dtype: str | None, device: HardwareProfile) -> str:
    return dtype or ("bfloat16" if device.kind == "gpu" else "float32")


def _decoding(
    sampler: str,
    draft_tokens: int,
    levels: str | None,
    steps: int | None,
    threshold: float | None,
    steps_per_block: float | None,
    verify: bool,
    **others: float,
) -> DecodingConfig:
    """The settings that the options stand for. UserError for what does not go together."""
    require(
        steps_per_block is None or threshold is not None,
        "--steps-per-block is what a confidence threshold leaves of the steps: give --threshold too",
    )
    given: dict[str, Any] = {
        "proposal_levels": None if levels in (None, "dense") else tuple(_numbers("levels", levels or "", int)),
        "denoising_steps": steps,
        "confidence_threshold": threshold,
        "verify": verify or None,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    decoding = DecodingConfig(sampler, draft_tokens, **chosen, **others)  # type: ignore[arg-type]  # it checks names
    require(levels is None or sampler == "single_forward", f"--levels are single_forward's, but --sampler is {sampler}")
    return decoding


def _numbers(option: str, text: str, kind: type[Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--{option} must be numbers with commas between them, but is {text!r}") from error


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def _print_prediction(p: Prediction) -> None:
    from perfmodel.steps import title

    w, d = p.workload, p.decoding
    drafts = f", K = {d.draft_tokens}, {p.acceptance_length:.2f} tokens a step" if d.drafts else ""
    print_table(
        f"{p.model} on {p.hardware}: {title(d)}{drafts}, batch {w.batch}, context {p.context}, {w.dtype}, "
        f"engine {p.engine}, experts {p.expert_coverage}",
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
    print(f"step     {ms(p.step_seconds)} ms (roofline {ms(p.bound_step_seconds)} ms), {p.bound}")
    rate = f"{p.tokens_per_second:.0f} tokens/s (roofline {p.bound_tokens_per_second:.0f})"
    print(f"rate     {rate}, {p.tokens_per_forward:.2f} tokens a forward")
    print(
        f"speedup  {p.speedup_over_autoregressive:.2f}x over autoregressive decoding "
        f"({ms(p.autoregressive_step_seconds)} ms a token)"
    )
