"""Tiles of vLLM's fused-MoE kernel: `E=..,N=..,device_name=...json`, found through VLLM_TUNED_CONFIG_FOLDER.

By its sources (model_executor/layers/fused_moe): every key of the file but `triton_version` must be a whole number, or
loading it fails; so what it rests on lies beside it. All devices of the H200 family are named NVIDIA_H200, and the
virtual functions of an AMD Instinct like the whole device. A file that
vLLM ships for the same E and N may be of another hidden size: a folder per model keeps them apart.
"""

from __future__ import annotations

from pathlib import Path

from autotune.export import tiles
from autotune.export.evidence import provenance, write_files
from autotune.export.policy import Policy, Target

NAME = "vllm-moe"


def write(policy: Policy, out: Path) -> list[Path]:
    """Write OUT/MODEL/E=..json and its provenance."""
    found = tiles.tiles(NAME, policy)
    subject = found[0].subject
    folder = tiles.folder_name(subject.model)
    name = file_name(*tiles.sizes(found), tiles.device_name(found), tiles.dtype_part(found))
    version = {"triton_version": subject.triton} if subject.triton else {}
    says = [f"VLLM_TUNED_CONFIG_FOLDER={folder} vllm serve MODEL    # the folder, by its absolute path"]
    says.append(tiles.beyond(found))
    files = {
        f"{folder}/{name}.json": tiles.to_json({**version, **tiles.table(found)}),
        f"{folder}/{name}.provenance.yaml": provenance(
            NAME, policy, says=says, tilings=found, left_out=tiles.left_out(policy)
        ),
    }
    return write_files(out, files)


def file_name(experts: int, width: int, device: str, dtype: str) -> str:
    """Without the suffix."""
    family = "NVIDIA_H200" if "H200" in device.split("_") else device
    family = family.removesuffix("_VF") if family.startswith("AMD_Instinct_") else family
    return f"E={experts},N={width},device_name={family}{dtype}"


TARGET = Target(
    name=NAME,
    engine="vLLM",
    file="a folder per model: E=..,N=..,device_name=...json, provenance",
    loads="loads today",
    write=write,
    does="tiles of the fused-MoE kernel by token count, from tilings of grouped_experts",
    out="vllm-moe",
)
