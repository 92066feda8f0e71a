"""A tuning run on this machine with the real model, ready to be searched: prompts, runner, predictions, subject."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from autotune.results import StudyResult, Subject
from autotune.runner import LocalRunner
from autotune.seeding import Predictor
from autotune.space import decoding_space, default_candidate
from autotune.study import OnTrial, tune
from hardware.fingerprint import core_count, cpu_model, fingerprint, fingerprint_key
from hardware.probe import probe
from hardware.profile import HardwareProfile, load_profile, save_profile
from perfmodel.engine import EngineProfile
from perfmodel.model_spec import spec_from_config
from runtime.bench import identify
from runtime.checkpoint import find_checkpoint, load_model
from runtime.config import Workload, require
from runtime.conversion.data import evaluation_problems
from runtime.conversion.tasks import FAMILIES, Problem
from runtime.engines import engine_of
from runtime.model.zaya import Zaya
from runtime.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Plan:
    """How to tune: held-out problems to decode and the most new tokens of each, how long to search, what to allow."""

    prompts: int = 10
    new_tokens: int = 144
    trials: int = 24
    seconds: float | None = None
    lossless: bool = False
    max_divergence: float = 0.0
    repeats: int = 2
    rounds: int = 8
    seed: int = 0
    histogram: tuple[float, ...] = ()  # see `space.Space`

    def __post_init__(self) -> None:
        for name in ("prompts", "new_tokens", "trials", "repeats"):
            require(getattr(self, name) >= 1, f"{name} >= 1 must hold, but got {getattr(self, name)}")


@dataclass(frozen=True)
class Tuned:
    """A model to tune: its weights, its tokenizer, and the name that its studies carry."""

    name: str
    model: Zaya
    tokenizer: Tokenizer


def load(path_or_name: str) -> Tuned:
    """Load a checkpoint to tune. A path is known by its folder's name."""
    folder = find_checkpoint(path_or_name)
    return Tuned(folder.resolve().name, load_model(path_or_name), load_tokenizer(folder))


def mixed_problems(count: int) -> list[Problem]:
    """`count` held-out problems, the families in turn: the same ones always, so that studies compare."""
    each = -(-count // len(FAMILIES))
    columns = [evaluation_problems(family, each) for family in sorted(FAMILIES)]
    return [column[i] for i in range(each) for column in columns][:count]


def tune_local(
    tuned: Tuned,
    url: str,
    batch: int,
    hardware: HardwareProfile,
    plan: Plan,
    *,
    engine: EngineProfile | str | None = None,
    command: str = "",
    simulated: str | None = None,
    on_trial: OnTrial | None = None,
    on_compare: Callable[[float], None] = lambda share: None,
) -> StudyResult:
    """Search the settings of one batch size and decide (see `autotune.study.tune`).

    The prompts are rounded up to whole batches. `hardware` is this machine's profile, for the predictions alone.
    simulated: what is not real about the model, for example "random weights".
    """
    require(
        hardware.kind == "cpu",
        f"tuning runs on this machine's CPU, but {hardware.name} is the profile of a {hardware.kind}",
    )
    config = tuned.model.config
    count = -(-plan.prompts // batch) * batch
    problems = mixed_problems(count)
    first = [] if config.bos_token_id is None else [config.bos_token_id]
    prompts = [[*first, *tuned.tokenizer.encode(p.prompt)] for p in problems]
    identity = identify(tuned.model, tuned.name, command, simulated=simulated)
    runner = LocalRunner(
        tuned.model,
        identity,
        prompts,
        batch=batch,
        max_new_tokens=plan.new_tokens,
        repeats=plan.repeats,
        problems=problems,
        tokenizer=tuned.tokenizer,
    )
    workload = Workload(batch, round(sum(map(len, prompts)) / count), plan.new_tokens)
    cores = core_count()
    space = decoding_space(
        batch=batch,
        cores=cores,
        drafts=config.mask_token_id is not None,
        lossless=plan.lossless,
        histogram=plan.histogram,
        engine=engine_of(tuned.model),
    )
    subject = Subject(
        model=tuned.name,
        model_hash=identity.model_hash,
        device=identity.device,
        workload=workload,
        prompts=hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12],
        space=space,
        simulated=simulated,
    )
    return tune(
        url,
        subject,
        runner,
        default=default_candidate(space, min(torch.get_num_threads(), cores)),
        predict=Predictor(spec_from_config(config, tuned.name), hardware, workload, engine),
        trials=plan.trials,
        seconds=plan.seconds,
        max_divergence=plan.max_divergence,
        rounds=plan.rounds,
        seed=plan.seed,
        command=command,
        on_trial=on_trial,
        on_compare=on_compare,
    )


def machine_profile(path: Path, progress: Callable[[str, float], None]) -> HardwareProfile:
    """This machine's profile for predictions: that at `path` if it was probed here, else a quick probe, kept there."""
    if path.is_file():
        profile = load_profile(path)
        if fingerprint_key(profile.fingerprint) == fingerprint_key(fingerprint(cpu_model())):
            return profile
    profile = probe("cpu", quick=True, progress=progress)
    save_profile(profile, path)
    return profile
