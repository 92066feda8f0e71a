"""Block diffusion in SGLang: the YAML of `--dllm-algorithm-config` for the algorithm LowConfidence.

By its sources (python/sglang/srt/dllm/config.py, algorithm/low_confidence.py): `block_size`, and `threshold`: a forward
decides every masked position whose most likely token has a probability *above* it, or the surest one where none has.
It always takes the most likely token. DLLM models are a fixed list (LLaDA2, SDAR); ZAYA is not on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from autotune.export.evidence import provenance, write_files
from autotune.export.filling import filling_of
from autotune.export.policy import Chosen, Policy, Target, refusal, refuse_cpu

NAME = "sglang-diffusion"
# Ours decides from the threshold on. A probability rounds to exactly 1 often, and nothing exceeds 1.
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1
NEVER = 1.0


def write(policy: Policy, out: Path) -> list[Path]:
    """Write dllm.yaml and its provenance."""
    chosen = policy.one("SGLang")
    refuse_cpu(NAME, chosen)
    files = {}
    if chosen.decoding.drafts:
        files["dllm.yaml"] = yaml.safe_dump(algorithm_config(chosen), sort_keys=False)
        says = [
            "needs SGLang with this model on its list of diffusion models (python/sglang/srt/dllm/config.py)",
            "python -m sglang.launch_server --model-path MODEL --dllm-algorithm LowConfidence "
            "--dllm-algorithm-config dllm.yaml",
        ]
    else:
        says = [
            f"{chosen.why_single}: there is nothing to set but the requests' temperature, "
            f"{chosen.decoding.temperature}",
            "python -m sglang.launch_server --model-path MODEL    # without --dllm-algorithm",
        ]
    files[f"{NAME}.provenance.yaml"] = provenance(NAME, policy, says=says, settings=[chosen])
    return write_files(out, files, absent=("dllm.yaml",))


def algorithm_config(chosen: Chosen) -> dict[str, Any]:
    """What the algorithm reads. A forward decides at least one position; no other least number can be set."""
    block, share, threshold = filling_of(NAME, chosen)
    if share == block:
        return {"block_size": block, "threshold": 0.0}  # every probability exceeds it
    if share > 1:
        why = f"each forward decides at least {share} of {block} tokens, and this algorithm knows 1 or all"
        raise refusal(NAME, chosen, "denoising_steps", chosen.decoding.denoising_steps, why)
    return {"block_size": block, "threshold": NEVER if threshold is None else min(threshold, BELOW_ONE)}


TARGET = Target(
    name=NAME,
    engine="SGLang",
    file="a folder: dllm.yaml, provenance",
    loads="needs a fork",
    write=write,
    does="block and confidence threshold of plain denoising (releases read them for LLaDA2 and SDAR, not for ZAYA)",
    out="sglang-diffusion",
)
