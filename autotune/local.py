"""A tuning run on this machine with the real model, ready to be searched: prompts, runner, predictions, subject.

The process that searches never loads the model: the runner lives in a child, which describes what it works on.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.isolation import Child, Isolated
from autotune.objective import Runner, StageFailure
from autotune.results import StudyResult, Subject
from autotune.seeding import Predictor
from autotune.space import Candidate, decoding_space, default_candidate
from hardware.files import UserError, known, plain
from hardware.fingerprint import core_count, cpu_model, fingerprint, fingerprint_key
from hardware.probe import probe
from hardware.profile import HardwareProfile, list_profiles, load_profile, save_profile
from perfmodel.engine import EngineProfile
from perfmodel.model_spec import spec_from_config
from runtime.config import DType, ModelConfig, model_config_from_json, require
from runtime.conversion.data import evaluation_problems
from runtime.conversion.tasks import FAMILIES, Problem

if TYPE_CHECKING:
    from autotune.runner import Described, LocalRunner
    from autotune.study import OnTrial
    from runtime.model.zaya import Zaya
    from runtime.tokenizer import Tokenizer

RANDOM_WEIGHTS = "random weights: routing and acceptance are not real"
LOAD_SECONDS = 900.0  # for a child to start, and to load a model of many gigabytes
_EARLIER = 8  # problems that are tried, one after the other, to fill what is left of a context


@dataclass(frozen=True)
class Plan:
    """How to search: distinct settings, seconds, what to allow, rounds of the decision. histogram: see `space.Space`.

    trial_seconds: the time limit of each call of the runner, of which a trial makes a handful.
    """

    trials: int = 24
    seconds: float | None = None
    lossless: bool = False
    max_divergence: float = 0.0
    rounds: int = 8
    seed: int = 0
    histogram: tuple[float, ...] = ()
    trial_seconds: float = 120.0

    def __post_init__(self) -> None:
        require(self.trials >= 1, f"trials >= 1 must hold, but got {self.trials}")
        require(self.trial_seconds > 0, f"trial_seconds > 0 must hold, but got {self.trial_seconds:g}")


@dataclass(frozen=True)
class Tuned:
    """A model to tune: its weights, its tokenizer, and the name that its studies carry."""

    name: str
    model: Zaya
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Work:
    """What is decoded, where: picklable, and called in the process that does it, which makes its runner.

    prompts: held-out problems, rounded up to whole batches. new_tokens: at most, of each. context: the most tokens that
    a sequence comes to; the prompts are lengthened with problems solved before them until new_tokens are left of it.
    dtype: by default float32 on a CPU and bfloat16 on a GPU. tilings: of the Triton kernels, as in `KernelConfig`.
    random: no checkpoint, but random weights for the config of a folder or a built-in model, with random prompts. What
    is measured is then real for the time of a step alone: experts are chosen at random, drafts are hardly ever
    accepted, and `simulated` says so in every record.
    """

    model: str
    batch: int = 1
    context: int | None = None
    device: str = "cpu"
    prompts: int = 10
    new_tokens: int = 144
    repeats: int = 2
    random: bool = False
    dtype: DType | None = None
    threads: int | None = None
    tilings: Mapping[str, Mapping[int, Mapping[str, int]]] = field(default_factory=dict)
    command: str = ""
    simulated: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "prompts", "new_tokens", "repeats"):
            require(getattr(self, name) >= 1, f"{name} >= 1 must hold, but got {getattr(self, name)}")
        require(
            self.context is None or self.context > self.new_tokens,
            f"context > new_tokens = {self.new_tokens} must hold, but got {self.context}",
        )
        config_file(self.model, built_in=self.random)  # an unknown model is refused before anything is loaded

    def __call__(self) -> LocalRunner:
        """Load the model, and make its runner. UserError as `runtime.checkpoint.load_model`."""
        from autotune.runner import LocalRunner
        from runtime.bench import identify, token_rows
        from runtime.device import use_device

        use_device(self.device, self.threads)
        count, config = -(-self.prompts // self.batch) * self.batch, None
        problems: list[Problem] = []
        tokenizer: Tokenizer | None = None
        if self.random:
            name, config = _random_config(self.model)
            model = _random(config, self.device, self._dtype)
            length = 32 if self.context is None else self.context - self.new_tokens
            prompts = token_rows(model, count, length)
        else:
            tuned = load(self.model, device=self.device, dtype=self._dtype)
            name, model, tokenizer = tuned.name, tuned.model, tuned.tokenizer
            problems = mixed_problems(count)
            room = None
            if self.context is not None:
                room = self.context - self.new_tokens
                longest = max(len(lengthened(problem, model.config, tokenizer, None)) for problem in problems)
                require(
                    longest <= room,
                    f"--context >= {longest + self.new_tokens} must hold for a prompt of {longest} tokens and "
                    f"--new-tokens {self.new_tokens}, but got {self.context}",
                )
            prompts = [lengthened(problem, model.config, tokenizer, room) for problem in problems]
        said = [self.simulated, RANDOM_WEIGHTS if self.random else None]
        simulated = "; ".join(part for part in said if part) or None
        return LocalRunner(
            model,
            identify(model, name, self.command, simulated=simulated),
            prompts,
            batch=self.batch,
            max_new_tokens=self.new_tokens,
            repeats=self.repeats,
            problems=problems,
            tokenizer=tokenizer,
            tilings=self.tilings,
        )

    @property
    def _dtype(self) -> DType:
        return self.dtype or ("float32" if self.device == "cpu" else "bfloat16")


def load(path_or_name: str, *, device: str = "cpu", dtype: DType = "float32") -> Tuned:
    """Load a checkpoint to tune. A path is known by its folder's name."""
    from runtime.checkpoint import find_checkpoint, load_model
    from runtime.tokenizer import load_tokenizer

    folder = find_checkpoint(path_or_name)
    return Tuned(folder.resolve().name, load_model(path_or_name, device=device, dtype=dtype), load_tokenizer(folder))


def config_file(model: str, *, built_in: bool = False) -> Path:
    """The config.json of a checkpoint's folder, or of a bundled one by name; built_in: or of a model that has no
    weights here. No torch is needed to find it. UserError lists the known names."""
    if (Path(model) / "config.json").is_file():
        return Path(model) / "config.json"
    require(not Path(model).is_dir(), f"{model} holds no config.json, so it is no checkpoint")
    root = importlib.resources.files
    found = {p.parent.name: p for p in Path(str(root("runtime") / "checkpoints")).glob("*/config.json")}
    if built_in:
        others = Path(str(root("perfmodel") / "models")).glob("zaya*.json")  # the family that runs here
        found = {p.stem: p for p in others} | found
    if model not in found:
        raise known("model", model, found)
    return found[model]


def _random_config(model: str) -> tuple[str, ModelConfig]:
    """A model's name and config, with a mask token, and without an end token: nothing random shall stop early."""
    path = config_file(model, built_in=True)
    config = model_config_from_json(path)
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    mask = config.vocab_size - 1 if config.mask_token_id is None else config.mask_token_id
    return name, replace(config, mask_token_id=mask, eos_token_id=None)


def _random(config: ModelConfig, device: str, dtype: DType) -> Zaya:
    from runtime.checkpoint import random_model
    from runtime.engines import use_engine

    return use_engine(random_model(config, device=device, dtype=dtype).freeze())


def mixed_problems(count: int, seed: int = 0) -> list[Problem]:
    """`count` held-out problems, the families in turn: the same ones always, so that studies compare."""
    each = -(-count // len(FAMILIES))
    columns = [evaluation_problems(family, each, seed) for family in sorted(FAMILIES)]
    return [column[i] for i in range(each) for column in columns][:count]


def lengthened(problem: Problem, config: ModelConfig, tokenizer: Tokenizer, room: int | None) -> list[int]:
    """A problem's prompt, behind as many solved ones of its family as fit into `room` tokens (None: none).

    Whole problems only, as the model has learnt them, so that up to a problem's length of the room is left.
    """
    first = [] if config.bos_token_id is None else [config.bos_token_id]
    prompt = [*first, *tokenizer.encode(problem.prompt)]
    if room is None:
        return prompt
    solved = 1 + room // max(1, len(prompt) + len(tokenizer.encode(problem.solution)) + 1)
    before: list[int] = []
    for earlier in evaluation_problems(problem.family, solved + _EARLIER, seed=1):
        if earlier.prompt == problem.prompt:
            continue
        text = [*first, *tokenizer.encode(earlier.prompt + earlier.solution), *config.stop_token_ids[:1]]
        if len(before) + len(text) + len(prompt) <= room:
            before += text
    return [*before, *prompt]


def tune_local(
    work: Work,
    url: str,
    hardware: HardwareProfile | None,
    plan: Plan,
    *,
    engine: EngineProfile | str | None = None,
    command: str = "",
    simulated: str | None = None,
    isolated: bool = True,
    worker: str = "",
    on_open: Callable[[Described], None] = lambda described: None,
    on_trial: OnTrial | None = None,
    on_compare: Callable[[float], None] = lambda share: None,
) -> StudyResult:
    """Search the settings of one bucket of batch and context, and decide (see `autotune.study.tune`).

    hardware: the profile of the device that does the work, for the predictions alone; None: the one that ships for a
    GPU of its name. simulated: what is not real about the model beside what `work` knows itself.
    isolated: the model lives in a child process; off, in this one, which a crash then ends. on_open: called with what
    is worked on, once it is known.
    """
    from autotune.study import tune

    kind = "cpu" if work.device == "cpu" else "gpu"
    require(
        hardware is None or hardware.kind == kind,
        f"{work.device} is a {kind}, but {hardware.name if hardware else ''} is the profile of another kind of device",
    )
    work = replace(work, command=command, simulated=simulated)
    runner, described = _opened(work, plan.trial_seconds, isolated)
    try:
        on_open(described)
        subject, default = searched(work, described, plan)
        return tune(
            url,
            subject,
            runner,
            default=default,
            predict=predictor(described, hardware, engine),
            trials=plan.trials,
            seconds=plan.seconds,
            max_divergence=plan.max_divergence,
            rounds=plan.rounds,
            seed=plan.seed,
            command=command,
            worker=worker,
            on_trial=on_trial,
            on_compare=on_compare,
        )
    finally:
        runner.close()


def searched(work: Work, described: Described, plan: Plan) -> tuple[Subject, Candidate]:
    """What a bucket's search is about: the subject of its study, and the default setting."""
    identity = described.identity
    cores = core_count() if work.device == "cpu" else None
    space = decoding_space(
        batch=work.batch,
        cores=cores,
        drafts=described.config.mask_token_id is not None,
        lossless=plan.lossless,
        histogram=plan.histogram,
        engine=described.engine,
    )
    subject = Subject(
        model=identity.model,
        model_hash=identity.model_hash,
        device=identity.device,
        workload=described.workload,
        prompts=described.prompts,
        space=space,
        simulated=identity.simulated,
        context=work.context,
        tilings=_digest(work.tilings) if work.tilings else None,
    )
    return subject, default_candidate(space, None if cores is None else min(described.threads, cores))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:12]


def predictor(
    described: Described, hardware: HardwareProfile | None, engine: EngineProfile | str | None = None
) -> Predictor:
    """What predicts its settings. hardware: None takes the profile that ships for a GPU of its name."""
    profile = hardware or shipped_profile(str(described.identity.device["device"]))
    spec = spec_from_config(described.config, described.identity.model)
    return Predictor(spec, profile, described.workload, engine)


def _opened(work: Work, seconds: float, isolated: bool) -> tuple[Runner, Described]:
    """The runner, and what it works on."""
    if not isolated:
        runner = work()
        return runner, runner.describe()
    child = Child(work, seconds, LOAD_SECONDS)
    try:
        return Isolated(child), child.call("describe")
    except StageFailure as failure:
        child.close()
        raise UserError(f"{work.model} cannot be tried here: {failure.reason}") from failure
    except BaseException:
        child.close()
        raise


def shipped_profile(device: str) -> HardwareProfile:
    """The profile that ships for a device of this name, all words of its own being in it. UserError for none."""
    words = set(re.findall(r"[a-z0-9]+", device.lower()))
    fitting = [name for name in list_profiles() if set(name.split("-")) <= words]
    if not fitting:
        raise UserError(
            f"no profile ships for {device}: name one, with --hardware; known: {', '.join(list_profiles())}"
        )
    return load_profile(max(fitting, key=len))


def probed_profile(path: Path) -> HardwareProfile | None:
    """The profile at `path` if it was probed on this machine."""
    profile = load_profile(path) if path.is_file() else None
    here = profile is not None and fingerprint_key(profile.fingerprint) == fingerprint_key(fingerprint(cpu_model()))
    return profile if here else None


def machine_profile(path: Path, progress: Callable[[str, float], None]) -> HardwareProfile:
    """This machine's profile for predictions: that at `path` if it was probed here, else a quick probe, kept there."""
    profile = probed_profile(path)
    if profile is None:
        profile = probe("cpu", quick=True, progress=progress)
        save_profile(profile, path)
    return profile
