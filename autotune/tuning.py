"""A whole `ridgepoint tune`: what was asked, checked; its buckets one by one inside a budget; what was found."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from autotune.effort import Budget, Effort, earlier
from hardware.files import UserError, known
from runtime.config import ENGINES, DecodingConfig, require
from runtime.device import check_device
from runtime.kernels.registry import KERNELS

if TYPE_CHECKING:
    from autotune.console import Shown
    from autotune.local import Plan, Work
    from autotune.results import StudyResult, Subject
    from autotune.runner import Described
    from autotune.seeding import Predict
    from autotune.tiling_results import TilingResult
    from autotune.tiling_runner import TilingWork
    from hardware.profile import HardwareProfile

What = Literal["decoding", "tilings", "both"]
WHAT: tuple[What, ...] = ("decoding", "tilings", "both")
Bucket = tuple[int, int | None]
# Whose forwards tilings are tuned for: a token, blocks of few and of many drafts, and drafts for several counts ahead.
SENDERS = (
    DecodingConfig(),
    *(DecodingConfig("two_forward", draft_tokens=k) for k in (4, 8, 16, 24)),
    DecodingConfig("single_forward", draft_tokens=16, proposal_levels=(0, 8)),
)
STEP_KERNELS = ("experts", "grouped_experts", "attention", "cca", "router")  # what a step spends its time on
DEFAULT_CONTEXT = 1024  # cached tokens at which attention is timed, unless a bucket says another


@dataclass(frozen=True)
class Request:
    """What to tune, where, and how much of it.

    contexts: the most cached tokens of each bucket; empty: one bucket of short prompts, whose rule serves any.
    replay: a recording that is searched instead of a device. hardware, engine: what predictions are made for.
    routing: of the experts' tilings, as `runtime.route_recording.route_rows` takes it; None: what the model itself
    chooses, and for random weights uniform, because they choose nothing. kernels: those whose tilings are tuned.
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
    routing: str | None = None
    kernels: tuple[str, ...] = STEP_KERNELS
    replay: Path | None = None
    replay_pace: float = 0.0

    def __post_init__(self) -> None:
        if self.engine in ENGINES:
            raise UserError(
                "--engine of tune names a profile for the predictions, as ridgepoint-lean or a YAML file, but got "
                f"{self.engine!r}, which runs models: --engine of bench and generate takes it"
            )
        check_device(self.device, None)
        if self.what is not None and self.what not in WHAT:
            raise known("thing to tune (--what)", self.what, WHAT)
        for name in self.kernels:
            if name not in KERNELS:
                raise known("kernel", name, KERNELS)
        require(0 <= self.max_divergence < math.inf, f"max_divergence >= 0 must hold, but got {self.max_divergence}")
        if self.device == "cpu":
            require(
                self.what in (None, "decoding"),
                "tilings are of Triton kernels, which run on a GPU: "
                f"--what {self.what} needs --device cuda, but got --device cpu",
            )
            require(
                self.routing is None and self.kernels == STEP_KERNELS,
                "--routing and --kernels are of tilings, which need --device cuda, but got --device cpu",
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
    works = decoding_works(request)  # refuses before it probes
    profile = profile_of(request, folder, lambda label, share: show.update("probing", share, label))
    tilings: list[TilingResult] = []
    if request.tilings:
        from autotune.tiling_results import tile_table

        part = budget.part(1 + request.decoding)
        tilings = _tiled(request, url, profile, show, part, command)
        table = tile_table(tilings)
        works = [replace(work, tilings=table) for work in works]
    studies: list[StudyResult] = []
    for work in works if request.decoding else ():
        limit = earlier(request.effort.seconds, budget.share(len(works) - len(studies)))
        studies.append(_decoded(request, url, work, limit, profile, show, command))
    return Found(studies, tilings)


def tiling_works(request: Request) -> list[TilingWork]:
    """Every kernel at every token count that samplers send at these batches."""
    from autotune.local import config_file
    from autotune.tiling_runner import buckets, works_of
    from runtime.config import model_config_from_json

    config = model_config_from_json(config_file(request.model, built_in=request.random_weights))
    senders = SENDERS if config.mask_token_id is not None or request.random_weights else SENDERS[:1]
    return works_of(
        request.kernels,
        Path(request.model).name,
        config,
        buckets(request.batches, senders),
        senders,
        device=request.device,
        context=max(request.contexts, default=min(DEFAULT_CONTEXT, config.max_position_embeddings)),
        routing=request.routing or ("uniform" if request.random_weights else f"recorded:{request.model}"),
    )


def _tiled(
    request: Request, url: str, profile: HardwareProfile, show: Shown, budget: Budget, command: str
) -> list[TilingResult]:
    """The tilings of every kernel and token count."""
    from autotune.tilings import tune_tilings

    found: list[TilingResult] = []
    works = tiling_works(request)
    for place, work in enumerate(works):
        name = f"{work.kernel}, {work.batch * work.slots} tokens"
        limit = earlier(request.effort.seconds, budget.share(len(works) - place))
        found.append(
            tune_tilings(
                url,
                work,
                hardware=profile,
                keep=request.effort.tilings,
                seconds=limit,
                call_seconds=request.effort.trial_seconds,
                command=command,
                on_trial=show.trying(name, 1 + request.effort.tilings),
                on_compile=partial(show.update, name, remark="compiling"),
            )
        )
    return found


def profile_of(request: Request, folder: Path, progress: Callable[[str, float], None]) -> HardwareProfile:
    """The profile that predictions are made with: the one asked for; this CPU's, probed once and kept; a GPU's, that
    ships for its name."""
    from autotune.local import machine_profile, shipped_profile
    from hardware.profile import load_profile

    if request.device != "cpu":
        name = gpu_name(request.device)  # first: without it nothing can be tuned
        return load_profile(request.hardware) if request.hardware else shipped_profile(name)
    return load_profile(request.hardware) if request.hardware else machine_profile(folder / "hardware.yaml", progress)


def gpu_name(device: str) -> str:
    """What torch calls a GPU, asked in another process: this one shall hold nothing on it. UserError for none."""
    program = "import sys, torch; print(torch.cuda.get_device_name(sys.argv[1]))"
    run = subprocess.run([sys.executable, "-c", program, device], capture_output=True, text=True)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"device {device} needs a CUDA or ROCm build of torch and a GPU, but: {reason}")
    return run.stdout.strip()


def decoding_works(request: Request) -> list[Work]:
    """What is decoded in each bucket."""
    from autotune.local import Work

    wanted = request.effort
    return [
        Work(
            model=request.model,
            batch=batch,
            context=context,
            device=request.device,
            prompts=wanted.prompts,
            new_tokens=wanted.new_tokens,
            repeats=wanted.repeats,
            random=request.random_weights,
        )
        for batch, context in request.buckets
    ]


def plan_of(request: Request, seconds: float | None) -> Plan:
    """How a bucket is searched, in so many seconds."""
    from autotune.local import Plan

    wanted = request.effort
    return Plan(
        trials=wanted.trials,
        seconds=seconds,
        lossless=request.lossless,
        max_divergence=request.max_divergence,
        rounds=wanted.rounds,
        seed=request.seed,
        histogram=request.histogram,
        trial_seconds=wanted.trial_seconds,
    )


def _decoded(
    request: Request,
    url: str,
    work: Work,
    seconds: float | None,
    profile: HardwareProfile,
    show: Shown,
    command: str,
) -> StudyResult:
    from autotune.local import tune_local

    bucket = f"batch {work.batch}" + ("" if work.context is None else f" context {work.context}")
    return tune_local(
        work,
        url,
        profile,
        plan_of(request, seconds),
        engine=request.engine,
        command=command,
        on_open=partial(_remark, show),
        on_trial=show.searching(bucket, request.effort.trials, request.max_divergence),
        on_compare=lambda share: show.update("deciding", share, "best against default, alternating"),
    )


def _remark(show: Shown, described: Described) -> None:
    """Why the default engine is not the fastest one there is, once."""
    if described.remark:
        show.once(f"ridgepoint: auto took the engine {described.engine}: {described.remark}")


def predicted_recording(request: Request, about: Subject) -> Predict:
    """Predictions of what was recorded, where --hardware names the profile of the device; nothing without."""
    from autotune.seeding import Predictor
    from hardware.profile import load_profile
    from perfmodel.model_spec import load_spec

    if not request.hardware:
        return lambda candidate, acceptance: None
    return Predictor(load_spec(about.model), load_profile(request.hardware), about.workload, request.engine)


def _replayed(request: Request, url: str, show: Shown, budget: Budget, command: str) -> StudyResult:
    """A recording searched: its model and device are the recording's, and so are its predictions, with a profile."""
    from autotune.replay import Replay, read_recording
    from autotune.study import tune

    assert request.replay is not None
    recording = read_recording(request.replay)
    about, wanted = recording.subject, request.effort
    return tune(
        url,
        about,
        Replay(recording, request.replay_pace),
        default=recording.default,
        predict=predicted_recording(request, about),
        trials=wanted.trials,
        seconds=earlier(wanted.seconds, budget.share(1)),
        max_divergence=request.max_divergence,
        rounds=wanted.rounds,
        seed=request.seed,
        command=command,
        on_trial=show.searching(about.name, wanted.trials, request.max_divergence),
        on_compare=lambda share: show.update("deciding", share, "best against default, alternating"),
    )
