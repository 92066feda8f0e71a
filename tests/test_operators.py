"""Operators timed in place: none is missing, none is counted twice, and the model is left as it was."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hardware.files import UserError
from ridgepoint import app
from runtime.bench import Identity, identify, measure_forward, prefill
from runtime.checkpoint import random_model, save_model
from runtime.config import KernelConfig, ModelConfig
from runtime.engines import use_engine
from runtime.fused import OPERATORS
from runtime.kernels.native import obstacle
from runtime.measurement import Measurement, append_jsonl, read_jsonl
from runtime.model.zaya import Zaya
from runtime.operators import SAMPLER, _DeviceClock, measure_operators, total_seconds
from tests.test_bench import TINY

ENGINES = ("eager", "lean")
NAMES = {*OPERATORS.values(), SAMPLER}
POINTS: list[dict[str, Any]] = [
    {"kind": "decode", "batch": 2, "slots": 1, "context": 7},
    {"kind": "draft", "batch": 1, "slots": 5, "context": 7},
    {"kind": "verify", "batch": 2, "slots": 5, "context": 7},
    {"kind": "single", "batch": 1, "slots": 12, "context": 7, "levels": (0, 2)},
]


@pytest.fixture(params=ENGINES)
def model(request: pytest.FixtureRequest) -> Zaya:
    assert obstacle() is None
    return use_engine(random_model(TINY, seed=1).freeze(), request.param)


@pytest.fixture
def identity(model: Zaya) -> Identity:
    return identify(model, "tiny", "pytest", simulated="random weights")


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point["kind"])
def test_every_operator_has_a_record_that_says_what_it_is(
    model: Zaya, identity: Identity, point: dict[str, Any], tmp_path: Path
) -> None:
    found = measure_operators(model, identity, **point, repeats=3, warmup=1)
    assert [record.operator for record in found] == list(dict.fromkeys(record.operator for record in found))
    assert {record.operator for record in found} == NAMES
    for record in found:
        assert (record.kind, record.forward, len(record.seconds)) == ("operator", point["kind"], 3)
        assert (record.slots, record.context, record.workload.batch) == (point["slots"], 7, point["batch"])
        assert record.kernels.engine == model.kernels.engine
        append_jsonl(tmp_path / "runs.jsonl", record)
    assert read_jsonl(tmp_path / "runs.jsonl") == found


def test_the_same_forward_is_timed(model: Zaya, identity: Identity) -> None:
    """As many experts, at settings with the same forward in their step."""
    at: dict[str, Any] = {"kind": "verify", "batch": 2, "slots": 5, "context": 7, "repeats": 1}
    forward, (part, *_) = measure_forward(model, identity, **at), measure_operators(model, identity, **at)
    assert part.experts_per_layer == forward.experts_per_layer
    assert (part.decoding, part.workload, part.kernels) == (forward.decoding, forward.workload, forward.kernels)


def test_nothing_is_left_behind(model: Zaya, identity: Identity) -> None:
    """The cache, the results and the model's methods are what they were."""
    filled = prefill(model, 2, 9, 6)
    before = [{k: v.clone() for k, v in filled.cache.state(row).items()} for row in range(2)]
    forward = model.run
    measure_operators(model, identity, kind="draft", batch=2, slots=6, context=9, prefilled=filled, repeats=2)
    for row, state in enumerate(before):
        assert all(torch.equal(v, state[k]) for k, v in filled.cache.state(row).items())
    assert model.run == forward
    timed = {"forward", "project", "embed", "qkv", "cca", "attention", "output"}
    assert all(not timed & vars(module).keys() for module in model.modules())


def test_an_operator_that_takes_longer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 ms in each layer's router appear there and nowhere else."""
    model = use_engine(random_model(TINY, seed=1).freeze(), "eager")
    identity = identify(model, "tiny", "pytest")
    for layer in model.stack:
        router = layer.mlp.gate.forward

        def slow(*arguments: Any, router: Callable[..., Any] = router) -> Any:
            time.sleep(0.02)
            return router(*arguments)

        monkeypatch.setattr(layer.mlp.gate, "forward", slow)
    found = {
        record.operator: record.median_seconds
        for record in measure_operators(model, identity, kind="decode", batch=1, slots=1, context=3, repeats=3)
    }
    assert found["router"] >= 0.02 * len(model.stack)
    assert max(seconds for name, seconds in found.items() if name != "router") < found["router"]


def test_the_sampler_is_no_part_of_the_forward(identity: Identity, model: Zaya) -> None:
    found = measure_operators(model, identity, kind="decode", batch=1, slots=1, context=3, repeats=3)
    (sampler,) = (record for record in found if record.operator == SAMPLER)
    whole = sum(record.median_seconds for record in found)
    assert total_seconds(found) == pytest.approx(whole - sampler.median_seconds)


def test_compiled_operators_cannot_be_told_apart() -> None:
    model = random_model(TINY, seed=1).freeze()
    identity = identify(model, "tiny", "pytest")
    model.kernels = KernelConfig(engine="compiled")
    with pytest.raises(UserError, match="eager, lean or graphs: compiled fuses them"):
        measure_operators(model, identity, kind="decode", batch=1, slots=1, context=3)


class Device:
    """A GPU's queue: sleeps and operators take their time behind what was queued before, and the host goes on.

    Until the queue is full: then the host waits for the first of what is queued.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.free = 0.0  # now on the host, and when the device has done what is queued
        self.pending: deque[float] = deque(maxlen=1000)  # when each of the last commands is done
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                device.queue(0.0)
                self.at = device.free

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue(cycles / 1.7e9))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: self.wait())
        monkeypatch.setattr(time, "perf_counter", lambda: self.host)

    def queue(self, seconds: float, launch_seconds: float = 0.0) -> None:
        if len(self.pending) == self.pending.maxlen:
            self.host = max(self.host, self.pending[0])
        self.host += launch_seconds
        self.free = max(self.free, self.host) + seconds
        self.pending.append(self.free)

    def wait(self) -> None:
        self.host = max(self.host, self.free)


@pytest.mark.parametrize("layers", [4, 900], ids=["few", "more than the queue takes"])
def test_on_a_gpu_launches_do_not_show(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches take ten times as long as what they launch; from the second forward on only the latter is counted."""
    device = Device(monkeypatch)
    clock = _DeviceClock(torch.device("cuda"))
    # A call of two launches: the second one's launch stands between them, unless the queue is full.
    router = clock.around("router", lambda: [device.queue(2e-6, 2e-5) for _ in range(2)])
    experts = clock.around("experts", lambda: [device.queue(5e-6, 5e-5) for _ in range(2)])
    spent = []
    for _ in range(3):
        clock.begin()
        for _ in range(layers):
            router()
            experts()
        spent.append(clock.end())
    assert spent[0]["router"] > layers * 4e-6 * 2
    for later in spent[1:]:
        assert later == pytest.approx({"router": layers * 4e-6, "experts": layers * 10e-6})


@pytest.mark.parametrize("cause", ["compiles at first", "waits for the device"])
def test_a_slow_pass_does_not_lengthen_the_holds(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a hold itself, where an operator waits for the device."""
    device = Device(monkeypatch)
    clock = _DeviceClock(torch.device("cuda"))
    extra = 3.0 if cause == "compiles at first" else 0.0

    def run() -> None:
        device.queue(1e-5, 1e-5 + extra)
        if cause == "waits for the device":
            device.wait()

    experts, took = clock.around("experts", run), []
    for _ in range(5):
        began = device.host
        clock.begin()
        for _ in range(64):
            experts()
        clock.end()
        took.append(device.host - began)
        extra = 0.0
    assert took[-1] < 64 * 2e-5 * 5


def test_the_command_prints_and_keeps_them(tmp_path: Path) -> None:
    save_model(random_model(TINY, seed=1), tmp_path / "tiny")
    out = tmp_path / "runs.jsonl"
    arguments = ["bench", "--model", str(tmp_path / "tiny"), "--batch", "1", "--context", "5", "--repeats", "2"]
    run = CliRunner().invoke(app, [*arguments, "--operators", "--out", str(out)])
    assert run.exit_code == 0, run.output
    records: list[Measurement] = read_jsonl(out)
    assert [record.kind for record in records] == ["forward"] + ["operator"] * len(NAMES)
    assert {record.operator for record in records[1:]} == NAMES
    assert all(name in run.output for name in (*NAMES, "% of the forward"))


def test_generations_have_no_operators(tmp_path: Path) -> None:
    save_model(random_model(ModelConfig(**vars(TINY)), seed=1), tmp_path / "tiny")
    run = CliRunner().invoke(app, ["bench", "--model", str(tmp_path / "tiny"), "--operators", "--new-tokens", "4"])
    assert run.exit_code != 0
    assert "not both" in f"{run.output}{run.exception}"
