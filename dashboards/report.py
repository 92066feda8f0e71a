"""The report of a demo: what was asked, predicted, measured, tuned and exported, and how to repeat each."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import yaml

from autotune.report import study_report
from autotune.results import StudyResult
from dashboards.changes import EffectsInfo, change_plot
from dashboards.choice import Answer
from dashboards.document import Block, Code, Fold, Note, Plot, Section, Table, Text, write_document
from dashboards.evidence import front_info, front_plot, scatter_info, scatter_plot
from dashboards.figures import (
    roofline_info,
    roofline_plot,
    speedup_info,
    speedup_plot,
    step_time_info,
    step_time_plot,
)
from dashboards.maps import MapInfo, map_plot
from dashboards.studies import history_info
from dashboards.study_figures import history_plot, importance_plot
from dashboards.trials import decision_sentence, front_points, setting_text
from dashboards.words import break_even_length, forwards, percent, quantity, rate, verdict
from hardware.files import plain
from hardware.profile import HardwareProfile
from perfmodel.engine import EngineProfile
from perfmodel.validation import Row, summaries
from runtime.config import DecodingConfig
from runtime.deployment import Deployment
from runtime.measurement import Measurement, interval_name

DeviceAnswers = tuple[tuple[HardwareProfile, Answer], ...]


@dataclass(frozen=True)
class Speedup:
    """Lossless two_forward against autoregressive decoding in alternating rounds, and what had been predicted."""

    batch: int
    ratio: float
    low: float
    high: float
    autoregressive: Measurement
    two_forward: Measurement
    predicted: Answer


@dataclass(frozen=True)
class TunedRun:
    """What the runtime generated when it followed the deployment."""

    decoding: DecodingConfig
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    right: tuple[bool, ...]  # whether the text ends with the right answer
    tokens_per_second: float
    acceptance_length: float
    forwards: int


@dataclass(frozen=True)
class Results:
    """All that a demo found. simulated: what about the model was not real, or None."""

    model: str
    command: str
    commit: str
    date: str
    seconds: float
    simulated: str | None
    machine: HardwareProfile
    engine: EngineProfile
    elsewhere: DeviceAnswers  # the full-size model on datasheet devices
    elsewhere_acceptance: str  # where the acceptance length of those came from
    maps: tuple[MapInfo, ...]  # where the same setting pays on those devices
    changes: EffectsInfo  # and what would change it
    rows: tuple[Row, ...]
    speedups: tuple[Speedup, ...]
    study: StudyResult
    deployment: Deployment
    tuned: TunedRun
    commands: tuple[tuple[str, str], ...]  # (what it repeats, the command)
    artefacts: tuple[tuple[str, str], ...]  # (file name in the folder, what it holds)


def write_report(path: str | os.PathLike[str], results: Results) -> Path:
    """Write the report as one self-contained HTML file. UserError where it cannot be written."""
    device = results.machine.fingerprint.get("device", results.machine.name)
    lead = f"{results.model} on {device}, {results.date}, commit {results.commit}; {results.seconds:.0f} s in all."
    sections = (
        _short(results),
        _asked(results),
        _machine(results),
        _elsewhere(results),
        _here(results),
        _validation(results),
        _speedups(results),
        _tuning(results),
        _tuned_run(results),
        _exported(results),
        _repeat(results),
    )
    return write_document(path, "Ridgepoint: does block-diffusion decoding pay here?", lead, sections)


def speedup_sentence(found: Speedup) -> str:
    """The measured speedup with its interval, the predicted one, and why it does or does not pay."""
    chosen = found.predicted.chosen
    cost, length = break_even_length(chosen), chosen.acceptance_length
    if found.low > 1:
        answer = "it pays"
    elif found.high < 1:
        answer = "it does not pay"
    else:
        answer = "the difference is inside the noise"
    return (
        f"Batch {found.batch}: measured {found.ratio:.2f}x [{found.low:.2f}, {found.high:.2f}], so {answer}; predicted "
        f"{chosen.speedup_over_autoregressive:.2f}x. A step commits {length:.2f} tokens and is predicted to cost "
        f"{cost:.2f} autoregressive steps: {forwards(chosen)}, each of which reads "
        f"{chosen.experts_per_layer:.1f} experts a layer; most of the time is {chosen.bound}."
    )


def _short(r: Results) -> Section:
    """The findings before the details."""
    forwards = summaries(r.rows).get("forward, held out")
    found = [speedup_sentence(s) for s in r.speedups]
    if forwards:
        found.append(
            f"Predicted against measured forwards that nothing was fitted to: median absolute error "
            f"{percent(forwards.median_absolute_error)} over {forwards.count}, bias {forwards.bias:+.1%}."
        )
    found.append(decision_sentence(r.study))
    return Section("In short", (*([_simulated(r)] if r.simulated else []), *map(Text, found)))


def _asked(r: Results) -> Section:
    text = (
        "A block-diffusion model drafts several tokens in one forward and verifies them in another. Whether that is "
        "faster than one token per forward depends on the device, the batch and the context. This report predicts the "
        "answer, measures it on this machine, tunes the settings and exports them."
    )
    return Section("What was asked", (Text(text), Code(r.command)))


def _simulated(r: Results) -> Note:
    return Note(
        f"Simulated: {r.simulated}. Times are real; acceptance, routing and text are not those of a trained model."
    )


def _machine(r: Results) -> Section:
    facts = tuple((str(key), _fact(key, value)) for key, value in r.machine.fingerprint.items() if value is not None)
    figures = [
        (path, _figure(path, value), r.machine.source(path))
        for path, value in r.machine.figures().items()
        if not path.startswith("measured.")
    ]
    threads = ", ".join(str(c.threads) for c in r.machine.measured)
    return Section(
        "This machine",
        (
            Table(("fact", "value"), facts),
            Text(f"Threads probed: {threads}. On a CPU the peaks are the fastest samples seen, not a datasheet's."),
            Fold(f"Its {len(figures)} figures and their sources", Table(("figure", "value", "source"), tuple(figures))),
        ),
    )


def _elsewhere(r: Results) -> Section:
    names = " and ".join(profile.name for profile, _ in r.elsewhere)
    model = r.elsewhere[0][1].chosen.model
    return Section(
        f"Predicted: {model} on {names}",
        (
            Note(
                f"Predictions from datasheet and published figures; nothing here was measured. {r.elsewhere_acceptance}"
            ),
            *_answers(r.elsewhere),
            *(Plot(map_plot(info), " ".join((info.words, *(h.words for h in info.headlines)))) for info in r.maps),
            Plot(change_plot(r.changes), " ".join(("What whole changes do to tokens per second.", *r.changes.refused))),
        ),
    )


def _here(r: Results) -> Section:
    blocks: list[Block] = [_simulated(r)] if r.simulated else []
    blocks.append(
        Text(
            f"Engine {r.engine.name}, fitted on this machine; acceptance and expert coverage are those that the "
            "runtime recorded here."
        )
    )
    blocks += _answers(tuple((r.machine, found.predicted) for found in r.speedups))
    return Section(f"Predicted: {r.model} on this machine", tuple(blocks))


def _answers(answers: DeviceAnswers) -> tuple[Block, ...]:
    rows = tuple(
        (
            found.chosen.hardware,
            str(found.chosen.workload.batch),
            str(found.chosen.context),
            quantity(found.autoregressive.step_seconds, "s"),
            quantity(found.chosen.step_seconds, "s"),
            f"{found.chosen.acceptance_length:.2f}",
            f"{found.autoregressive.tokens_per_second:,.0f}",
            f"{found.chosen.tokens_per_second:,.0f}",
            f"{found.chosen.speedup_over_autoregressive:.2f}",
            f"{found.chosen.experts_per_layer:.1f}",
            found.chosen.bound,
        )
        for _, found in answers
    )
    columns = (
        "device", "batch", "context", "AR step", "two_forward step", "tokens a step", "AR tokens/s",
        "two_forward tokens/s", "speedup", "experts a layer", "mostly",
    )  # fmt: skip
    predictions = [p for _, found in answers for p in found.predictions]
    profiles = list({profile.name: profile for profile, _ in answers}.values())
    sweeps = {found.chosen.hardware: found.speedups for _, found in answers if found.speedups is not None}
    blocks: list[Block] = [Table(columns, rows), *(Text(verdict(found.chosen)) for _, found in answers)]
    blocks.append(
        Plot(
            roofline_plot(roofline_info(profiles, predictions)),
            "Roofline: large symbols are decoding steps, small ones their operators, at the estimated time; solid "
            "lines are main memory's roofs, dotted ones those of caches.",
        )
    )
    if sweeps:
        blocks.append(Plot(speedup_plot(speedup_info(sweeps)), "Predicted speedup against batch."))
    blocks.append(Plot(step_time_plot(step_time_info(predictions)), "Where the time of a step goes, by operator."))
    return tuple(blocks)


def _validation(r: Results) -> Section:
    table = tuple(
        (
            name,
            str(found.count),
            percent(found.median_absolute_error),
            f"{found.bias:+.1%}",
            str(found.bound_violations),
        )
        for name, found in summaries(r.rows).items()
    )
    fit = "none" if r.engine.fit is None else f"{len(r.engine.fit.points)} operating points of {r.engine.fit.source}"
    scales = ", ".join(f"{name} {value:.3g}" for name, value in r.engine.scale.items())
    return Section(
        "Predicted versus measured",
        (
            *([_simulated(r)] if r.simulated else []),
            Text(
                f"The engine's scales ({scales}) were fitted to {fit}; the held-out points are other slots and "
                "contexts, and whole generations, which nothing was fitted to."
            ),
            Table(("rows", "count", "median absolute error", "bias", "faster than the bound"), table),
            Plot(
                scatter_plot(scatter_info(r.rows)), "Predicted against measured seconds; on the dashed line they agree."
            ),
        ),
    )


def _speedups(r: Results) -> Section:
    rows = tuple(
        (
            str(found.batch),
            f"{statistics.median(_rates(found.autoregressive)):,.0f}",
            f"{statistics.median(_rates(found.two_forward)):,.0f}",
            f"{found.ratio:.2f}",
            f"{found.low:.2f} to {found.high:.2f}",
            f"{found.predicted.chosen.speedup_over_autoregressive:.2f}",
            f"{found.two_forward.acceptance_length or 1.0:.2f}",
            str(len(found.two_forward.seconds)),
        )
        for found in r.speedups
    )
    interval = interval_name(min(len(found.two_forward.seconds) for found in r.speedups)) if r.speedups else "interval"
    columns = (
        "batch", "AR tokens/s", "two_forward tokens/s", "speedup", interval, "predicted", "tokens a step",
        "rounds",
    )  # fmt: skip
    return Section(
        "Measured: autoregressive against lossless two_forward, default settings",
        (
            *([_simulated(r)] if r.simulated else []),
            Text(
                "In every round both samplers decode the same held-out prompts, in turn; the interval of the median "
                "ratio is that of its order statistics."
            ),
            Table(columns, rows),
            *(Text(speedup_sentence(found)) for found in r.speedups),
        ),
    )


def _rates(measurement: Measurement) -> list[float]:
    return [n / s for n, s in zip(measurement.tokens, measurement.seconds, strict=True)]


def _tuning(r: Results) -> Section:
    study = r.study
    rows = tuple(
        (
            str(t.number),
            f"{t.tokens_per_second:,.0f}" if t.tokens_per_second else "",
            f"{t.predicted_tokens_per_second:,.0f}" if t.predicted_tokens_per_second else "",
            percent(t.divergence) if t.divergence is not None else "",
            f"{t.acceptance_length:.2f}" if t.acceptance_length else "",
            setting_text(t),
            t.outcome or "" if not t.reason else f"{t.outcome}: {t.reason}",
        )
        for t in sorted(study.measured, key=lambda t: -(t.tokens_per_second or 0.0))
    )
    columns = ("trial", "tokens/s", "predicted", "not greedy", "tokens a step", "setting", "outcome")
    rank = study.rank_correlation()
    ranked = "" if rank is None else f" Predicted and measured speeds have a rank correlation of {rank:.2f}."
    work, told = study.subject.workload, study_report(study)
    history = Plot(history_plot(history_info(study, told), "settings"), "The search: every setting in its turn.")
    said = "Which parameters tell the fastest settings from the others."
    mattered = [Plot(importance_plot(told.importances), said)] if told.importances else []
    return Section(
        "Tuning",
        (
            *([_simulated(r)] if r.simulated else []),
            Text(
                f"{len(study.measured)} settings at batch {work.batch}, up to {work.generated_tokens} new tokens a "
                f"prompt.{ranked} {decision_sentence(study)}"
            ),
            Plot(
                front_plot(front_info(front_points(study))),
                "Up is faster, left is closer to autoregressive decoding; nothing measured beats the line in both.",
            ),
            history,
            *mattered,
            Table(columns, rows),
        ),
    )


def _tuned_run(r: Results) -> Section:
    tuned = r.tuned
    setting = ", ".join(f"{name} {value}" for name, value in plain(tuned.decoding).items())
    return Section(
        "The tuned run",
        (
            *([_simulated(r)] if r.simulated else []),
            Text(
                f"The runtime loaded the deployment and generated with {setting}: {rate(tuned.tokens_per_second)}, "
                f"{tuned.acceptance_length:.2f} tokens a step, {tuned.forwards} forwards."
            ),
            Table(
                ("prompt", "generated", "answer"),
                tuple(
                    (prompt, text, "right" if right else "wrong")
                    for prompt, text, right in zip(tuned.prompts, tuned.texts, tuned.right, strict=True)
                ),
            ),
        ),
    )


def _exported(r: Results) -> Section:
    text = "What runtime.generate follows: for each batch the settings, with the evidence they were chosen on."
    return Section("The exported deployment", (Text(text), Code(yaml.safe_dump(plain(r.deployment), sort_keys=False))))


def _repeat(r: Results) -> Section:
    return Section(
        "How to repeat it",
        (
            *(block for what, command in r.commands for block in (Text(what), Code(command))),
            Text("Kept beside this file:"),
            Table(("file", "holds"), r.artefacts),
        ),
    )


def _fact(key: str, value: object) -> str:
    return _figure(key, value) if isinstance(value, (int, float)) else str(value)


def _figure(path: str, value: float) -> str:
    """A profile's figure in the unit that its name ends with."""
    units = {"flops_per_second": "FLOP/s", "bytes_per_second": "B/s", "bytes": "B", "seconds": "s"}
    group = path.rsplit(".", 1)[0] if "flops" in path else path  # peaks are by dtype
    unit = next((unit for name, unit in units.items() if group.endswith(name)), None)
    return f"{value:g}" if unit is None else quantity(value, unit)
