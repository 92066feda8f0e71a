"""Tiles of SGLang's fused-MoE kernel: `configs/triton_X_Y_Z/E=..json` below SGLANG_MOE_CONFIG_DIR.

By its sources (srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_config.py): every key must be a whole number,
`triton_version` too would fail; the version is the folder's, and all such folders must be whole numbers with
underscores. A second file, `.._down.json`, tiles the second matrix product; without one it takes the first one's tiles,
which is how they were measured, so none is written.
"""

from __future__ import annotations

import re
from pathlib import Path

from autotune.export import tiles
from autotune.export.evidence import provenance, write_files
from autotune.export.policy import Policy, Target
from hardware.files import UserError

NAME = "sglang-moe"


def write(policy: Policy, out: Path) -> list[Path]:
    """Write OUT/MODEL/configs/triton_X_Y_Z/E=..json, and its provenance in OUT/MODEL."""
    found = tiles.tiles(NAME, policy)
    subject = found[0].subject
    model, version = tiles.folder_name(subject.model), version_folder(subject.triton)
    experts, width = tiles.sizes(found)
    name = f"E={experts},N={width},device_name={tiles.device_name(found)}{tiles.dtype_part(found)}"
    folder = f"{model}/configs/{version}"
    says = [f"SGLANG_MOE_CONFIG_DIR={model} python -m sglang.launch_server ...    # the folder, by its absolute path"]
    says.append(tiles.beyond(found))
    files = {
        f"{folder}/{name}.json": tiles.to_json(dict(tiles.table(found))),
        f"{model}/{name}.provenance.yaml": provenance(
            NAME, policy, says=says, tilings=found, left_out=tiles.left_out(policy)
        ),
    }
    return write_files(out, files, absent=[f"{folder}/{name}_down.json"])


def version_folder(triton: str | None) -> str:
    """The folder of a Triton version. UserError for one that SGLang could not sort among the others."""
    if triton is None or not re.fullmatch(r"\d+(\.\d+)+", triton):
        raise UserError(f"{NAME} needs tilings of a Triton version of numbers, as 3.6.0, but got {triton!r}")
    return f"triton_{triton.replace('.', '_')}"


TARGET = Target(
    name=NAME,
    engine="SGLang",
    file="a folder per model: configs/triton_X_Y_Z/E=..,N=..,device_name=...json, provenance",
    loads="loads today",
    write=write,
    does="tiles of the fused-MoE kernel by token count, from tilings of grouped_experts",
    out="sglang-moe",
)
