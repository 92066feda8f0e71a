"""What no device or model can do is refused with the rule and the value, wherever it is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import ridgepoint
from hardware.files import UserError
from hardware.profile import load_profile
from perfmodel.decoding import setting
from perfmodel.model_spec import load_spec
from perfmodel.precision import arithmetic_dtype, quantised
from perfmodel.published.interpret import interpret
from perfmodel.published.points import TidarForwardPoint, TidarThroughputPoint, Unit
from perfmodel.published.predict import Estimate, estimate
from perfmodel.published.rows import read_rows
from perfmodel.serving import Load, serve
from perfmodel.tidar import Run
from runtime.config import DecodingConfig

TABLE = Path(__file__).resolve().parents[1] / "measurements" / "published" / "zaya_tidar_measured.csv"


def run(hardware: str, batch: int, generated: float, sampler: str = "two_forward") -> TidarThroughputPoint:
    return TidarThroughputPoint(
        "made up", "here", "series", f"tidar throughput {sampler}", "zyphra-vllm", load_profile(hardware),
        Unit("tok/s", 1.0, 1.0), 1.0, DecodingConfig(sampler, 16), batch, generated, 6.0,  # type: ignore[arg-type]
        refilled=False, ends_early=False, thinking=None, build="0bfa5c58", prefix="made up",
    )  # fmt: skip


def forward(hardware: str, batch: int, generated: float) -> TidarForwardPoint:
    return TidarForwardPoint(
        "made up", "here", "series", "tidar forward_ms", "zyphra-vllm", load_profile(hardware), Unit("ms", 1e-3), 1.0,
        DecodingConfig("two_forward", 16), batch, generated, "verify",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        (run("mi300x", 512, 120_000), r"must fit the .* of mi300x.*, but batch 512 at context 120000 needs"),
        (run("h100-sxm", 1, 999_999), r"max_position_embeddings must hold, but got 10000\d\d > 131072"),
        (run("h100-sxm", 1, 131_072 - 16, "single_forward"), "max_position_embeddings must hold"),
        (forward("h100-sxm", 4096, 8000), "weights and caches must fit"),
        (forward("h100-sxm", 1, 999_999), "max_position_embeddings must hold"),
    ],
)
def test_a_run_beyond_the_models_context_or_the_memory_has_a_status(point: Run, reason: str) -> None:
    found = estimate(point)
    assert isinstance(found, str)
    with pytest.raises(UserError, match=reason):
        raise UserError(found)


def test_every_published_run_has_room() -> None:
    runs = [p for p in map(interpret, read_rows(TABLE)) if isinstance(p, TidarForwardPoint | TidarThroughputPoint)]
    assert len(runs) > 20
    assert all(isinstance(estimate(p), Estimate) for p in runs)
    assert isinstance(estimate(run("h100-sxm", 1, 131_000)), Estimate)


@pytest.mark.parametrize("device", ["mi300x", "h100-sxm", "a100-80gb-sxm", "l40s"])
@pytest.mark.parametrize(("weights", "activations"), [("nvfp4", "nvfp4"), ("mxfp4", "nvfp4"), ("int4", "int4")])
def test_four_bits_on_both_sides_need_a_device_that_multiplies_them(
    device: str, weights: str, activations: str
) -> None:
    hardware = load_profile(device)
    with pytest.raises(UserError, match=rf"unknown dtype of {device} '(fp4|int4)'; known: .*bfloat16"):
        arithmetic_dtype(hardware, weights, activations)
    assert arithmetic_dtype(hardware, weights, "bfloat16") == "bfloat16"
    with pytest.raises(UserError, match=f"unknown dtype of {device}"):
        setting(load_spec("gpt-oss-20b"), hardware, quantised(weights, activations=activations))


def test_four_bits_where_they_are_multiplied_or_widened() -> None:
    assert arithmetic_dtype(load_profile("b200"), "nvfp4", "nvfp4") == "fp4"
    assert arithmetic_dtype(load_profile("mi355x"), "mxfp4", "mxfp4") == "fp4"
    assert arithmetic_dtype(load_profile("h100-sxm"), "mxfp4", "fp8") == "fp8"
    assert arithmetic_dtype(load_profile("a100-80gb-sxm"), "int4", "int8") == "int8"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, value) for option in ("sequences", "prompt", "generated") for value in ("inf", "nan", "0")),
        *(("variation", value) for value in ("inf", "nan", "1e+200", "-1")),
        *(("temperature", value) for value in ("inf", "nan", "-1")),
    ],
)
def test_a_load_is_of_numbers_that_a_server_can_have(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["serving", "--model", "llama-3.1-8b", "--hardware", "h100-sxm", f"--{option}", value]
    assert ridgepoint.main(given) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert option in err and "must" in err and value in err


def test_sequences_that_are_said_to_be_active_must_fit() -> None:
    """Else only as many are active as do."""
    at = setting(load_spec("llama-3.1-8b"), load_profile("h100-sxm"), "bfloat16", engine="vllm")
    load = Load(np.array([8.0, 4000.0]), 2000, 1000)
    assert serve(at, load).active[1] < 4000
    with pytest.raises(UserError, match=r"all sequences must fit the .*, but 4000 at a mean context of 2500"):
        serve(at, dataclasses.replace(load, admitted=True))
