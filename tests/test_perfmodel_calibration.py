"""Calibration and validation on made-up measurements whose law is known, and their commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import ridgepoint
from hardware.files import UserError
from hardware.profile import save_profile
from perfmodel.calibration import calibrate, require_device, split
from perfmodel.decoding import setting, time_forward, time_step
from perfmodel.engine import EngineProfile, load_engine, save_engine
from perfmodel.experts import ExpertCoverage
from perfmodel.model_spec import load_spec
from perfmodel.steps import step_of
from perfmodel.validation import (
    MeasuredPoints,
    Row,
    point_name,
    recorded_coverage,
    summaries,
    summarise,
    validate,
)
from runtime.config import DecodingConfig, KernelConfig, Workload, replace
from runtime.measurement import Measurement, append_jsonl
from tests.perfmodel_cpu import made_up_cpu

CPU = made_up_cpu()
TRUTH = {"dispatch": 4.0, "matmul": 0.6, "attention": 0.3, "cache": 0.25, "activations": 0.5}


def engine(**scale: float) -> EngineProfile:
    return dataclasses.replace(load_engine("ridgepoint-cpu"), scale=scale)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name is the same in every run: which points are held out goes by their names."""
    data = {
        "model_type": "zaya", "vocab_size": 264, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "moe_intermediate_size": 192,
        "router_hidden_size": 64, "max_position_embeddings": 2048, "eos_token_id": 1,
    }  # fmt: skip
    folder = tmp_path / "made-up"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(data))
    monkeypatch.chdir(tmp_path)
    return "./made-up"


def measurement(model: str, batch: int, slots: int, context: int, mode: str, seconds: list[float]) -> Measurement:
    return Measurement(
        kind="forward",
        model=model,
        model_hash="0",
        device={},
        command="made up",
        commit="0",
        date="2026-01-01",
        workload=Workload(batch=batch),
        decoding=DecodingConfig(),
        kernels=KernelConfig({1_000_000: mode}, threads=1),  # type: ignore[dict-item]
        slots=slots,
        context=context,
        seconds=tuple(seconds),
        experts_per_layer=float(ExpertCoverage().distinct(batch, slots, 8)),
    )


def grid(model: str, *, noise: float, slow_share: float = 0.0) -> list[Measurement]:
    """Forwards of a machine that follows TRUTH, with multiplicative noise and a share that other work made slow."""
    rng = np.random.default_rng(7)
    rows = [
        measurement(model, batch, slots, context, mode, [1.0])
        for batch in (1, 2, 4, 8, 16)
        for slots in (1, 5, 9, 17, 25)
        for context in (64, 256, 768)
        for mode in ("loop", "grouped")
    ]
    seconds, _ = MeasuredPoints(rows, CPU, "uniform").predict(engine(**TRUTH))
    seconds = seconds * np.exp(rng.normal(0, noise, len(rows)))
    seconds = np.where(rng.random(len(rows)) < slow_share, 2.5 * seconds, seconds)
    return [replace(row, seconds=(float(s),)) for row, s in zip(rows, seconds, strict=True)]


def test_calibration_finds_the_scales_despite_noise_and_outliers(model: str) -> None:
    kept, apart = split(grid(model, noise=0.05, slow_share=0.08), 0.5)
    fitted = calibrate(kept, CPU, engine(), source="made up")
    assert fitted.scale["dispatch"] == pytest.approx(TRUTH["dispatch"], rel=0.05)
    for name in ("matmul", "attention", "cache"):  # moving activations is too small a share here to be seen
        assert fitted.scale[name] == pytest.approx(TRUTH[name], rel=0.25), name  # type: ignore[index]
    held_out = summaries(validate(apart, CPU, engine=fitted))["forward, held out"]
    assert held_out.median_absolute_error < 0.06
    assert abs(held_out.bias) < 0.03
    before = summaries(validate(apart, CPU, engine=engine()))["forward, not calibrated"]
    assert before.median_absolute_error > 0.3


def test_a_bootstrap_gives_intervals_and_the_spread_of_points_not_fitted_to(model: str, tmp_path: Path) -> None:
    fitted = calibrate(grid(model, noise=0.05)[:40], CPU, engine(), source="made up", draws=8)
    low, high = fitted.intervals["scale.dispatch"]
    assert low <= TRUTH["dispatch"] * 1.05 and high >= TRUTH["dispatch"] * 0.95 and low < high
    assert fitted.spread is not None and 0.02 < fitted.spread < 0.2
    assert load_engine(str(save_engine(fitted, tmp_path / "fitted.yaml"))) == fitted


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (("NVIDIA H100 80GB HBM3",), "a cpu\\), but they come from NVIDIA H100 80GB HBM3, a gpu"),
        (("cpu", "NVIDIA H100 80GB HBM3"), "rows of one device are needed"),
    ],
)
def test_rows_of_another_device_are_refused(model: str, devices: tuple[str, ...], message: str) -> None:
    cpu = f"{CPU.vendor} processor"
    rows = grid(model, noise=0.01)
    own = [replace(row, device={"device": cpu, "cpu": cpu}) for row in rows]
    require_device(own, CPU)
    mixed = [
        replace(row, device={"device": cpu if device == "cpu" else device, "cpu": cpu})
        for row, device in zip(rows, devices * len(rows), strict=False)
    ]
    with pytest.raises(UserError, match=message):
        calibrate(mixed, CPU, engine(), source="made up")


def test_what_no_row_shows_is_left_alone(model: str) -> None:
    """One slot over short contexts says nothing about attention's arithmetic."""
    rows = [measurement(model, b, 1, c, "loop", [1.0]) for b in (1, 2) for c in (8, 12, 16, 20, 24, 28)]
    seconds, _ = MeasuredPoints(rows, CPU, "uniform").predict(engine(dispatch=3.0))
    rows = [replace(row, seconds=(float(s),)) for row, s in zip(rows, seconds, strict=True)]
    fitted = calibrate(rows, CPU, engine(), source="made up")
    assert fitted.scale["attention"] == pytest.approx(1, rel=0.1)
    assert fitted.scale["dispatch"] == pytest.approx(3, rel=0.1)


def test_the_split_is_by_point_and_repeatable(model: str) -> None:
    rows = grid(model, noise=0.01)
    kept, apart = split([*rows, *rows], 0.3)
    assert not {point_name(m) for m in kept} & {point_name(m) for m in apart}
    assert len(kept) + len(apart) == 2 * len(rows)
    assert 0.2 < len(apart) / (2 * len(rows)) < 0.4
    assert split(list(reversed(rows)), 0.3)[1] == list(reversed(split(rows, 0.3)[1]))
    assert split(rows, 0.0)[1] == []


def test_fitted_rows_are_told_from_held_out_ones(model: str, tmp_path: Path) -> None:
    kept, apart = split(grid(model, noise=0.02), 0.4)
    fitted = calibrate(kept, CPU, engine(), source="made up")
    again = load_engine(str(save_engine(fitted, tmp_path / "fitted.yaml")))
    assert again == fitted
    found = summaries(validate([*kept, *apart], CPU, engine=again))
    assert {name: s.count for name, s in found.items()} == {
        "forward, held out": len(apart),
        "forward, fitted": len(kept),
    }


def test_a_generation_is_compared_by_its_mean_step(model: str) -> None:
    decoding = DecodingConfig("two_forward", draft_tokens=4)
    at = setting(load_spec(model), CPU, "float32", engine=engine(**TRUTH), kernels=KernelConfig({1: "loop"}, threads=1))
    step = float(time_step(at, step_of(decoding), 2, 100).seconds)
    row = replace(
        measurement(model, 2, 5, 100, "loop", [10 * step, 30 * step]),
        kind="generation",
        decoding=decoding,
        forwards=80,
        tokens=(60, 180),
        acceptance_histogram=(10, 10, 10, 5, 5),
    )
    (found,) = validate([row], CPU, engine=engine(**TRUTH))
    assert found.kind == "generation"
    assert found.error == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="forward"):
        calibrate([row], CPU, engine(), source="made up")


@pytest.mark.parametrize(
    ("decoding", "fillings"),
    [
        (DecodingConfig("single_forward", 4, proposal_levels=(0, 2)), None),
        (DecodingConfig("denoising", 8, denoising_steps=4), None),
        (DecodingConfig("denoising", 9, denoising_steps=5, verify=True), None),  # at most 5 forwards, each decides 2
        (DecodingConfig("denoising", 9, denoising_steps=4), None),  # 3 forwards are enough: each decides 3
        (DecodingConfig("denoising", 8, denoising_steps=8, confidence_threshold=0.5), 2.5),
        (DecodingConfig("denoising", 8, denoising_steps=8, confidence_threshold=0.5, verify=True), 3.25),
    ],
)
def test_a_generation_of_any_sampler_is_compared_by_its_mean_step(
    model: str, decoding: DecodingConfig, fillings: float | None
) -> None:
    """Batches of two kept full for 40 steps; where a threshold ends a block, by the forwards that it took."""
    at = setting(load_spec(model), CPU, "float32", engine=engine(**TRUTH), kernels=KernelConfig({1: "loop"}, threads=1))
    parts = step_of(decoding, fillings=fillings)
    row = replace(
        measurement(model, 2, decoding.slots, 100, "loop", [40 * float(time_step(at, parts, 2, 100).seconds)]),
        kind="generation",
        decoding=decoding,
        forwards=round(40 * float(parts.forwards_per_step)),
        tokens=(60,),
        acceptance_histogram=(50, 30),
    )
    (found,) = validate([row], CPU, engine=engine(**TRUTH))
    assert found.error == pytest.approx(0, abs=1e-9)


def test_a_measured_single_forward_is_predicted_with_its_own_rows(model: str) -> None:
    """Of 15 slots 9 go through the LM head, once: another layout of as many slots takes another time."""
    at = setting(load_spec(model), CPU, "float32", engine=engine(**TRUTH), kernels=KernelConfig({1: "loop"}, threads=1))
    decoding = DecodingConfig("single_forward", 4, proposal_levels=(0, 2))
    seconds = float(time_forward(at, 2, 15, 100, 9, "single").seconds)
    row = replace(measurement(model, 2, 15, 100, "loop", [seconds]), decoding=decoding, forward="single")
    single, verify = validate([row, replace(row, forward="verify")], CPU, engine=engine(**TRUTH))
    assert abs(single.error) < 1e-9 and verify.error > 1e-3


def test_a_row_below_its_bound_is_counted() -> None:
    rows = [Row("a", "forward", 1.0, 1.2, 0.5, False), Row("b", "forward", 1.0, 0.9, 1.1, False)]
    found = summarise(rows)
    assert (found.count, found.bound_violations) == (2, 1)
    assert found.mean_absolute_error == pytest.approx(0.15)
    assert found.bias == pytest.approx(0.05)


def test_recorded_experts_become_coverage(model: str) -> None:
    rows = [replace(measurement(model, b, 4, 64, "loop", [1.0]), experts_per_layer=x) for b, x in ((1, 2.0), (4, 4.0))]
    coverage = recorded_coverage(rows)
    assert coverage.distinct(2, 4, 8) == pytest.approx(3.0)
    few, every = (validate(rows, CPU, engine=engine(), expert_coverage=c) for c in (coverage, "all"))
    assert all(a.predicted_seconds < b.predicted_seconds for a, b in zip(few, every, strict=True))
    with pytest.raises(UserError, match="experts_per_layer"):
        recorded_coverage([replace(rows[0], experts_per_layer=None)])


def test_recorded_experts_are_those_of_a_kind_of_forward(model: str) -> None:
    """A draft and a verify of equal slots touch different experts, and are timed so; so does a generation's forward."""
    plain = measurement(model, 2, 9, 64, "loop", [1.0])
    draft = replace(plain, forward="draft", experts_per_layer=2.0)
    verify = replace(plain, forward="verify", experts_per_layer=6.0)
    coverage = recorded_coverage([draft, verify])
    assert [float(coverage.of(kind).distinct(2, 9, 8)) for kind in ("draft", "verify")] == [2.0, 6.0]
    pair = {
        name: [r.predicted_seconds for r in validate([draft, verify], CPU, engine=engine(), expert_coverage=c)]
        for name, c in (("own", coverage), ("draft's", coverage.of("draft")), ("verify's", coverage.of("verify")))
    }
    assert pair["own"] == [pair["draft's"][0], pair["verify's"][1]] and pair["own"][0] < pair["verify's"][0]
    decoding = DecodingConfig("two_forward", draft_tokens=8)
    run = replace(verify, kind="generation", forward=None, decoding=decoding, tokens=(9,), forwards=2)
    assert [p.kind for p in recorded_coverage([run]).measured] == ["verify"]


def test_too_few_points_are_refused(model: str) -> None:
    with pytest.raises(UserError, match="at least 10 operating points, but got 1"):
        calibrate([measurement(model, 1, 1, 64, "loop", [1e-3])] * 20, CPU, engine(), source="made up")


def test_the_commands(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, profile, out = tmp_path / "rows.jsonl", tmp_path / "cpu.yaml", tmp_path / "engine.yaml"
    for row in grid(model, noise=0.03):
        append_jsonl(rows, row)
    save_profile(CPU, profile)
    options = ["--measurements", str(rows), "--hardware", str(profile)]
    assert (
        ridgepoint.main(["calibrate", *options, "--held-out", "0.5", "--draws", "4", "--out", str(out), "--json"]) == 0
    )
    text, progress = capsys.readouterr()
    document = json.loads(text)
    assert progress == ""
    assert document["summary"]["forward, held out"]["median_absolute_error"] < 0.1
    assert ridgepoint.main(["validate", *options, "--engine", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["summary"]) == {"forward, held out", "forward, fitted"}
    assert len(document["rows"]) == 150
    assert ridgepoint.main(["validate", *options, "--engine", str(out)]) == 0
    assert "held out" in capsys.readouterr().out
    assert ridgepoint.main(["calibrate", *options, "--out", str(tmp_path / "engine.txt")]) == 2
    assert ".yaml" in capsys.readouterr().err


def test_operators_of_a_forward_are_predicted_one_by_one(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is predicted of each adds up to the forward; the sampler's time, which is not in it, is left out."""
    whole = replace(measurement(model, 4, 17, 256, "grouped", [1.0]), kernels=KernelConfig(threads=1, engine="lean"))
    names = "embedding norms_residual qkv cca attention output router experts lm_head".split()
    parts = [replace(whole, kind="operator", operator=name) for name in names]
    found = validate([whole, *parts], CPU)
    call = load_engine("ridgepoint-lean").host_costs(CPU).forward_seconds  # of all layers, and of no operator
    assert sum(r.predicted_seconds for r in found[1:]) + call == pytest.approx(found[0].predicted_seconds)
    assert len({r.name for r in found}) == len(found)
    with pytest.raises(UserError, match=r"operator of a forward.*'warp'.*experts"):
        validate([replace(parts[0], operator="warp")], CPU)
    path = tmp_path / "operators.jsonl"
    for part in [*parts, replace(whole, kind="operator", operator="sampler")]:
        append_jsonl(path, part)
    profile = save_profile(CPU, tmp_path / "cpu.yaml")
    assert ridgepoint.main(["validate", "--measurements", str(path), "--hardware", str(profile), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["rows"]) == len(parts) and data["not_compared"] == 1 and data["engine"] == "ridgepoint-lean"


def test_operators_are_fitted_to_and_held_out_with_their_forwards(model: str) -> None:
    base = replace(measurement(model, 1, 17, 256, "grouped", [1.0]), kernels=KernelConfig(threads=1, engine="lean"))
    forwards = [replace(base, workload=Workload(batch=b), context=c) for b in (1, 2, 4, 8) for c in range(64, 500, 48)]
    rows = forwards + [replace(f, kind="operator", operator=name) for f in forwards for name in ("qkv", "experts")]
    lean, truth = load_engine("ridgepoint-lean"), {"dispatch": 3.0, "matmul": 0.3, "weights": 0.6, "attention": 0.2}
    seconds, _ = MeasuredPoints(rows, CPU, "uniform").predict(dataclasses.replace(lean, scale=lean.scale | truth))
    rows = [replace(row, seconds=(float(s),)) for row, s in zip(rows, seconds, strict=True)]
    kept, apart = split(rows, 0.3)
    assert len(kept) % 3 == len(apart) % 3 == 0 and apart
    assert not {point_name(m, operator=False) for m in kept} & {point_name(m, operator=False) for m in apart}
    fitted = calibrate(kept, CPU, lean, source="made up")
    assert fitted.scale["matmul"] == pytest.approx(0.3, rel=0.05)
    found = summaries(validate(apart, CPU, engine=fitted))
    assert set(found) == {"forward, held out", "operator, held out"}
    assert found["operator, held out"].median_absolute_error < 0.03


def test_rows_of_several_engines_are_not_fitted_together(model: str) -> None:
    row = measurement(model, 1, 1, 64, "loop", [1.0])
    rows = [row, replace(row, kernels=KernelConfig(engine="lean"))]
    with pytest.raises(UserError, match="rows of one engine are needed, but they were run by eager, lean"):
        validate(rows, CPU)
