"""Rows of the ZAYA engine: forwards, rejection samplers and throughput of TiDAR decoding -> typed points."""

from __future__ import annotations

import re

from hardware.files import UserError
from perfmodel.published.names import Catalog, Unclear, whole
from perfmodel.published.points import Point, TidarForwardPoint, TidarThroughputPoint, Unit
from perfmodel.published.rows import Row, number
from runtime.config import DecodingConfig

ENGINE = "zyphra-vllm"
MODES = ("autoregressive", "two_forward", "single_forward")
# Runs with other kernels than the engine's own, whose effect is what they were made to show.
_OTHER_KERNELS = re.compile(r"upstream-style|fused CCA|default MoE kernels|tuned MoE rows", re.IGNORECASE)
# What else a note may say that changes the setting which the other cells state.
_OTHER_SETTING = re.compile(
    r"\beager\b|no (CUDA|HIP) graphs?|\b[TEDP]P ?=?([2-9]|\d\d)|mixing weight|per-(user|sequence)|\bfp8\b"
    r"|\b(?!8B)\d+B\b",
    re.IGNORECASE,
)


def point(row: Row, names: Catalog) -> Point:
    """The row as a point; Unclear says what is not stated."""
    cells = row.cells
    hardware, count = names.device(cells["hardware"])
    if count != 1:
        raise Unclear(f"the engine runs on one device, but the hardware is {cells['hardware']!r}")
    if _OTHER_KERNELS.search(cells["note"]):
        raise Unclear(f"the engine ran with other kernels: {cells['note']}")
    other = _OTHER_SETTING.search(cells["note"])
    if other:
        raise Unclear(f"what {other[0]!r} in the note changes is not modelled")
    decoding, batch = _decoding(row), whole(cells["batch"], "the batch")
    generated = float(whole(cells["generated_tokens"], "generated_tokens"))
    engine, measured = ENGINE, row.known_value
    if cells["metric"] in ("forward_ms", "sampler_ms"):
        part = _part(row, batch, decoding)
        return TidarForwardPoint(
            row.id, row.source, row.series, f"tidar {cells['metric']}", engine, hardware, Unit("ms", 1e-3), measured,
            decoding, batch, generated, part,  # type: ignore[arg-type]  # one of the three
        )  # fmt: skip
    if cells["metric"] != "throughput_tok_s":
        raise Unclear(f"metric {cells['metric']!r} is not modelled")
    note, length = cells["note"], number(cells["mean_acceptance_length"])
    if length is not None and "excludes the +1 token" in note:
        length += 1
    if decoding.sampler == "autoregressive":
        length = None
    elif length is None:
        raise Unclear("the acceptance length is not stated")
    elif not 1 <= length <= decoding.draft_tokens + 1:
        raise Unclear(f"an acceptance length counts the verifier's token, so 1 to K + 1, but is {length:g}")
    return TidarThroughputPoint(
        row.id, row.source, row.series, f"tidar throughput {decoding.sampler}", engine, hardware,
        Unit("tok/s", 1.0, 1.0), measured, decoding, batch, generated, length,
        refilled="includes refill" in note, ends_early="EOS allowed" in note, thinking=_thinking(row),
        build=_build(row), prefix=row.run,
    )  # fmt: skip


def _decoding(row: Row) -> DecodingConfig:
    cells = row.cells
    mode, temperature = cells["mode"], number(cells["temperature"])
    if mode not in MODES:
        raise Unclear(f"mode must be {', '.join(MODES)}, but is {mode!r}")
    if temperature is None:
        raise Unclear(f"the temperature must be a number, but is {cells['temperature']!r}")
    try:
        if mode == "autoregressive":
            return DecodingConfig(temperature=temperature)
        drafts = whole(cells["draft_tokens"], "draft_tokens")
        if mode == "two_forward":
            return DecodingConfig("two_forward", drafts, temperature=temperature)
        if not re.fullmatch(r"\d+( \d+)*", cells["proposal_levels"]):
            raise Unclear(f"proposal_levels must be numbers with spaces, but are {cells['proposal_levels']!r}")
        levels = tuple(int(level) for level in cells["proposal_levels"].split())
        return DecodingConfig("single_forward", drafts, temperature=temperature, proposal_levels=levels)
    except UserError as error:
        raise Unclear(str(error)) from error


def _part(row: Row, batch: int, decoding: DecodingConfig) -> str:
    """Which forward of a step a row is of; its note also says how many tokens went in."""
    note = row.cells["note"]
    if decoding.sampler != "two_forward":
        raise Unclear(f"forwards of {decoding.sampler} on their own are not modelled")
    if row.cells["metric"] == "sampler_ms":
        return "sampler"
    kind = re.match(r"(verify|draft) forward\b", note)
    if kind is None:
        raise Unclear("which forward (verify or draft) was timed is not stated")
    tokens = re.search(r"\b(\d+)x(\d+) tokens", note)
    if tokens and (int(tokens[1]), int(tokens[2])) != (batch, decoding.draft_tokens + 1):
        raise Unclear(f"the note says {tokens[0]}, but the batch is {batch} of {decoding.draft_tokens + 1} slots")
    return kind[1]


def _thinking(row: Row) -> bool | None:
    """Whether the model thought aloud, as the note or the run's name says; None where neither does."""
    if "thinking on" in row.cells["note"] or re.search(r"-on\b", row.id):
        return True
    return False if "thinking off" in row.cells["note"] or re.search(r"-off\b", row.id) else None


def _build(row: Row) -> str:
    """The commit of the engine's repository at which the source stands."""
    commit = re.search(r"@([0-9a-f]{7,40})$", row.cells["source"])
    return commit[1] if commit else ""
