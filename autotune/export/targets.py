"""The export targets by name: each is one file with a `TARGET`, and one line here.

What a format cannot represent is refused by name; what was simulated is labelled in every file.
"""

from __future__ import annotations

from pathlib import Path

from autotune.export import (
    diffusion_gemma,
    lmdeploy_diffusion,
    native,
    sglang_diffusion,
    sglang_moe,
    step_times,
    tidar_vllm,
    vllm_moe,
    vllm_schedule,
)
from autotune.export.policy import Policy, Target
from hardware.files import known

TARGETS: dict[str, Target] = {
    module.TARGET.name: module.TARGET
    for module in (
        native,
        vllm_moe,
        sglang_moe,
        tidar_vllm,
        vllm_schedule,
        sglang_diffusion,
        lmdeploy_diffusion,
        diffusion_gemma,
        step_times,
    )
}


def write(target: str, policy: Policy, out: Path) -> list[Path]:
    """Write what was decided in a target's format: the files written. UserError lists the known targets."""
    if target not in TARGETS:
        raise known("export format", target, TARGETS)
    policy.check()
    return TARGETS[target].write(policy, out)
