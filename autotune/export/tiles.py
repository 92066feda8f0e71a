"""Tile files of the fused-MoE kernel that vLLM and SGLang share: what both formats have in common.

A file is named by the experts E, the experts' width N behind the gate, the device, and fp32 (bf16 and fp16 are not
named). It maps token counts M, as text, to the launch parameters; the engines take the nearest M for any other.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from autotune.export.policy import Policy
from autotune.tiling_results import FOREIGN_KERNEL, TilingResult
from hardware.files import UserError

REQUIRED = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
OPTIONAL = ("waves_per_eu", "matrix_instr_nonkdim", "kpack")  # on ROCm


def tiles(target: str, policy: Policy) -> list[TilingResult]:
    """The decided tilings of the shared kernel, by token count. UserError where there are none, or not of one dtype."""
    found = [t for t in policy.tilings if t.subject.kernel == FOREIGN_KERNEL]
    if not found:
        there = ", ".join(policy.names)
        raise UserError(
            f"{target} needs tilings of the kernel {FOREIGN_KERNEL}, which has these engines' parameters; got: {there}"
        )
    by_tokens: dict[int, TilingResult] = {}
    for tile in found:
        if tile.decision is None:
            raise UserError(f"{tile.name!r} has no decision yet: run its `ridgepoint tune` again, which continues")
        other = by_tokens.setdefault(tile.subject.tokens, tile)
        if tile.subject.dtype != found[0].subject.dtype:
            raise UserError(f"{target} takes a file per dtype, but {found[0].name!r} and {tile.name!r} differ")
        if other.decision and other.decision.tiling != tile.decision.tiling:
            raise UserError(f"{target} takes one tiling per token count, but {other.name!r} and {tile.name!r} differ")
        _check(target, tile.name, tile.decision.tiling)
    return [by_tokens[tokens] for tokens in sorted(by_tokens)]


def table(found: list[TilingResult]) -> dict[str, dict[str, int]]:
    """Token count, as text -> launch parameters in the engines' order."""
    decided = {str(t.subject.tokens): t.decision.tiling for t in found if t.decision}
    return {m: {name: t[name] for name in (*REQUIRED, *OPTIONAL) if name in t} for m, t in decided.items()}


def left_out(policy: Policy) -> list[str]:
    """What the files are not about, by name."""
    others = [
        f"tilings of {t.subject.kernel} ({t.name}): of another kernel"
        for t in policy.tilings
        if t.subject.kernel != FOREIGN_KERNEL
    ]
    return [*others, *(f"decoding settings of {s.name}: not a tile" for s in policy.studies)]


def sizes(found: list[TilingResult]) -> tuple[int, int]:
    """(E, N) of the model that was tuned, by which a file is named. UserError where the study does not say them."""
    subject = found[0].subject
    if subject.experts < 1 or subject.expert_width < 1:
        raise UserError(f"a tile file is named by the experts and their width, but {found[0].name!r} does not say them")
    return subject.experts, subject.expert_width


def device_name(found: list[TilingResult]) -> str:
    """The device, as the engines write it: blanks as underscores. UserError for what cannot be a file's name."""
    name = "_".join(str(found[0].subject.device.get("device", "")).split())
    if not re.fullmatch(r"[\w.()+@-]+", name):
        raise UserError(f"a tile file is named by its device, but {name!r} cannot be part of a file's name")
    return name


def dtype_part(found: list[TilingResult]) -> str:
    """What the file's name says of the dtype: both engines name fp32, and neither bf16 or fp16."""
    return ",dtype=float32" if found[0].subject.dtype == "float32" else ""


def folder_name(model: str) -> str:
    """A folder of the model's own: a file of another hidden size may have the same name."""
    name = re.sub(r"[^\w.-]+", "_", Path(model).name or model).strip(".")
    if not name:
        raise UserError(f"a tile file lies in a folder named like its model, but {model!r} cannot name one")
    return name


def beyond(found: list[TilingResult]) -> str:
    """What a file of few token counts does to forwards that are larger than all of them."""
    most = max(t.subject.tokens for t in found)
    return (
        f"engines take the nearest token count, so that every forward of more than {most} tokens, prefills among them, "
        f"runs with the tile of {most}: tune larger batches too where that matters"
    )


def to_json(data: dict[str, object]) -> str:
    """As the engines' tuning scripts write them."""
    return json.dumps(data, indent=4) + "\n"


def _check(target: str, name: str, tiling: dict[str, int]) -> None:
    unknown = sorted(set(tiling) - {*REQUIRED, *OPTIONAL})
    missing = [key for key in REQUIRED if key not in tiling]
    if unknown or missing:
        said = f"has no {', '.join(missing)}" if missing else f"sets {', '.join(unknown)}"
        raise UserError(f"{target} cannot represent the tiling of {name!r}, which {said}; known: {', '.join(REQUIRED)}")
