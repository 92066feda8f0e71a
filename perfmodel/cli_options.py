"""The options that this package's commands share, and what they stand for. Torch-free, like the commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hardware.files import UserError
from hardware.profile import HardwareProfile
from perfmodel.sizes import require_sizes
from runtime.config import SAMPLER_NAMES, DecodingConfig, replace, require

if TYPE_CHECKING:
    from perfmodel.contenders import Acceptance
    from perfmodel.decoding import Setting
    from perfmodel.precision import Precision

SAMPLERS = f"{', '.join(SAMPLER_NAMES[:-1])} or {SAMPLER_NAMES[-1]}"
Model = Annotated[str, typer.Option(help="A known model, or a checkpoint's folder or config.json.")]
Hardware = Annotated[str, typer.Option(help="A known device, or a profile's YAML file.")]
Devices = Annotated[str, typer.Option("--hardware", help="Known devices or YAML files, with commas.")]
Batch = Annotated[int, typer.Option(help="Sequences decoded at once.")]
Context = Annotated[int, typer.Option(help="Cached tokens per sequence.")]
Batches = Annotated[str, typer.Option(help="Sequences decoded at once: numbers with commas.")]
Contexts = Annotated[str, typer.Option(help="Cached tokens per sequence: numbers with commas.")]
Sampler = Annotated[str, typer.Option(help=f"{SAMPLERS}.")]
Samplers = Annotated[str, typer.Option("--sampler", help=f"One or several with commas: {SAMPLERS}.")]
DraftTokens = Annotated[int, typer.Option(help="Drafts per step, K.")]
DraftTokensAxis = Annotated[str, typer.Option(help="Drafts per step, K: numbers with commas.")]
Levels = Annotated[
    str | None, typer.Option(help="dense, or single_forward's levels as ascending numbers with commas, 0 first.")
]
LevelSets = Annotated[
    list[str] | None, typer.Option("--levels", help="As for predict; give it several times to compare level sets.")
]
Steps = Annotated[int | None, typer.Option(help="Most forwards that fill a denoising block (default 1).")]
Threshold = Annotated[
    float | None, typer.Option(help="Probability from which denoising decides a token early; see --steps-per-block.")
]
Fillings = Annotated[
    float | None, typer.Option(help="Mean forwards that fill a denoising block, as measured (default: the most).")
]
Verify = Annotated[bool, typer.Option("--verify", help="A verification follows denoising.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Length = Annotated[float | None, typer.Option(help="Tokens committed per step, the verifier's own included.")]
Rate = Annotated[
    str | None, typer.Option(help="Probability that a draft is accepted if all before it were: one, or one per draft.")
]
Histogram = Annotated[str | None, typer.Option(help="Steps that accepted 0, 1, 2... drafts, as numbers with commas.")]
KnownAcceptance = Annotated[
    str | None, typer.Option("--acceptance", help="A known acceptance by name: aime25-on, aime25-off, zaya-nano-t1...")
]
DType = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on a CPU).")
]
Weights = Annotated[
    str | None,
    typer.Option(help="What linear layers and experts are stored in, where not --dtype: fp8, mxfp4..."),
]
ExpertWeights = Annotated[str | None, typer.Option(help="What experts are stored in, where not --weights.")]
Activations = Annotated[
    str | None, typer.Option(help="What meets the weights in matmuls (default: fp8 for fp8 weights, else --dtype).")
]
CacheDType = Annotated[
    str | None, typer.Option("--cache-dtype", help="What keys and values are stored in, where not --dtype: fp8...")
]
TensorParallel = Annotated[int, typer.Option(help="Devices of one node that share every layer's matrices.")]
ExpertParallel = Annotated[int, typer.Option(help="Devices of one node that the experts are dealt out to.")]
Coverage = Annotated[
    str | None,
    typer.Option(
        help="uniform, uniform(SKIP_SHARE), correlated(RHO), zipf(EXPONENT), all, min or measured:FILE.json "
        "(default: the engine's)."
    ),
]
Engine = Annotated[
    str | None, typer.Option(help="A known engine, or its YAML file (default: ours for the kind of device).")
]


def numbers(option: str, text: str, kind: type[Any]) -> list[Any]:
    """The values of an axis or a histogram. UserError for what is no list of numbers."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--{option} must be numbers with commas between them, but is {text!r}") from error
    if kind is int:
        require_sizes(**{option: found})
    return found


def names(option: str, text: str) -> list[str]:
    """Names with commas between them, each once."""
    found = [part.strip() for part in text.split(",")]
    require(all(found), f"--{option} must be names with commas between them, but is {text!r}")
    return list(dict.fromkeys(found))


def levels_of(text: str | None) -> tuple[int, ...] | None:
    """Proposal levels; None: all of them."""
    return None if text in (None, "dense") else tuple(numbers("levels", text or "", int))


def acceptance_of(
    length: float | None, rate: str | None, histogram: str | None, known_name: str | None = None
) -> Acceptance:
    """Whatever form acceptance was given in."""
    from perfmodel.contenders import Acceptance
    from perfmodel.known_acceptance import load_acceptance

    return Acceptance(
        length,
        None if rate is None else tuple(numbers("acceptance-rate", rate, float)),
        None if histogram is None else tuple(numbers("acceptance-histogram", histogram, float)),
        None if known_name is None else load_acceptance(known_name),
    )


def decoding_of(
    sampler: str,
    draft_tokens: int,
    levels: Sequence[str] | None,
    steps: int | None,
    threshold: float | None,
    steps_per_block: float | None,
    verify: bool,
    **others: float,
) -> DecodingConfig:
    """The settings that the options stand for, with the first of the level sets. UserError for an unfit combination."""
    require(
        steps_per_block is None or threshold is not None,
        "--steps-per-block is what a confidence threshold leaves of the steps: give --threshold too",
    )
    given: dict[str, Any] = {
        "proposal_levels": levels_of(levels[0]) if levels else None,
        "denoising_steps": steps,
        "confidence_threshold": threshold,
        "verify": verify or None,
    }
    require_sizes(draft_tokens=draft_tokens, steps=steps or 1)
    chosen = {name: value for name, value in given.items() if value is not None}
    decoding = DecodingConfig(sampler, draft_tokens, **chosen, **others)  # type: ignore[arg-type]  # it checks names
    require(not levels or sampler == "single_forward", f"--levels are single_forward's, but --sampler is {sampler}")
    return decoding


def decodings_of(
    samplers: Sequence[str],
    draft_tokens: int,
    levels: Sequence[str] | None,
    steps: int | None,
    threshold: float | None,
    steps_per_block: float | None,
    verify: bool,
) -> list[DecodingConfig]:
    """One setting a sampler, each with its own options. UserError for an option that none of them takes."""
    if len(samplers) == 1:
        return [decoding_of(samplers[0], draft_tokens, levels, steps, threshold, steps_per_block, verify)]
    for given, option, owner in (
        (levels, "--levels", "single_forward"),
        (steps, "--steps", "denoising"),
        (threshold, "--threshold", "denoising"),
        (verify, "--verify", "denoising"),
    ):
        require(not given or owner in samplers, f"{option} is an option of {owner}, but --sampler is {samplers}")
    found = []
    for sampler in samplers:
        own = sampler == "denoising"
        blocks = (steps, threshold, steps_per_block, verify) if own else (None, None, None, False)
        found.append(decoding_of(sampler, draft_tokens, levels if sampler == "single_forward" else None, *blocks))
    return found


def dtype_of(dtype: str | None, device: HardwareProfile) -> str:
    """The given one, or the usual one of the kind of device."""
    return dtype or ("bfloat16" if device.kind == "gpu" else "float32")


def precision_of(
    model: str,
    dtype: str | None,
    device: HardwareProfile,
    weights: str | None = None,
    expert_weights: str | None = None,
    activations: str | None = None,
    cache: str | None = None,
) -> Precision:
    """What a model is served in. LM head, norms and all that no option names stay in the dtype.

    Where neither a dtype nor weights are given, a GPU serves a quantised model as it was published. UserError for
    experts of a model that has none.
    """
    from perfmodel.model_spec import load_spec
    from perfmodel.precision import quantised, uniform

    usual, spec = dtype_of(dtype, device), load_spec(model)
    require(
        expert_weights is None or spec.num_experts > 0,
        f"--expert-weights {expert_weights} is for models with experts, but {spec.name} has none",
    )
    if dtype is None and weights is None and spec.quantisation and device.kind == "gpu" and not device.measured:
        own = spec.published_precision
        weights, expert_weights, cache = own.weights, expert_weights or own.experts, cache or own.cache
    if (weights, expert_weights, activations, cache) == (None, None, None, None):
        return uniform(usual)
    require(
        usual == "bfloat16",
        f"narrower weights and caches are known beside bfloat16, but the dtype on {device.name} is {usual}",
    )
    return quantised(weights or usual, experts=expert_weights, cache=cache or usual, activations=activations)


def setting_of(
    model: str,
    device: HardwareProfile,
    precision: Precision,
    coverage: str | None,
    engine: str | None,
    tensor_parallel: int,
    expert_parallel: int,
) -> Setting:
    """Model and engine by their names, on a device or several of it."""
    from perfmodel.decoding import setting
    from perfmodel.model_spec import load_spec
    from perfmodel.parallel import Parallel

    parallel = Parallel(tensor_parallel, expert_parallel)
    return setting(load_spec(model), device, precision, expert_coverage=coverage, engine=engine, parallel=parallel)


@dataclass(frozen=True)
class Job:
    """A sampler (with one level set) over an axis of K: what one grid of a sweep holds."""

    decoding: DecodingConfig
    draft_tokens: tuple[int, ...]
    acceptance_lengths: tuple[float, ...]  # per K


def settings_of(
    decodings: Sequence[DecodingConfig],
    levels: Sequence[str] | None,
    draft_tokens: Sequence[int],
    acceptance: Acceptance,
) -> list[Job]:
    """The grids of a sweep: one for each sampler, and of single_forward one for each level set.

    Autoregressive decoding drafts nothing, so that it takes part once. UserError for acceptance that no sampler takes.
    """
    from perfmodel.acceptance import judged

    if not any(map(judged, decodings)):
        acceptance.checked(decodings[0])  # refuses it
    jobs = []
    for decoding in decodings:
        sets = [levels_of(text) for text in levels or ()] if decoding.sampler == "single_forward" else []
        drafts = tuple(draft_tokens) if decoding.drafts else (draft_tokens[0],)
        for chosen in [replace(decoding, proposal_levels=s) for s in dict.fromkeys(sets)] or [decoding]:
            lengths = tuple(acceptance.tokens(replace(chosen, draft_tokens=k)) for k in drafts)
            jobs.append(Job(chosen, drafts, lengths))
    return jobs
