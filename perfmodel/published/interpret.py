"""A published row -> a typed point that can be predicted, or the reason why it cannot be without guessing.

Nothing is filled in: a row whose device, precision, batch, shape, model or engine is not stated, or not known here, has
that as its status. What the units mean is written out where they are read.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from hardware.files import UserError
from perfmodel.kernels.call import Attention, Collective, FusedMoe, Gemm
from perfmodel.kernels.elementwise import Elementwise
from perfmodel.kernels.moe import loads_of
from perfmodel.published import served_rows, tidar
from perfmodel.published.names import Catalog, Unclear, cache_dtype, matmul_dtypes, require_vendor, whole
from perfmodel.published.points import TIMES, KernelFamily, KernelPoint, Point, Unit
from perfmodel.published.predict import BEYOND
from perfmodel.published.rows import Row

FLOP_RATES = {"GFLOPS": 1e9, "TFLOPS": 1e12, "PFLOPS": 1e15}
BYTE_RATES = {"MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12}

# Kind A: what a profile's figures are made of. Rows of it with other metrics are single calls of kernels.
_INPUTS = re.compile(r"^(?!(kernel_time|latency|tflops|bus_bandwidth)$)")
_NOT_A_TIME = {
    "tokens_per_forward": "an acceptance is an input of a prediction",
    "accept_length": "an acceptance is an input of a prediction",
    "speedup_vs_AR": "a ratio does not say what it divides",
    "hbm_bandwidth_fraction": "a share of a bandwidth does not say how long a step took",
    "itl_intercept_a": "a coefficient of a fit is no operating point",
    "itl_slope_b": "a coefficient of a fit is no operating point",
    "throughput_tokens_per_s_as_printed": "which tokens the throughput counts is not stated",
    "achieved_bandwidth": "which bytes the bandwidth counts is not stated",
}
_TOO_LONG = re.compile(r"\d{13}")  # more digits than any size has
_PROSE = ("id", "value", "source_url", "notes", "source", "note")
# What an operator may say beside its family without changing what is predicted; with a word more it is another kernel.
_OPERATORS: dict[KernelFamily, re.Pattern[str]] = {
    "gemm": re.compile(
        r"GEM[MV]( square| skinny| a8w8| a16w16| \(linear layer\)| \w+_proj( \([\w.-]+\))?)?|linear layer GEMM|matmul"
        r"|aten::(add)?mm GEMM \(in-model trace\)",
        re.IGNORECASE,
    ),
    "moe": re.compile(
        r"fused MoE (?P<model>\S+)( \(E\d+,N\d+\))?( TP(?P<tensor>\d+|\?))?( EP(?P<expert>\d+|\?))?( \(E=\d+,N=\d+\))?",
        re.IGNORECASE,
    ),
    "attention": re.compile(r"(paged )?decode attention( \(FlashInfer\))?", re.IGNORECASE),
    "collective": re.compile(r"([NR]CCL )?all_reduce( busbw)?", re.IGNORECASE),
    "elementwise": re.compile(r"elementwise \w+( \([\w.-]+\))?", re.IGNORECASE),
}
_NOT_MODELLED = {
    r"\bMLA\b": "attention over a latent cache (MLA) is not modelled",
    r"grouped GEMM": "a grouped GEMM on its own is not modelled, only a whole fused MoE layer",
    r"GEM[MV]|^matmul\b|\bMoE\b|attention|all_reduce": "what its other words change about the kernel is not known",
}
_MOST_ALPHA, _MOST_EXPERTS = 10.0, 4096  # beyond them drawing a routing overflows, or takes gigabytes


def interpret(row: Row, catalog: Catalog | None = None) -> Point | str:
    """The row as a point, or why it is not predicted. A catalog keeps profiles and models between rows."""
    if row.problem is not None:
        return row.problem
    names = Catalog() if catalog is None else catalog
    for column, text in row.cells.items():
        if column not in _PROSE and len(text) > 12 and _TOO_LONG.search(text):
            return f"{column} must hold sizes of at most 12 digits, but is {text!r}"
        if column not in _PROSE and not text.isascii() and any(c.isdecimal() and not c.isascii() for c in text):
            return f"{column} must hold digits from 0 to 9, but is {text!r}"
    try:
        return tidar.point(row, names) if row.table == "tidar" else _gpu(row, names)
    except Unclear as reason:
        return str(reason)
    except (ArithmeticError, MemoryError):
        return BEYOND


def _gpu(row: Row, names: Catalog) -> Point:
    kind, operator, metric = (row.cells[c] for c in ("kind", "model_or_op", "metric"))
    if kind not in ("A", "B", "C", "D"):
        raise Unclear(f"kind must be A, B, C or D, but is {kind!r}")
    if metric in _NOT_A_TIME:
        raise Unclear(f"metric {metric}: {_NOT_A_TIME[metric]}")
    if metric in served_rows.METRICS and kind in ("C", "D"):
        return served_rows.point(row, names)
    if kind == "A" and (_INPUTS.match(metric) or "matmul_max" in operator):
        raise Unclear("an input of the profile: a datasheet's or a microbenchmark's figure")
    for family, form in _OPERATORS.items():
        if form.fullmatch(operator):
            return _kernel(row, names, family)
    for word, reason in _NOT_MODELLED.items():
        if kind in ("A", "B") and re.search(word, operator, re.IGNORECASE):
            raise Unclear(f"operator {operator!r}: {reason}")
    raise Unclear(f"operator {operator!r} with metric {metric} is not modelled")


def _kernel(row: Row, names: Catalog, family: KernelFamily) -> KernelPoint:
    hardware, count = names.device(row.cells["hardware"])
    if count != 1:
        raise Unclear(f"a kernel runs on one device, but the hardware is {row.cells['hardware']!r}")
    require_vendor(hardware, f"{row.cells['engine']} {row.cells['model_or_op']}")
    call: Any
    label = row.cells["dtype"]
    work: dict[str, float] = {}
    if family == "gemm":
        call = _gemm(row)
        label = f"{call.weights}" if call.weights == call.activations else f"{call.weights} x {call.activations}"
        work["tflops"] = 2.0 * call.m * call.n * call.k
    elif family == "moe":
        call = _moe(row, names)
        label = f"{call.weights}" if call.weights == call.activations else f"{call.weights} x {call.activations}"
    elif family == "attention":
        call = _attention(row)
        label = f"{call.cache} cache"
    elif family == "collective":
        call = _collective(row)
        label = call.kind
        # What nccl-tests prints: the bytes each device must send in a ring, over the time.
        work["bus_bandwidth"] = 2.0 * (call.devices - 1) / call.devices * call.size_bytes
    else:
        call = _elementwise(row)
        label = ""
    unit = _unit(row, work)
    return KernelPoint(
        row.id, row.source, row.series, f"{family} {label}".strip(), _library(row.cells["engine"]), hardware,
         unit, row.known_value, family, call,
    )  # fmt: skip


def _library(engine: str) -> str:
    """What a kernel comes from, without its version and the name of the kernel: "vllm", "nccl"."""
    return re.sub(r"\s+v?\d[\w.]*|\s*\[.*", "", engine).lower() or "not stated"


def _unit(row: Row, work: dict[str, float]) -> Unit:
    """A kernel's unit: a time, or the rate at which its metric's work is done."""
    metric, unit = row.cells["metric"], row.unit
    if metric in ("kernel_time", "latency"):
        if unit not in TIMES:
            raise Unclear(f"metric {metric} must be in {', '.join(TIMES)}, but its unit is {unit!r}")
        return Unit(unit, TIMES[unit])
    if metric not in work:
        raise Unclear(f"metric {metric!r} of {row.cells['model_or_op']!r} is not modelled")
    rates = BYTE_RATES if metric == "bus_bandwidth" else FLOP_RATES
    if unit not in rates:
        raise Unclear(f"metric {metric} must be in {', '.join(rates)}, but its unit is {unit!r}")
    return Unit(unit, rates[unit], work[metric])


def _nothing_else(shape: str, *known: str) -> None:
    """Unclear where a shape says more than its known parts, as "window=1024"."""
    rest = shape
    for pattern in known:
        rest = re.sub(pattern, "", rest, flags=re.IGNORECASE)
    rest = rest.strip(" ,")
    if rest:
        raise Unclear(f"what {rest!r} of the shape {shape!r} changes is not known")


def _sizes(text: str) -> dict[str, int]:
    """Sizes in a shape's text by lower-case name: "M=1,N=8,K=4", "m,n,k=1,8,4" and "M=N=K=8", alone or side by side."""
    text = re.sub(r"\b(\w(?:\s*=\s*[A-Za-z])+)\s*=\s*(\d+)\b", _one_by_one, text)
    found = {name.lower(): int(size) for name, size in re.findall(r"\b([A-Za-z]\w*)\s*=\s*(\d+)\b(?!,\d)", text)}
    for names, sizes in re.findall(r"\b(\w(?:,\w)+)\s*=\s*(\d+(?:,\d+)+)", text):
        letters, values = names.lower().split(","), [int(size) for size in sizes.split(",")]
        if len(letters) == len(values):
            found |= dict(zip(letters, values, strict=True))
    return found


def _one_by_one(equal: re.Match[str]) -> str:
    """ "M=N=8" -> "M=8,N=8"."""
    return ",".join(f"{name.strip()}={equal[2]}" for name in equal[1].split("="))


def _gemm(row: Row) -> Gemm:
    weights, activations = matmul_dtypes(row.cells["dtype"])
    shape, batch = row.cells["context_or_shape"], row.cells["batch"]
    sizes = _sizes(shape)
    product = re.fullmatch(r"(\d+)x(\d+)x(\d+)( MxNxK| \(MxNxK\))?", shape)
    if product:
        m, n, k = (int(size) for size in product.groups()[:3])
        if product[4] is None and not m == n == k:
            raise Unclear(f"shape {shape!r} does not say which size is M, N and K")
        sizes = {"m": m, "n": n, "k": k}
    else:
        _nothing_else(shape, r"\b([mnk]\s*=\s*)+\d+\b(?!,\d)", r"\b[mnk](,[mnk])+\s*=\s*\d+(,\d+)+")
    if "n" not in sizes or "k" not in sizes:
        raise Unclear(f"the shape is not stated: N and K are needed, but it is {shape!r}")
    if "m" not in sizes:
        sizes["m"] = whole(batch, "M (the batch)")
    elif batch and whole(batch, "the batch") != sizes["m"]:
        raise Unclear(f"the batch is {batch}, but M is {sizes['m']}")
    if min(sizes["m"], sizes["n"], sizes["k"]) < 1:
        raise Unclear(f"M, N and K must be >= 1, but the shape is {shape!r}")
    # A loop over the same matrices keeps small ones in a cache.
    cold = "resident" not in row.cells["notes"] and row.cells["model_or_op"].lower() != "gemm square"
    quantise = "quantisation included" in row.cells["notes"] or "incl. quant" in row.cells["dtype"]
    return Gemm(sizes["m"], sizes["n"], sizes["k"], weights, activations, cold, quantise)


def _moe(row: Row, names: Catalog) -> FusedMoe:
    weights, activations = matmul_dtypes(row.cells["dtype"])
    operator, shape = row.cells["model_or_op"], row.cells["context_or_shape"]
    named = _OPERATORS["moe"].fullmatch(operator)
    assert named is not None  # else it would not have come here
    if named["expert"] not in (None, "1"):
        raise Unclear(f"one device's share of a layer whose experts are split (EP) is not modelled: {operator!r}")
    if named["tensor"] in (None, "?"):
        raise Unclear(f"over how many devices the layer is split (TP) is not stated: {operator!r}")
    _nothing_else(shape, _EXPERTS, r"\btokens\s*=\s*\d+\b", _ROUTING)
    hidden, inter, experts, top_k = _expert_sizes(row, names, named["model"])
    if experts > _MOST_EXPERTS:
        raise Unclear(f"a layer has at most {_MOST_EXPERTS} experts, but {shape!r} has {experts}")
    tensor = int(named["tensor"])
    if tensor < 1 or inter % tensor or not 1 <= top_k <= experts:
        raise Unclear(f"expert width {inter} over TP {tensor} with {top_k} of {experts} experts cannot be")
    tokens = _sizes(shape).get("tokens")
    if tokens is None:
        tokens = whole(row.cells["batch"], "the number of tokens")
    elif row.cells["batch"] and whole(row.cells["batch"], "the batch") != tokens:
        raise Unclear(f"the batch is {row.cells['batch']}, but tokens is {tokens}")
    routing = re.search(_ROUTING, f"{shape} {row.cells['notes']}")
    drawn = "benchmark_moe.py" in row.cells["notes"]  # vLLM's program: logits of the router are normal, so uniform
    if routing is None and not drawn and tokens > 1:
        raise Unclear("how tokens are routed to experts is not stated")
    if routing and routing[2] and float(routing[2]) > _MOST_ALPHA:
        raise Unclear(f"the exponent of a power law must be <= {_MOST_ALPHA:g}, but is {routing[2]}")
    try:
        distinct, imbalance = loads_of(routing[1] if routing else "uniform", tokens, experts, top_k)
    except UserError as error:
        raise Unclear(str(error)) from error
    sizes = (tokens, hidden, inter // tensor, experts, top_k, distinct)
    return FusedMoe(*sizes, weights, activations, imbalance=imbalance)


_ROUTING = r"\b(power_law_(\d+(?:\.\d+)?)|balanced|uniform)\b"
_EXPERTS = r"\bhidden (\d+), inter (\d+), E(\d+) top(\d+)\b"


def _expert_sizes(row: Row, names: Catalog, name: str) -> tuple[int, int, int, int]:
    """Hidden size, whole expert width, experts and experts per token: as stated, or of the model that is named."""
    stated = re.search(_EXPERTS, row.cells["context_or_shape"])
    if stated is not None:
        hidden, inter, experts, top_k = (int(size) for size in stated.groups())
        return hidden, inter, experts, top_k
    model = names.model(name)
    if not model.num_experts:
        raise Unclear(f"model {model.name} has no experts")
    return model.hidden_size, model.expert_size, model.num_experts, model.experts_per_token


def _attention(row: Row) -> Attention:
    shape = row.cells["context_or_shape"]
    heads = re.search(r"\bq(\d+)/kv(\d+)/hd(\d+)\b", shape)
    if heads is None:
        raise Unclear(f"the heads are not stated (as q32/kv8/hd128): {shape!r}")
    context = _sizes(shape).get("ctx")
    if not context:
        raise Unclear(f"the context is not stated (as ctx=4096): {shape!r}")
    _nothing_else(shape, r"\bq\d+/kv\d+/hd\d+\b", r"\bctx\s*=\s*\d+\b")
    query, key, size = (int(number) for number in heads.groups())
    if not (key and size) or query % key:
        raise Unclear(f"query heads must be a multiple of KV heads: {shape!r}")
    batch = whole(row.cells["batch"], "the batch")
    # Benchmarks of this kernel loop over one cache, so that a small one stays in a cache of the device.
    return Attention(batch, 1, context, query, key, size, cache_dtype(row.cells["dtype"]), cold=False)


def _collective(row: Row) -> Collective:
    shape = row.cells["context_or_shape"]
    devices = _sizes(shape).get("gpus")
    if devices is None or devices < 2:
        raise Unclear(f"how many devices take part is not stated: {shape!r}")
    exact = re.search(r"= ?(\d+) B\b", shape)
    rounded = re.search(r", (\d+(?:\.\d+)?) ?([KMG])i?B\b", shape)
    if exact:
        size = int(exact[1])
    elif rounded:  # nccl-tests and rccl-tests step through powers of two, and print them rounded
        size = 2 ** round(np.log2(float(rounded[1]) * {"K": 1024, "M": 1024**2, "G": 1024**3}[rounded[2]]))
    else:
        raise Unclear(f"how many bytes each device holds is not stated: {shape!r}")
    _nothing_else(shape, r"\bgpus\s*=\s*\d+\b", r"(\d+ elements x \d+ B )?= ?\d+ B\b", r"\d+(\.\d+)? ?[KMG]i?B\b")
    if size < 1:
        raise Unclear(f"each device must hold at least one byte: {shape!r}")
    return Collective(size, devices, custom="custom" in row.cells["engine"])


def _elementwise(row: Row) -> Elementwise:
    sizes = _sizes(row.cells["context_or_shape"])
    if "layernorm" not in row.cells["model_or_op"].lower():
        raise Unclear("how many bytes this kernel reads and writes is not stated")
    if not sizes.get("tokens") or not sizes.get("d"):
        raise Unclear(f"tokens and width are not stated: {row.cells['context_or_shape']!r}")
    matmul_dtypes(row.cells["dtype"])
    if row.cells["dtype"].lower() not in ("fp16", "bf16", "bfloat16", "16-bit"):
        raise Unclear(f"a norm of {row.cells['dtype']} is not modelled")
    return Elementwise(2.0 * 2.0 * sizes["tokens"] * sizes["d"], 1.0)  # read and written once, 2 bytes each
