"""Block diffusion in LMDeploy: the `dllm_*` settings of `PytorchEngineConfig`.

By its sources (lmdeploy/messages.py, pytorch/strategies/dllm/unmasking.py, commit 1263d5c): `low_confidence_dynamic`
decides every masked position whose token's probability *reaches* `dllm_confidence_threshold`, and the surest one in any
case; it ignores the steps. `low_confidence_static` decides the `dllm_block_length // dllm_denoising_steps` surest; it
ignores the threshold. The steps are always written: left out, they are the block's length. Its diffusion models are
SDAR's; ZAYA is not among them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autotune.export.evidence import provenance, write_files
from autotune.export.filling import filling_of
from autotune.export.policy import Chosen, Policy, Target, refusal, refuse_cpu

NAME = "lmdeploy-diffusion"


def write(policy: Policy, out: Path) -> list[Path]:
    """Write engine-config.json and its provenance."""
    chosen = policy.one("LMDeploy")
    refuse_cpu(NAME, chosen)
    files = {}
    if chosen.decoding.drafts:
        config = engine_config(chosen)
        files["engine-config.json"] = json.dumps(config, indent=2) + "\n"
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in config.items())
        says = [
            "needs LMDeploy with this model among its diffusion models",
            "pipeline(MODEL, backend_config=PytorchEngineConfig(**json.load(open('engine-config.json'))))",
            f"lmdeploy serve api_server MODEL --backend pytorch {flags}",
            "requests must say temperature 0, as it was tuned: left out, the server samples",
        ]
    else:
        says = [
            f"{chosen.why_single}: there is nothing to set but the requests' temperature, "
            f"{chosen.decoding.temperature}; leave the dllm settings out",
        ]
    files[f"{NAME}.provenance.yaml"] = provenance(NAME, policy, says=says, settings=[chosen])
    return write_files(out, files, absent=("engine-config.json",))


def engine_config(chosen: Chosen) -> dict[str, Any]:
    """The settings, as keyword arguments of PytorchEngineConfig."""
    block, share, threshold = filling_of(NAME, chosen)
    steps = chosen.decoding.denoising_steps
    found: dict[str, Any] = {"dllm_block_length": block}
    if threshold is not None:
        if share > 1:
            why = f"a threshold is read with at least 1 token per forward only, and here it is {share} of {block}"
            raise refusal(NAME, chosen, "denoising_steps", steps, why)
        found |= {"dllm_unmasking_strategy": "low_confidence_dynamic", "dllm_denoising_steps": block}
        return found | {"dllm_confidence_threshold": threshold}
    divisor = next((s for s in range(block, 0, -1) if block // s == share), None)
    if divisor is None:
        why = f"each forward decides {share} of {block} tokens, and no whole number of steps divides {block} like that"
        raise refusal(NAME, chosen, "denoising_steps", steps, why)
    return found | {"dllm_unmasking_strategy": "low_confidence_static", "dllm_denoising_steps": divisor}


TARGET = Target(
    name=NAME,
    engine="LMDeploy",
    file="a folder: engine-config.json, provenance",
    loads="needs a fork",
    write=write,
    does="block, strategy, steps and threshold of plain denoising (releases read them for SDAR, not for ZAYA)",
    out="lmdeploy-diffusion",
)
