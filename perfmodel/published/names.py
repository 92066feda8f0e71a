"""Names in published tables -> this project's devices, models, engines and element types. What is unclear is refused.

Every function raises Unclear with the reason where a name does not say which of several things it means.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from hardware.files import UserError
from hardware.profile import HardwareProfile, list_profiles, load_profile
from perfmodel.engine import list_engines
from perfmodel.model_names import model_for
from perfmodel.model_spec import ModelSpec, known_models, load_spec
from perfmodel.precision import Precision, quantised, uniform
from perfmodel.published.rows import MOST, number

# Other spellings of a profile's name, in any order of words; a profile's own name needs no entry.
DEVICES = {
    "h100 sxm5": "h100-sxm",
    "h100 sxm 80gb": "h100-sxm",
    "h100 sxm5 80gb": "h100-sxm",
    "h100 pcie 80gb": "h100-pcie",
    "h200 sxm": "h200",
    "h200 sxm5": "h200",
    "h200 sxm 141gb": "h200",
    "h200 sxm5 141gb": "h200",
    "b200 sxm": "b200",
    "a100 sxm 80gb": "a100-80gb-sxm",
    "a100 sxm4 80gb": "a100-80gb-sxm",
    "l40s 48gb": "l40s",
    "rtx4090": "rtx-4090",
    "rtx 4090 24gb": "rtx-4090",
    "mi300x oam": "mi300x",
    "mi300x 192gb": "mi300x",
    "mi325x 256gb": "mi325x",
    "mi355x 288gb": "mi355x",
}
_BY_WORDS = {frozenset(name.split()): profile for name, profile in DEVICES.items()}
_MAKERS = re.compile(r"(nvidia geforce|nvidia|geforce|amd instinct|amd|instinct) ")
# Names of several devices that differ in bandwidth, memory or clock.
UNCLEAR = {
    "h100": "an H100 may be SXM, PCIe or NVL",
    "h200": "an H200 may be SXM or NVL",
    "h100 80gb": "an H100 may be SXM or PCIe",
    "h200 141gb": "an H200 may be SXM or NVL",
    "a100": "an A100 may be SXM or PCIe, with 40 or 80 GB",
    "a100 sxm": "an A100 SXM may have 40 or 80 GB",
    "a100 80gb": "an A100 80GB may be SXM or PCIe",
    "b200": "a B200 may be an SXM module or half of a GB200",
    "mi350": "an MI350 may be an MI350X or an MI355X",
}
ENGINES = {"vllm": "vllm", "trtllm": "tensorrt-llm", "tensorrt-llm": "tensorrt-llm", "trt-llm": "tensorrt-llm",
           "sglang": "sglang", "gpt-fast": "gpt-fast"}  # fmt: skip
# What an engine's column may say besides its name, version, TP and EP without changing what is predicted.
_ENGINE_NOTES = re.compile(
    r"\(ML\.ENERGY v\d+\)|\bv?\d+(\.\w+)+\b\+?|\bgpt-oss-dev\b|\bFA\d\b|\bROCM_AITER_\w+|\bROCm\b|\b[DP]P1\b"
)
_MADE_FOR = {  # software that runs on the devices of one vendor alone
    "NVIDIA": re.compile(r"\bnccl|\btrt-?llm|\btensorrt|cublas|\bcutlass|deepgemm|flashmla", re.IGNORECASE),
    "AMD": re.compile(r"\brccl|hipblas|\baiter\b|rocm|wvsplitk", re.IGNORECASE),
}


class Unclear(Exception):
    """Why a row cannot be predicted without guessing; becomes its status."""


def whole(text: str, what: str) -> int:
    """A whole number from 1 to MOST ("16" or "16.0"); Unclear names what it should have been."""
    value = number(text)
    if value is None or not 1 <= value <= MOST or value != int(value):
        raise Unclear(f"{what} must be one whole number >= 1, but is {text!r}" if text else f"{what} is not stated")
    return int(value)


def require_vendor(hardware: HardwareProfile, software: str) -> None:
    """Unclear where the software's name says that it is made for devices of another vendor."""
    for vendor, made_for in _MADE_FOR.items():
        found = made_for.search(software)
        if found and hardware.vendor != vendor:
            raise Unclear(f"{found[0]} runs on devices of {vendor} alone, but {hardware.name} is of {hardware.vendor}")


def plain_name(text: str) -> str:
    """Lower case, with single spaces where there are spaces, dashes or underscores."""
    return " ".join(re.split(r"[\s_-]+", text.strip().lower()))


@dataclass
class Catalog:
    """Profiles and models by their published names, each read once. paths: a name may be that of a file to be read."""

    paths: bool = True
    _profiles: dict[str, HardwareProfile] = field(default_factory=dict)
    _specs: dict[str, ModelSpec] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=lambda: {plain_name(n): n for n in list_profiles()})
    _models: frozenset[str] = field(default_factory=lambda: frozenset(known_models()))

    def device(self, text: str) -> tuple[HardwareProfile, int]:
        """A device and how many of it: "2xH200 SXM", a profile's own name, or the path of one's YAML file."""
        if text in self._names.values():
            return self._profile(text), 1
        counted = re.fullmatch(r"(?s:(?:(\d+)\s*x\s*)?(.*))", text)
        assert counted is not None  # the pattern takes any text
        count, name = int(counted[1] or 1), plain_name(counted[2])
        if not name:
            raise Unclear("the hardware is not stated")
        if count < 1:
            raise Unclear(f"{text!r} are no devices")
        if self.paths and name.endswith((".yaml", ".yml")):
            return self._profile(counted[2].strip()), count
        short = _MAKERS.sub("", name, count=1) if _MAKERS.match(name) else name
        if short in UNCLEAR:
            raise Unclear(f"hardware {text!r} is not one device: {UNCLEAR[short]}")
        profile = self._names.get(name) or self._names.get(short) or _BY_WORDS.get(frozenset(short.split()))
        if profile is None and re.search(r"\b(presumably|not stated|not shown|class|series|any)\b|/", name):
            raise Unclear(f"hardware {text!r} is not stated for certain")
        if profile is None and "(" in name:
            raise Unclear(f"hardware {text!r} is a variant that has no profile")
        if profile is None or profile not in self._names.values():
            raise Unclear(f"hardware {text!r} has no profile; known: {', '.join(sorted(self._names.values()))}")
        return self._profile(profile), count

    def _profile(self, name: str) -> HardwareProfile:
        if name not in self._profiles:
            try:
                self._profiles[name] = load_profile(name)
            except UserError as error:
                raise Unclear(str(error)) from error
        return self._profiles[name]

    def model(self, text: str) -> ModelSpec:
        """A built-in model, another name of one, or the path of a config.json or of a folder with one."""
        name = model_for(text) or text
        if name not in self._models and not (self.paths and name.endswith((".json", "/"))):
            raise Unclear(f"model {text!r} is not known")
        if name not in self._specs:
            try:
                self._specs[name] = load_spec(name)
            except (UserError, RuntimeError, ValueError) as error:  # the latter two: no home folder, no such path
                raise Unclear(str(error)) from error
        return self._specs[name]


@dataclass(frozen=True)
class Runtime:
    """An engine and how it splits a model, where that is said."""

    engine: str
    tensor: int | None
    expert: int | None


def runtime(text: str) -> Runtime:
    """What a column says: "vLLM 0.12.0 TP2", "SGLang 0.5.13.post1 TP4EP4", or the name of an engine."""
    if not text:
        raise Unclear("the engine is not stated")
    found = {key: int(size) for key, size in re.findall(r"(TP|EP)(\d+)(?=\b|EP)", text)}
    if 0 in found.values():
        raise Unclear(f"engine {text!r} splits a model over no device")
    rest = re.sub(r"\bTP\d+(EP\d+)?\b|\bEP\d+\b", " ", text)
    if rest.strip() in list_engines():
        return Runtime(rest.strip(), found.get("TP"), found.get("EP"))
    words = _ENGINE_NOTES.sub(" ", rest).split()
    engine = ENGINES.get(words[0].lower()) if words else None
    if engine == "vllm" and words[1:] == ["V1"]:  # its only core since 0.11
        words.pop()
    if engine is None or engine not in list_engines():
        raise Unclear(f"engine {text!r} has no profile; known: {', '.join(sorted(list_engines()))}")
    if len(words) > 1:
        raise Unclear(f"engine {text!r} is a variant that has no profile: {' '.join(words[1:])}")
    return Runtime(engine, found.get("TP"), found.get("EP"))


_UNSURE = re.compile(r"recipe|blank|presum|default|not stated|unknown", re.IGNORECASE)
_MATMUL: dict[str, tuple[str, str]] = {  # label -> weights, activations
    "fp32": ("float32", "float32"),
    "bf16": ("bfloat16", "bfloat16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "fp16": ("float16", "float16"),
    "float16": ("float16", "float16"),
    # Two bytes and one peak, whichever of the two it was.
    "16-bit": ("bfloat16", "bfloat16"),
    "bf16/fp16": ("bfloat16", "bfloat16"),
    "w16a16": ("bfloat16", "bfloat16"),
    "fp8": ("fp8", "fp8"),
    "fp8_block": ("fp8", "fp8"),
    "fp8 block": ("fp8", "fp8"),
    "fp8_w8a8": ("fp8", "fp8"),
    "fp8 no quant": ("fp8", "fp8"),
    "fp8 incl. quant": ("fp8", "fp8"),
    "fp8 1x128 act / 128x128 wt": ("fp8", "fp8"),
    "nvfp4": ("nvfp4", "nvfp4"),
    "int8_wo": ("int8", "bfloat16"),
    "w8a16": ("int8", "bfloat16"),
    "int4_wo": ("int4", "bfloat16"),
    "w4a16": ("int4", "bfloat16"),
    "w4a16_mxfp4": ("mxfp4", "bfloat16"),
}


def matmul_dtypes(label: str) -> tuple[str, str]:
    """Weights and activations of a matmul's label."""
    if not label:
        raise Unclear("the precision is not stated")
    if _UNSURE.search(label):
        raise Unclear(f"precision {label!r} is not stated for certain")
    if label.lower() not in _MATMUL:
        raise Unclear(f"precision {label!r} does not say what weights and activations are stored in")
    return _MATMUL[label.lower()]


def cache_dtype(label: str) -> str:
    """The element type of the KV cache that attention reads, from a kernel's label ("bf16", "fp8 KV")."""
    name = label.lower().removesuffix(" kv")
    if name not in _CACHES:
        raise Unclear(f"precision {label!r} does not say what the KV cache is stored in")
    return _CACHES[name]


_CACHES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "fp8": "fp8"}


def served_precision(label: str, model: ModelSpec, engine: str) -> tuple[Precision, bool]:
    """What a model is served in ("fp8", "bf16 + fp8 KV"), and whether the cache's part of it is stated."""
    if not label:
        raise Unclear("the precision is not stated")
    if _UNSURE.search(label):
        raise Unclear(f"precision {label!r} is not stated for certain")
    both = re.fullmatch(r"(\S+)(?: weights)? \+ (\S+) kv", label.lower())
    if both is not None:
        return replace(_weights(both[1], label, model, engine), cache=cache_dtype(both[2])), True
    return _weights(label.lower(), label, model, engine), False


def _weights(name: str, label: str, model: ModelSpec, engine: str) -> Precision:
    if model.quantisation == "mxfp4":  # the only form that it is published in
        if name in ("mxfp4", "fp4"):
            return model.published_precision
        raise Unclear(f"{model.name} is published in mxfp4 alone: what of it is {label!r} is not stated")
    if name in ("bf16", "bfloat16"):
        return uniform("bfloat16")
    if name in ("fp16", "float16"):
        return uniform("float16")
    if name == "fp8":
        return quantised("fp8")
    if name == "nvfp4" or (name == "fp4" and engine == "tensorrt-llm"):  # the one 4-bit float of that engine
        return quantised("nvfp4", activations="nvfp4")
    if engine == "gpt-fast" and name in ("int8", "int4", "int4-g32"):  # weights alone, as its README says
        return quantised(name.split("-")[0])
    raise Unclear(f"precision {label!r} does not say what weights, experts and activations are stored in")
