"""A whole `ridgepoint tune`: what was asked, checked; its buckets one by one inside a budget; what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from autotune.effort import Budget, Effort, earlier
from hardware.files import UserError, known
from runtime.config import ENGINES, require
from runtime.options import check_device

if TYPE_CHECKING:
    from autotune.console import Shown
    from autotune.results import StudyResult
    from autotune.tiling_results import TilingResult
    from hardware.profile import HardwareProfile

What = Literal["decoding", "tilings", "both"]
WHAT: tuple[What, ...] = ("decoding", "tilings", "both")
Bucket = tuple[int, int | None]


@dataclass(frozen=True)
class Request:
    """What to tune, where, and how much of it.

    contexts: the most cached tokens of each bucket; empty: one bucket of short prompts, whose rule serves any.
    replay: a recording that is searched instead of a device. hardware, engine: what predictions are made for.
    """

    effort: Effort
    model: str = "zaya-nano"
    device: str = "cpu"
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = ()
    what: What | None = None
    lossless: bool = False
    max_divergence: float = 0.0
    histogram: tuple[float, ...] = ()
    hardware: str | None = None
    engine: str | None = None
    seed: int = 0
    random_weights: bool = False
    replay: Path | None = None
    replay_pace: float = 0.0
    budget_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.engine in ENGINES:
            raise UserError(
                "--engine of tune names a profile for the predictions, as ridgepoint-lean or a YAML file, but got "
                f"{self.engine!r}, which runs models: --engine of bench and generate takes it"
            )
        check_device(self.device, None)
        if self.what is not None and self.what not in WHAT:
            raise known("thing to tune (--what)", self.what, WHAT)
        require(0 <= self.max_divergence < math.inf, f"max_divergence >= 0 must hold, but got {self.max_divergence}")
        if self.device == "cpu":
            require(
                self.what in (None, "decoding"),
                "tilings are of Triton kernels, which run on a GPU: "
                f"--what {self.what} needs --device cuda, but got --device cpu",
            )

    @property
    def buckets(self) -> list[Bucket]:
        """Every batch with every context; a study each."""
        contexts: tuple[int | None, ...] = self.contexts or (None,)
        return [(batch, context) for batch in self.batches for context in contexts]

    @property
    def decoding(self) -> bool:
        """Whether decoding is searched."""
        return self.what != "tilings"

    @property
    def tilings(self) -> bool:
        """Whether tilings are."""
        return self.what in ("tilings", "both") or (self.what is None and self.device != "cpu")


@dataclass(frozen=True)
class Found:
    """What tuning found, bucket by bucket."""

    studies: Sequence[StudyResult] = ()
    tilings: Sequence[TilingResult] = ()


def run(request: Request, url: str, folder: Path, show: Shown, budget: Budget, command: str) -> Found:
    """Tune every bucket inside the budget. folder: where a probed profile is kept. Errors as `autotune.study.tune`."""
    if request.replay is not None:
        return Found([_replayed(request, url, show, budget, command)])
    profile = profile_of(request, folder, lambda label, share: show.update("probing", share, label))
    studies, left = [], len(request.buckets)
    for batch, context in request.buckets:
        limit = earlier(request.effort.seconds, budget.share(left))
        studies.append(_decoded(request, url, batch, context, limit, profile, show, command))
        left -= 1
    return Found(studies)


def profile_of(request: Request, folder: Path, progress: Callable[[str, float], None]) -> HardwareProfile:
    """The profile that predictions are made with: the one asked for, or this machine's, probed once and kept."""
    from autotune.local import machine_profile
    from hardware.profile import load_profile

    if request.hardware:
        return load_profile(request.hardware)
    return machine_profile(folder / "hardware.yaml", progress)


def _decoded(
    request: Request,
    url: str,
    batch: int,
    context: int | None,
    seconds: float | None,
    profile: HardwareProfile,
    show: Shown,
    command: str,
) -> StudyResult:
    from autotune.local import Plan, load, tune_local

    wanted = request.effort
    plan = Plan(
        prompts=wanted.prompts,
        new_tokens=wanted.new_tokens,
        trials=wanted.trials,
        seconds=seconds,
        lossless=request.lossless,
        max_divergence=request.max_divergence,
        repeats=wanted.repeats,
        rounds=wanted.rounds,
        seed=request.seed,
        histogram=request.histogram,
    )
    return tune_local(
        load(request.model),
        url,
        batch,
        profile,
        plan,
        engine=request.engine,
        command=command,
        on_trial=show.searching(f"batch {batch}", wanted.trials, request.max_divergence),
        on_compare=lambda share: show.update("deciding", share, "best against default, alternating"),
    )


def _replayed(request: Request, url: str, show: Shown, budget: Budget, command: str) -> StudyResult:
    """A recording searched: its model and device are the recording's, and so are its predictions, with a profile."""
    from autotune.replay import Replay, read_recording
    from autotune.seeding import Predict, Predictor
    from autotune.study import tune
    from hardware.profile import load_profile
    from perfmodel.model_spec import load_spec

    assert request.replay is not None
    recording = read_recording(request.replay)
    about, wanted = recording.subject, request.effort
    predict: Predict = lambda candidate, acceptance: None  # noqa: E731  # without a profile nothing is predicted
    if request.hardware:
        profile = load_profile(request.hardware)
        predict = Predictor(load_spec(about.model), profile, about.workload, request.engine)
    return tune(
        url,
        about,
        Replay(recording, request.replay_pace),
        default=recording.default,
        predict=predict,
        trials=wanted.trials,
        seconds=earlier(wanted.seconds, budget.share(1)),
        max_divergence=request.max_divergence,
        rounds=wanted.rounds,
        seed=request.seed,
        command=command,
        on_trial=show.searching(about.name, wanted.trials, request.max_divergence),
        on_compare=lambda share: show.update("deciding", share, "best against default, alternating"),
    )
