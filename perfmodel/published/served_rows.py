"""Rows of served models: tokens per second and times per token -> typed points."""

from __future__ import annotations

import re
from typing import Literal

from perfmodel.precision import Precision
from perfmodel.published.names import Catalog, Unclear, require_vendor, runtime, served_precision
from perfmodel.published.points import TIMES, ServedPoint, Unit
from perfmodel.published.rows import Row, number

METRICS = {  # -> the point's metric
    "mean_tpot": "per_token",
    "mean_itl": "per_token",
    "median_itl": "between_tokens",
    "decode_tokens_per_s": "per_token",
    "decode_tokens_per_s_per_user": "per_token",
    "output_tokens_per_s_total": "total",
    "output_tokens_per_s_per_gpu": "total",
    "decode_tokens_per_gpu_per_s": "total",
}
_DIFFUSION = ("llada", "llada2_moe", "dream", "sdar", "sdar_moe")
_AUTOREGRESSIVE = r"AR|\(AR\)|autoregressive"
_NOT_SERVING = ("ideal-graph", "ridgepoint-cpu", "ridgepoint-eager", "zyphra-vllm")
_SPECULATIVE = re.compile(
    r"EAGLE|\bMTP\b|DFlash|speculative|\bn-?gram\b|\bMedusa\b|\bdraft(ing|s|er)?\b(?! (copy|of)\b)", re.IGNORECASE
)
# What a served row's notes may say that changes the setting which its other cells state.
_CHANGES = {
    r"\beager\b|no (CUDA|HIP) graphs?": "without graphs the engine's host costs are others",
    r"\bdisagg": "prefills ran on other devices",
    r"\b[DP]P ?=?([2-9]|\d\d)": "data or pipeline parallelism is not modelled",
    r"= (the )?rate\b|request rate": "requests came at a rate, so that the batch is not what ran together",
    r"prefix cach|\bLoRA\b|offload": "it changes what a forward reads",
}

_LENGTH = r"~?(\d+(?:\.\d+)?)([kK]?)"


def _lengths(row: Row) -> tuple[float | None, float, str]:
    """Prompt and generated tokens, and the data set; the prompt is None where the data set alone is named.

    "ISL/OSL 1024/1024", "1024/1024", "10K/1K", "ISL 128, OSL 4096", "~20k in / 2k out", "5-token prompt, ~200 new".
    "random 1000/1000" is not read: of SGLang's benchmark those are the longest lengths, and of vLLM's all of them.
    """
    shape = row.cells["context_or_shape"]
    actual = re.search(r"mean in/out actually (\d+)/(\d+) tok", row.cells["notes"])
    if actual:
        return float(actual[1]), float(actual[2]), ""
    for pattern in (
        rf"(?:ISL/OSL )?{_LENGTH} ?/ ?{_LENGTH}",
        rf"ISL[ =]{_LENGTH}(?:,| /|) OSL[ =]{_LENGTH}",
        rf"{_LENGTH} in(?:,| /) {_LENGTH} out",
        rf"{_LENGTH}-token prompt, {_LENGTH} new",
    ):
        found = re.fullmatch(pattern, shape)
        if found:
            prompt, generated = (
                float(size) * (1000 if thousands else 1) for size, thousands in (found.groups()[:2], found.groups()[2:])
            )
            if prompt < 1 or generated < 1:
                raise Unclear(f"prompt and generated tokens must be >= 1: {shape!r}")
            return prompt, generated, ""
    named = re.fullmatch(r"([\w-]+), mean output (\d+) tok", shape)
    if named and int(named[2]) >= 1:
        return None, float(named[2]), named[1]
    raise Unclear(f"prompt and generated tokens are not both stated: {shape!r}")


def point(row: Row, names: Catalog) -> ServedPoint:
    """The row as a point; Unclear says what is not stated."""
    cells = row.cells
    words = cells["model_or_op"].split()
    said = f"{cells['model_or_op']} {cells['engine']} {cells['notes']}"
    if _SPECULATIVE.search(said) and "no spec" not in said:
        raise Unclear("a draft model's speculation is not modelled")
    hardware, devices = names.device(cells["hardware"])
    if not words:
        raise Unclear("the model is not stated")
    more = [w for w in words[1:] if not re.fullmatch(rf"TP\d+|EP\d+|TP\d+EP\d+|ROCM_AITER_\w+|{_AUTOREGRESSIVE}", w)]
    if more:
        raise Unclear(f"what {' '.join(more)!r} changes about {words[0]} is not known")
    model = names.model(words[0])
    diffusion = model.architecture.lower() in _DIFFUSION or "diffusion" in words[0].lower()
    if diffusion and not any(re.fullmatch(_AUTOREGRESSIVE, word) for word in words):
        raise Unclear(f"{words[0]} decodes by diffusion: how many forwards fill a block is not stated")
    split = [w for w in words[1:] if re.match(r"[TE]P\d", w)]
    ran = runtime(" ".join([cells["engine"], *split]))
    if ran.engine in _NOT_SERVING or (ran.engine == "gpt-fast" and number(cells["batch"]) != 1):
        raise Unclear(f"no figure is known of a server of {ran.engine} with batch {cells['batch'] or 'not stated'}")
    require_vendor(hardware, f"{cells['model_or_op']} {cells['engine']}")
    if ran.engine == "tensorrt-llm":
        require_vendor(hardware, ran.engine)
    precision, cache_stated = served_precision(cells["dtype"], model, ran.engine)
    if words[0].lower().endswith("-fp8") and precision.weights != "fp8":
        raise Unclear(f"{words[0]} is stored in fp8, but the precision is {cells['dtype']!r}")
    _require_no_change(cells["notes"], precision, cells["dtype"])
    tensor, expert = ran.tensor or 1, ran.expert or 1
    if ran.tensor is None and ran.expert is None and devices > 1:
        raise Unclear(f"how {devices} devices share the model (TP, EP) is not stated")
    # Ranks of experts are those of tensor parallelism, or each holds the attention of its own sequences.
    if devices not in (tensor, expert) or devices % tensor or tensor * (devices // tensor) < expert:
        raise Unclear(f"TP {tensor} and EP {expert} do not use {devices} devices")
    if expert > 1 and not model.num_experts:
        raise Unclear(f"expert parallelism of a model without experts ({model.name})")
    batch = number(cells["batch"])
    if batch is None or batch < 1:
        raise Unclear(
            f"the batch must be one number >= 1, but is {cells['batch']!r}"
            if cells["batch"]
            else "the batch is not stated"
        )
    prompt, generated, workload = _lengths(row)
    metric = METRICS[cells["metric"]]
    return ServedPoint(
        row.id, row.source, row.series, _served_operator(metric, bool(model.num_experts)), ran.engine, hardware,
        _served_unit(row, devices, batch), row.known_value, model, precision, cache_stated, batch, prompt, generated,
        workload, devices, tensor, expert, metric,  # type: ignore[arg-type]  # a value of METRICS
    )  # fmt: skip


def _require_no_change(notes: str, precision: Precision, label: str) -> None:
    """Unclear where notes say something that changes the setting, which no other cell says."""
    for change, why in _CHANGES.items():
        said_so = re.search(change, notes, re.IGNORECASE)
        if said_so:
            raise Unclear(f"the notes say {said_so[0]!r}: {why}")
    if re.search(r"\bfp8[ _-](KV|kv_cache)", notes, re.IGNORECASE) and precision.cache != "fp8":
        raise Unclear(f"the notes say that the KV cache is fp8, but the precision is {label!r}")


def _served_operator(metric: str, experts: bool) -> str:
    return f"served {'throughput' if metric == 'total' else 'TPOT'} {'MoE' if experts else 'dense'}"


def _served_unit(row: Row, devices: int, batch: float) -> Unit:
    """The unit of a served row. A rate of one user is one over the time per token; of all, one over the time between
    any two tokens; of a GPU, that over the devices.
    """
    metric, unit = row.cells["metric"], row.unit
    if metric in ("mean_tpot", "mean_itl", "median_itl"):
        if unit not in TIMES:
            raise Unclear(f"metric {metric} must be in {', '.join(TIMES)}, but its unit is {unit!r}")
        return Unit(unit, TIMES[unit])
    expected: dict[str, Literal["tok/s", "tok/s/user", "tok/s/GPU"]] = {
        "decode_tokens_per_s": "tok/s",
        "decode_tokens_per_s_per_user": "tok/s/user",
        "output_tokens_per_s_total": "tok/s",
        "output_tokens_per_s_per_gpu": "tok/s/GPU",
        "decode_tokens_per_gpu_per_s": "tok/s/GPU",
    }
    if unit != expected[metric]:
        raise Unclear(f"metric {metric} must be in {expected[metric]}, but its unit is {unit!r}")
    if metric == "decode_tokens_per_s" and batch != 1:
        raise Unclear("whether the tokens per second are of one sequence or of the whole batch is not stated")
    return Unit(unit, 1.0, 1.0 / devices if unit == "tok/s/GPU" else 1.0)
