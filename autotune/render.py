"""A report as text, Markdown or HTML, from one list of sections: sentences and a table each."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autotune.console import setting_text, table
from autotune.report import (
    MODEL_SOURCES,
    Importance,
    Improvement,
    Score,
    Seeding,
    StageCount,
    StudyReport,
    TilingReport,
)
from autotune.results import TrialRecord
from hardware.files import known, write_atomic

_BARS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 60
_COLUMNS = 110  # of sentences
_LEAST_COMPARED = 5  # settings of either kind: the best of fewer says nothing
_MOST_ROWS = 20  # of a front or a curve in words; all of them are in the JSON


@dataclass(frozen=True)
class Section:
    """A heading of level 1 or 2, sentences, and a table whose first row names its columns (empty: none)."""

    title: str
    sentences: tuple[str, ...] = ()
    table: tuple[tuple[str, ...], ...] = ()
    level: int = 2


def sections(studies: Sequence[StudyReport], tilings: Sequence[TilingReport] = ()) -> list[Section]:
    """The whole report."""
    found: list[Section] = []
    for study in studies:
        found += _study(study)
    if tilings:
        found.append(_tilings(tilings))
    return found


def as_text(parts: Sequence[Section]) -> str:
    """For the terminal."""
    blocks = []
    for part in parts:
        lines = [part.title, ("=" if part.level == 1 else "-") * len(part.title)]
        lines += [line for sentence in part.sentences for line in textwrap.wrap(sentence, _COLUMNS)]
        lines += table(part.table) if part.table else []
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_markdown(parts: Sequence[Section]) -> str:
    """For a page."""
    blocks = []
    for part in parts:
        blocks.append(f"{'#' * part.level} {_plain_markdown(part.title)}")
        blocks += [_plain_markdown(s) for s in part.sentences]
        if part.table:
            head, *rows = [[_plain_markdown(cell) for cell in row] for row in part.table]
            lines = [head, ["---"] * len(head), *rows]
            blocks.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(blocks) + "\n"


def as_html(parts: Sequence[Section]) -> str:
    """One self-contained page."""
    body = []
    for part in parts:
        body.append(f"<h{part.level}>{html.escape(part.title)}</h{part.level}>")
        body += [f"<p>{html.escape(s)}</p>" for s in part.sentences]
        if part.table:
            head, *rows = [[html.escape(cell) for cell in row] for row in part.table]
            lines = ["".join(f"<th>{c}</th>" for c in head), *("".join(f"<td>{c}</td>" for c in row) for row in rows)]
            body.append("<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>")
    style = (
        "body{font:15px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
        "td,th{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:left;font-variant-numeric:tabular-nums}"
    )
    title = html.escape(parts[0].title) if parts else "tuning"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"</head><body>\n{chr(10).join(body)}\n</body></html>\n"
    )


FORMATS: dict[str, Callable[[Sequence[Section]], str]] = {
    ".html": as_html,
    ".md": as_markdown,
    ".txt": lambda parts: as_text(parts) + "\n",
}


def check_format(path: Path) -> None:
    """UserError for a file name whose ending no format has."""
    if path.suffix not in FORMATS:
        raise known("ending of a report's file name", path.suffix, FORMATS)


def write(parts: Sequence[Section], path: Path) -> Path:
    """Write the report in the format that the file's name ends in."""
    check_format(path)
    return write_atomic(path, FORMATS[path.suffix](parts))


def sparkline(values: Sequence[float]) -> str:
    """Heights from 0 to the largest value, in one line."""
    most = max(values, default=0.0)
    if most <= 0:
        return ""
    return "".join(_BARS[min(len(_BARS) - 1, int(v / most * len(_BARS)))] for v in values)


def _study(study: StudyReport) -> list[Section]:
    spent = "" if study.seconds is None else f" in {_seconds(study.seconds)} of measuring"
    opening = [f"{study.evaluations} settings tried{spent}. Decision: {study.decision}."]
    if study.simulated:
        opening.append(f"Simulated: {study.simulated}.")
    return [
        Section(study.name, tuple(opening), level=1),
        _scores(study.scores),
        _stages(study.stages),
        _front(study.front),
        _importances(study),
        _curve(study.curve, study.evaluations, study.max_divergence),
        _seeding(study.seeding),
    ]


def _scores(scores: Sequence[Score]) -> Section:
    rows = [
        (s.stage, s.quantity, str(s.count), _number(s.rank_correlation, ".2f"), _number(s.error, ".0%"))
        + (_number(s.ratio, ".2f"),)
        for s in scores
    ]
    head = ("stage", "predicted and measured", "settings", "rank correlation", "median error", "predicted / measured")
    return Section("Predictions, stage by stage", (), (head, *rows))


def _stages(stages: Sequence[StageCount]) -> Section:
    rows = [
        (s.stage, str(s.entered), ", ".join(f"{count} {outcome}" for outcome, count in s.ended.items()) or "-")
        for s in stages
    ]
    return Section("Where trials ended", (), (("stage", "entered", "ended there"), *rows))


def _front(front: Sequence[TrialRecord]) -> Section:
    rows = [
        (
            str(t.number),
            _number(t.tokens_per_second, ",.0f"),
            _number(t.divergence, ".2%"),
            t.source,
            setting_text(t.params),
        )
        for t in front[:_MOST_ROWS]
    ]
    more = (f"The fastest {_MOST_ROWS} of {len(front)}.",) if len(front) > _MOST_ROWS else ()
    head = ("trial", "tokens/s", "differs", "source", "setting")
    return Section("Pareto front: speed against divergence from autoregressive decoding", more, (head, *rows))


def _importances(study: StudyReport) -> Section:
    title = "What the fastest settings have in common (PED-ANOVA)"
    if not study.importances:
        return Section(title, (f"Not known: {study.importances_missing}.",))
    note = (
        f"Shares by which parameters tell the fastest {study.top_share or 0:.0%} of the settings that ran from the "
        "others; the search chose them, so this is about these settings, not about the whole space."
    )
    rows = [_importance(i) for i in study.importances]
    return Section(title, (note,), (("parameter", "share", "settings with it"), *rows))


def _importance(found: Importance) -> tuple[str, str, str]:
    return found.parameter, f"{found.share:.0%}", str(found.settings)


def _curve(curve: Sequence[Improvement], evaluations: int, max_divergence: float) -> Section:
    kind = "lossless settings" if max_divergence == 0 else f"settings that differ in at most {max_divergence:.2%}"
    title = f"Best so far, of {kind}"
    if not curve:
        return Section(title, ("None ran.",))
    best = [max(i.tokens_per_second for i in curve if i.evaluation <= n) for n in _grid(curve, evaluations)]
    rows = [
        (str(i.evaluation), _seconds(i.seconds), str(i.trial), i.source, f"{i.tokens_per_second:,.0f}")
        for i in curve[-_MOST_ROWS:]
    ]
    line = f"{sparkline(best)}  (settings {curve[0].evaluation} to {evaluations})"
    return Section(title, (line,), (("setting", "after", "trial", "source", "tokens/s"), *rows))


def _grid(curve: Sequence[Improvement], evaluations: int) -> list[int]:
    first = curve[0].evaluation
    width = min(_SPARK_WIDTH, evaluations - first + 1)
    return [first + round(i * (evaluations - first) / max(1, width - 1)) for i in range(width)]


def _seeding(found: Seeding) -> Section:
    title = "What the search would have missed without the model"
    if found.best is None:
        return Section(title, ("No allowed setting ran.",))
    fastest = f"trial {found.best_trial} with {_speed(found.best)} (source: {found.best_source})"
    sentences = [f"The fastest that may be chosen is {fastest}."]
    if found.best_source not in MODEL_SOURCES:
        sentences.append("It is none of the model's choices: without these it would have been found, too.")
    elif found.without is None:
        sentences.append("Without the model's choices none would be left.")
    else:
        sentences.append(
            f"Without the model's choices ({', '.join(MODEL_SOURCES)}) the fastest of these trials ran at "
            f"{_speed(found.without)}, {1 - found.without / found.best:.1%} slower. A search without the model would "
            "have tried others in their place, and these are speeds of single trials: see docs/search.md."
        )
    if found.count >= _LEAST_COMPARED and found.seeded is not None and found.others is not None:
        sentences.append(
            f"The first {found.count} settings that the model chose came to {_speed(found.seeded)}; the first "
            f"{found.count} of the search's own, which had seen results of those, to {_speed(found.others)}."
        )
    rows = [(s.source, str(s.settings), str(s.allowed), _number(s.tokens_per_second, ",.0f")) for s in found.sources]
    head = ("proposed by", "settings", "may be chosen", "fastest, tokens/s")
    return Section(title, tuple(sentences), (head, *rows))


def _tilings(tilings: Sequence[TilingReport]) -> Section:
    rows = []
    for t in tilings:
        gain = "-" if t.ratio is None else f"{t.ratio:.2f}x [{t.low or 0:.2f}, {t.high or 0:.2f}]"
        chosen = "-" if t.tiling is None else setting_text(t.tiling)
        ended = ", ".join(f"{count} {outcome}" for outcome, count in sorted(t.outcomes.items()))
        rows.append((t.name, t.routing or "-", gain, _number(t.rank_correlation, ".2f"), ended, chosen, t.reason))
    head = ("kernel and bucket", "routes", "against the default", "rank correlation", "tilings", "to run", "decision")
    said = sorted({t.simulated for t in tilings if t.simulated})
    return Section("Tilings", tuple(f"Simulated: {what}." for what in said), (head, *rows), level=1)


def _plain_markdown(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _speed(value: float) -> str:
    return f"{value:,.0f} tokens/s"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g} s" if value < 120 else f"{value / 60:.0f} min"
