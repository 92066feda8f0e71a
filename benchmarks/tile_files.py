"""Where the model of tilings ranks the tilings that others published as the fastest of a search on a GPU.

python -m benchmarks.tile_files --files vllm/vllm/model_executor/layers/fused_moe/configs [--json]

Each file of vLLM's fused-MoE tiles names, for some token counts, what its tuning script found to be the fastest (with
routes drawn uniformly). The same space is predicted here: the share of it that is predicted to be faster than the
published tiling (0.5 where the model knows nothing), what it takes in prediction beside the predicted best, and how
much the median tiling takes, which tells how much there was to choose. The files say no times: nothing is fitted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from autotune.tiling_model import predicted_seconds
from benchmarks.common import fail_in_one_line
from hardware.profile import HardwareProfile, load_profile
from runtime.config import ModelConfig, replace, require
from runtime.kernels.problem import Problem
from runtime.kernels.target import TARGETS, Tiling

# Experts, width of one (a file's N is that or its share on some devices), hidden size and experts of a token, by the
# models' configs.
MODELS = {
    "Mixtral-8x7B": (8, 14_336, 4096, 2),
    "Mixtral-8x22B": (8, 16_384, 6144, 2),
    "DBRX": (16, 10_752, 6144, 4),
    "Llama-4-Scout": (16, 8192, 5120, 1),
    "Llama-4-Maverick": (128, 8192, 5120, 1),
    "Qwen1.5-MoE-A2.7B": (60, 1408, 2048, 4),
    "Qwen2-57B-A14B": (64, 2560, 3584, 8),
    "Qwen3-30B-A3B": (128, 768, 2048, 8),
}
DEVICES = {"NVIDIA_H100_80GB_HBM3": "h100-sxm", "NVIDIA_H200": "h200", "AMD_Instinct_MI300X": "mi300x"}
NAMES = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
SPACES = {  # what vLLM's benchmarks/kernels/benchmark_moe.py searches for 16-bit weights
    "NVIDIA": ((16, 32, 64, 128, 256), (32, 64, 128, 256), (64, 128, 256), (1, 16, 32, 64), (4, 8), (2, 3, 4, 5)),
    "AMD": (*((16, 32, 64, 128, 256),) * 3, (1, 4, 8, 16, 32), (1, 2, 4, 8), (2,)),
}
BANDS = ((4, "1-4"), (64, "5-64"), (512, "65-512"), (1_000_000, "513 and more"))
SAMPLED = 400  # tilings of a space that are predicted


@dataclass(frozen=True)
class Ranked:
    """One published tiling. faster: the share of the space predicted to be faster. excess, median_excess: predicted
    seconds of it, and of the median tiling, over the predicted best's, less 1."""

    device: str
    model: str
    width: int
    tokens: int
    tiling: dict[str, int]
    faster: float
    excess: float
    median_excess: float


def space(hardware: HardwareProfile) -> list[Tiling]:
    """Tilings whose staged tiles fit the shared memory; AMD keeps one stage in registers."""
    amd, room = hardware.vendor == "AMD", TARGETS[hardware.compile_target].shared_bytes
    found = [dict(zip(NAMES, values, strict=True)) for values in itertools.product(*SPACES["AMD" if amd else "NVIDIA"])]
    return [
        t
        for t in found
        if 2 * (t["num_stages"] - amd) * (t["BLOCK_SIZE_M"] + t["BLOCK_SIZE_N"]) * t["BLOCK_SIZE_K"] <= room
    ]


def uniform_loads(tokens: int, experts: int, top_k: int, rng: np.random.Generator) -> list[list[int]]:
    """Tokens of each expert in three forwards whose tokens choose at random; none skips."""
    found = []
    for _ in range(3):
        chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
        found.append([*np.bincount(chosen.ravel(), minlength=experts).tolist(), 0])
    return found


def published(folder: Path) -> Iterator[tuple[str, str, int, int, dict[str, int]]]:
    """Device, model, width, tokens and tiling of every 16-bit entry whose device and model are known here."""
    for path in sorted(folder.glob("E=*.json")):
        found = re.fullmatch(r"E=(\d+),N=(\d+),device_name=([^,]+)\.json", path.name)
        if found is None or found[3] not in DEVICES:
            continue
        experts, width = int(found[1]), int(found[2])
        names = [
            n for n, (e, w, _, _) in MODELS.items() if e == experts and w % width == 0 and w // width in (1, 2, 4, 8)
        ]
        for tokens, tiling in json.loads(path.read_text()).items():
            if names and tokens.isdecimal() and tiling.get("num_stages"):
                yield DEVICES[found[3]], names[0], width, int(tokens), {n: tiling[n] for n in NAMES}


def rank(device: str, model: str, width: int, tokens: int, tiling: dict[str, int]) -> Ranked:
    """Predict a published tiling and a sample of the space that it was found in."""
    hardware, (experts, _, hidden, top_k) = load_profile(device), MODELS[model]
    rng = np.random.default_rng(tokens)
    config = replace(ModelConfig(), hidden_size=hidden, moe_intermediate_size=width, num_experts=experts)
    problem, loads = Problem(config, tokens, 1), uniform_loads(tokens, experts, top_k, rng)

    def predicted(candidate: Tiling) -> float:
        facts = {"grids": (1, 1, 1, 1), "moved_bytes": 0.0, "flops": 0.0, "loads": loads}
        found = predicted_seconds("grouped_experts", problem, "bfloat16", candidate, hardware, **facts)
        assert found is not None
        return found

    own, others = predicted(tiling), space(hardware)
    sample = rng.choice(len(others), min(SAMPLED, len(others)), replace=False)
    seconds = [predicted(others[i]) for i in sample]
    best = min(own, *seconds)
    faster = sum(s < own for s in seconds) / len(seconds)
    return Ranked(device, model, width, tokens, tiling, faster, own / best - 1, statistics.median(seconds) / best - 1)


def table(rows: Sequence[Ranked]) -> Iterator[str]:
    """Medians by device and tokens."""
    groups: dict[tuple[str, str], list[Ranked]] = defaultdict(list)
    for row in rows:
        groups[row.device, next(name for most, name in BANDS if row.tokens <= most)].append(row)
    yield "| device | tokens | tilings | predicted faster | beside the predicted best | of the median tiling |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for (device, band), own in groups.items():
        faster, excess, median = (
            statistics.median(getattr(r, n) for r in own) for n in ("faster", "excess", "median_excess")
        )
        yield f"| {device} | {band} | {len(own)} | {faster:.0%} | +{excess:.1%} | +{median:.1%} |"


def main(arguments: list[str] | None = None) -> int:
    """Rank and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, required=True, help="folder of vLLM's tile files")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, an entry per tiling")
    chosen = parser.parse_args(arguments)
    rows = [rank(*entry) for entry in published(chosen.files)]
    require(len(rows) > 0, f"the folder must hold tile files of {', '.join(DEVICES)}, but {chosen.files} has none")
    print(json.dumps([asdict(row) for row in rows]) if chosen.json else "\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
