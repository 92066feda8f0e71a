"""Which tiling a kernel runs with: what the settings say, else the first of the device's target."""

from __future__ import annotations

import pytest

from runtime.config import KernelConfig, ModelConfig
from runtime.kernels.problem import Problem
from runtime.kernels.selection import Selection, default_tiling, nearest_target
from runtime.kernels.target import TARGETS

PROBLEM = Problem(ModelConfig(), batch=2, slots=5)  # 10 tokens


@pytest.mark.parametrize(
    "architecture, target",
    [
        *((name, name) for name in TARGETS),
        ("sm_80", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_100"),
        ("gfx90a", "gfx942"),
        ("gfx1100", "gfx950"),
    ],
)
def test_an_architecture_has_the_nearest_target_of_its_vendor(architecture: str, target: str) -> None:
    assert nearest_target(architecture).name == target


def test_settings_come_before_the_default() -> None:
    default = default_tiling("attention", "cpu", PROBLEM)
    own = dict(default) | {"num_stages": 7}
    kernels = KernelConfig(tilings={"attention": {16: own}})
    selection = Selection("cpu", kernels)
    assert default_tiling("attention", "cpu", PROBLEM, kernels) == selection("attention", PROBLEM) == own
    larger = Problem(ModelConfig(), batch=16, slots=5)  # no bucket holds it
    assert selection("attention", larger) == default_tiling("attention", "cpu", larger)
