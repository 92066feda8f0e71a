"""Numbers and answers in words, the same in the report, on the page and on the terminal. Torch-free."""

from __future__ import annotations

from perfmodel.engine import EngineProfile
from perfmodel.known_acceptance import KnownAcceptance
from perfmodel.prediction import Prediction
from runtime.config import DecodingConfig, Sampler

_PREFIXES = (
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "µ"),
    (1e-9, "n"),
)


def quantity(value: float, unit: str) -> str:
    """A value in base SI units with three digits and a prefix: `quantity(0.0124, "s")` is "12.4 ms"."""
    size = abs(value)
    factor, prefix = next(((f, p) for f, p in _PREFIXES if size >= 0.9995 * f), _PREFIXES[-1] if value else (1.0, ""))
    scaled = f"{value / factor:.3g}"
    return f"{scaled if 'e' not in scaled else f'{value / factor:.0f}'} {prefix}{unit}".rstrip()


def rate(tokens_per_second: float) -> str:
    """Tokens per second with thousands separated, one decimal below 100."""
    digits = 1 if tokens_per_second < 100 else 0
    return f"{tokens_per_second:,.{digits}f} tokens/s"


def percent(share: float) -> str:
    """A share as a percentage: one decimal below 10%."""
    value = 100 * share
    return f"{value:.1f}%" if abs(value) < 9.95 else f"{value:.0f}%"


def break_even_length(prediction: Prediction) -> float:
    """Tokens a step must commit to be as fast as autoregressive decoding: its cost in autoregressive steps."""
    return prediction.step_seconds / prediction.autoregressive_step_seconds


def forwards(prediction: Prediction) -> str:
    """How many forwards a step makes, and of how many slots: "two forwards of 17 slots"."""
    times: dict[int, float] = {}
    for forward in prediction.forwards:
        times[forward.slots] = times.get(forward.slots, 0.0) + forward.times
    counts = {1.0: "one forward", 2.0: "two forwards"}
    return " and ".join(f"{counts.get(n, f'{n:.3g} forwards')} of {slots} slots" for slots, n in times.items())


def verdict(prediction: Prediction) -> str:
    """Does drafting pay at this operating point, in one sentence with the numbers it follows from."""
    where = f"On {prediction.hardware} at batch {prediction.workload.batch} and context {prediction.context}"
    if not prediction.decoding.drafts:
        return (
            f"{where}, autoregressive decoding takes {quantity(prediction.step_seconds, 's')} a step and gives "
            f"{rate(prediction.tokens_per_second)}."
        )
    cost, pays = break_even_length(prediction), prediction.speedup_over_autoregressive > 1
    return (
        f"{where}, drafting {'pays' if pays else 'does not pay'}: {prediction.speedup_over_autoregressive:.2f}x. "
        f"A {prediction.decoding.sampler} step costs {cost:.2f} autoregressive steps, so it breaks even at {cost:.2f} "
        f"tokens a step; here a step commits {prediction.acceptance_length:.2f}."
    )


def step_words(prediction: Prediction) -> str:
    """A step's estimated time, and between which times measured ones are meant to lie."""
    step = f"A step is estimated at {quantity(prediction.step_seconds, 's')}"
    between = prediction.step_seconds_interval
    if between is None:
        return f"{step}; how far measured steps lie from that is not known for the engine {prediction.engine}."
    low, high = (quantity(seconds, "s") for seconds in between)
    return f"{step}; 80% of measured steps are meant to lie between {low} and {high} (engine {prediction.engine})."


def engine_words(engine: EngineProfile) -> str:
    """That nobody has held an engine's own costs against measured steps; nothing for one that was fitted to some."""
    if engine.fit is not None or engine.spread is not None:
        return ""
    return (
        f"The engine {engine.name} was fitted to no measured step: the times of kernels were fitted, what it costs "
        "beside them is counted or assumed."
    )


def loss_words(decoding: DecodingConfig) -> str:
    """Why what is generated is not what autoregressive decoding gives; nothing for a lossless setting."""
    if decoding.lossless:
        return ""
    if decoding.mixing_weight == 1:
        return "Not lossless: without a verification, drafts are kept as they are."
    return (
        f"Not lossless: at w = {decoding.mixing_weight:g} drafts are judged by mixed logits. The weight changes how "
        "many are accepted, not the time of a step: the numbers hold for the acceptance given here, whatever w is."
    )


def acceptance_words(known: KnownAcceptance, sampler: Sampler, draft_tokens: int) -> str:
    """What of a known acceptance was counted for these drafts, and what is made of it: shares of steps are never."""
    if known.rates:
        return "The shares of steps follow from the rate of each position, which was counted."
    counted = sorted(known.lengths[sampler])
    if draft_tokens in counted:
        length = f"The length was counted at K = {draft_tokens}"
    else:
        below, above = max(k for k in counted if k < draft_tokens), min(k for k in counted if k > draft_tokens)
        length = f"The length was not counted at K = {draft_tokens}: it lies between those at {below} and {above}"
    return f"{length}; the shares of steps are those of a distribution of that mean (discrete Weibull), not counted."
