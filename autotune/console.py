"""What tuning shows: a bar on stderr while it runs, and studies, tilings and decisions as text on stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotune.effort import Budget
    from autotune.results import StudyResult, TrialRecord
    from autotune.tiling_results import TilingResult, TilingTrial


# The file that says in JSON what the bar says. It is between the dashboard and the command that it starts, and may
# change: whoever else watches a study reads it by `ridgepoint study show --json`.
PROGRESS_VARIABLE = "RIDGEPOINT_PROGRESS"


class Shown:
    """A bar that says what is being done, how much of it is, the best so far and the time left.

    `update` takes a label, the share done and a remark.
    """

    def __init__(self, bar: Any, task: Any, budget: Budget) -> None:
        self._bar, self._task, self._budget = bar, task, budget
        self._said: set[str] = set()
        self._file = os.environ.get(PROGRESS_VARIABLE)
        self._settings = (0, 0)  # measured, planned

    def update(self, label: str, share: float, remark: str = "") -> None:
        """Show what is being done now."""
        left = self._budget.left_seconds
        time_left = [] if left is None else [f"{clock(left)} left"]
        self._bar.update(
            self._task,
            description=label,
            completed=min(share, 1.0),
            remark="; ".join([*filter(None, [remark]), *time_left]),
        )
        if self._file:
            done, planned = self._settings
            found = {"label": label, "share": share, "remark": remark, "done": done, "planned": planned}
            part = Path(f"{self._file}.part")
            with suppress(OSError):  # nobody can watch then, but tuning goes on
                part.write_text(json.dumps(found), encoding="utf-8")
                part.replace(self._file)

    def once(self, line: str) -> None:
        """A line on stderr above the bar, the first time it is said."""
        if line not in self._said:
            self._said.add(line)
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def searching(self, name: str, trials: int, max_divergence: float) -> Callable[[TrialRecord, int], None]:
        """A call for each finished trial of a bucket: (trial, distinct settings so far)."""
        best = 0.0

        def on_trial(trial: TrialRecord, done: int) -> None:
            nonlocal best
            allowed = trial.lossless or (trial.divergence is not None and trial.divergence <= max_divergence > 0)
            if trial.outcome == "correct" and allowed and trial.tokens_per_second:
                best = max(best, trial.tokens_per_second)
            self._settings = (done, trials)
            said = f"{done} of {trials} settings; last: {speed(trial)}"
            self.update(name, done / trials, said + (f"; best now {best:,.0f}" if best else ""))

        return on_trial

    def trying(self, name: str, tilings: int) -> Callable[[TilingTrial, int], None]:
        """A call for each finished tiling: (trial, how many so far)."""
        return lambda trial, done: self.update(name, done / tilings, f"{done} tilings; last: {trial.outcome}")


@contextmanager
def progress(budget: Budget, *, quiet: bool = False) -> Iterator[Shown]:
    """The bar, while it is of use; none where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[remark]}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        yield Shown(bar, bar.add_task("starting", total=1.0, remark=""), budget)


def note(line: str) -> None:
    """A line on stderr: it is no result."""
    print(line, file=sys.stderr)


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def speed(trial: TrialRecord) -> str:
    """What came of a trial, in a word or a figure."""
    known = trial.tokens_per_second
    return trial.outcome or "" if known is None else f"{known:,.0f} tokens/s"


def print_study(result: StudyResult) -> None:
    """The measured settings, the fastest first; those on the Pareto front are marked."""
    front = {t.number for t in result.front()}
    simulated = f" (simulated: {result.subject.simulated})" if result.subject.simulated else ""
    print(f"{result.name}: {len(result.measured)} settings on {result.subject.device['device']}{simulated}")
    print("   trial  tokens/s  predicted  differs  accepts  setting")
    for t in sorted(result.measured, key=lambda t: -(t.tokens_per_second or 0.0)):
        predicted = cell(t.predicted_tokens_per_second, ".0f")
        numbers = f"{cell(t.tokens_per_second, '.0f'):>8}  {predicted:>9}  {cell(t.divergence, '.2%'):>7}"
        remark = "" if t.outcome == "correct" else f"  ({t.outcome}: {t.reason})"
        mark = "*" if t.number in front else " "
        print(
            f" {mark} {t.number:5}  {numbers}  {cell(t.acceptance_length, '.2f'):>7}  {setting_text(t.params)}{remark}"
        )
    rank = result.rank_correlation()
    if rank is not None:
        print(f"predictions: rank correlation {rank:.2f} over {len(result.scored())} settings")
    print_decision(result)


def print_decision(result: StudyResult) -> None:
    """What a study decided, in a line."""
    decision = result.decision
    if decision is None:
        return print(f"{result.name}: not decided yet")
    line = f"{result.name}: trial {decision.trial}" + (" (the default)" if decision.kept_default else "")
    found = decision.comparison
    if found:
        line += f"; trial {decision.challenger} against the default: {found.ratio:.2f}x"
        line += f" [{found.low:.2f}, {found.high:.2f}] in {found.rounds} rounds"
    print(f"{line}; {decision.reason}")


def print_tilings(results: Sequence[TilingResult]) -> None:
    """A line for each kernel and bucket: the tiling to run, and what it gains."""
    for result in results:
        decision = result.decision
        if decision is None:
            print(f"{result.name}: {len(result.finished)} tilings tried, not decided yet")
            continue
        line = f"{result.name}: {setting_text(decision.tiling)}" + (" (the default)" if decision.kept_default else "")
        line += f" (simulated: {result.subject.simulated})" if result.subject.simulated else ""
        if decision.ratio is not None:
            line += f"; {decision.ratio:.2f}x [{cell(decision.low, '.2f')}, {cell(decision.high, '.2f')}]"
            line += f" in {decision.rounds} rounds"
        print(f"{line}; {decision.reason}")


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their columns under each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def setting_text(params: Mapping[str, Any]) -> str:
    """A setting's parameters in one line."""
    return " ".join(f"{name}={value}" for name, value in params.items())


def cell(value: float | None, form: str) -> str:
    """A figure of a table; a dash where there is none."""
    return "-" if value is None else format(value, form)
