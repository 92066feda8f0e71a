"""Steps over static buffers give what eager steps give: here without a GPU, where a replay runs the step itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime import engines, graphs
from runtime.batching import Batcher, Request
from runtime.config import DecodingConfig, Engine, KernelConfig, replace
from runtime.engine import GenerationResult, generate
from runtime.fused import reference_ops
from runtime.graphs import StaticRandomness, bucket
from runtime.model.zaya import Zaya
from runtime.samplers.acceptance import Randomness
from tests.models import noisy_model, random_ids

torch.set_num_threads(1)
SETTINGS = {
    "autoregressive": DecodingConfig(),
    "two_forward": DecodingConfig("two_forward", 4),
    "anchored": DecodingConfig("two_forward", 3, anchor_draft=True),
    "mixed": DecodingConfig("two_forward", 4, mixing_weight=0.5),
    "dense levels": DecodingConfig("single_forward", 4),
    "sparse levels": DecodingConfig("single_forward", 6, proposal_levels=(0, 2, 5)),
    "mixed levels": DecodingConfig("single_forward", 3, mixing_weight=0.4),
    "verified": DecodingConfig("denoising", 5, denoising_steps=2, verify=True),
    "by confidence": DecodingConfig("denoising", 5, denoising_steps=2, confidence_threshold=0.4, verify=True),
    "unverified": DecodingConfig("denoising", 5, denoising_steps=3),
}
EACH = pytest.mark.parametrize("decoding", SETTINGS.values(), ids=SETTINGS)
PROMPTS = [row[: 2 + 3 * i].tolist() for i, row in enumerate(random_ids(5, 14, 28, seed=3))]
LIMITS = [9, 3, 12, 7, 10]


@pytest.fixture(autouse=True)
def _reference_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine `graphs` with plain torch operators, on the CPU."""
    monkeypatch.setattr(engines, "operators", lambda *_: reference_ops())
    monkeypatch.setattr(engines, "obstacle", lambda *_: None)
    yield


@cache
def model() -> Zaya:
    return noisy_model(seed=2)


def run(engine: Engine, decoding: DecodingConfig, batch: int | None = None, seed: int = 0) -> GenerationResult:
    model().kernels = KernelConfig(engine=engine)
    try:
        return generate(model(), PROMPTS, decoding, max_new_tokens=LIMITS, seed=seed, stop_tokens=[7], batch=batch)
    finally:
        model().kernels = KernelConfig()


def warm(decoding: DecodingConfig) -> DecodingConfig:
    judged = decoding.drafts and decoding.denoising_steps == 1 and (decoding.verify or decoding.sampler != "denoising")
    return replace(decoding, temperature=1.0, draft_temperature=0.7 if judged else 0.0)


@pytest.mark.parametrize("batch", [None, 1, 3], ids=["closed", "alone", "refilled"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@EACH
def test_replayed_steps_give_the_eager_tokens_and_counters(
    decoding: DecodingConfig, sampled: bool, batch: int | None
) -> None:
    decoding = warm(decoding) if sampled else decoding
    eager, replayed = run("eager", decoding, batch, seed=4), run("graphs", decoding, batch, seed=4)
    assert replayed.tokens == eager.tokens
    assert replayed.acceptance_histogram == eager.acceptance_histogram
    assert replayed.counters.keys() == eager.counters.keys()
    for kind, counter in eager.counters.items():
        found = replayed.counters[kind]
        assert (found.forwards, found.slots) == (counter.forwards, counter.slots), kind
        assert found.experts_per_layer() == pytest.approx(counter.experts_per_layer()), kind


HOST = (  # reading a value back; copying a list to the device; a shape that depends on values
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.nonzero.default,
)


class Recorder(TorchDispatchMode):
    """What a GPU graph is, on a CPU: the operators that ran, with their tensors, and nothing of Python between them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in HOST, f"a captured step must leave the host alone, but called {func}"
        if func is torch.ops.aten.index.Tensor:
            assert all(index.dtype != torch.bool for index in tensors(args[1])), "a mask's shape depends on values"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Run them again, each into the memory of its first result."""
        for func, args, kwargs, out in self.calls:
            given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
            for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # else a view of its input, or the input itself
                    old.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def recorded(function: Any, _device: torch.device, *, warm: Any, pool: Any, stream: Any) -> Any:
    """In the place of `graphs.captured`."""
    warm()
    warm()
    recorder = Recorder()
    with recorder:
        function()
    return recorder.replay


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@EACH
def test_a_captured_step_depends_on_nothing_but_its_buffers(
    decoding: DecodingConfig, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = warm(decoding) if sampled else decoding
    expected = run("eager", decoding, 3, seed=4)
    model().leased = None
    monkeypatch.setattr(graphs, "captured", recorded)
    for _ in range(2):  # the second time on the graphs of the first
        found = run("graphs", decoding, 3, seed=4)
        assert found.tokens == expected.tokens
        for kind, counter in expected.counters.items():
            assert found.counters[kind].experts_per_layer() == pytest.approx(counter.experts_per_layer()), kind
    model().leased = None


def test_a_graph_serves_every_number_of_sequences_up_to_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    build = graphs.StepGraph.__init__

    def counted(self: graphs.StepGraph, *arguments: object) -> None:
        made.append(arguments[2])  # type: ignore[arg-type]
        build(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(graphs.StepGraph, "__init__", counted)
    run("graphs", SETTINGS["two_forward"])
    assert sorted(made) == sorted(set(made)) and set(made) <= {1, 2, 4, 8}


def test_the_next_generation_finds_the_graphs_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding = warm(SETTINGS["sparse levels"])
    expected = [run("eager", decoding, seed=seed).tokens for seed in (1, 2)]
    model().train().freeze()
    assert run("graphs", decoding, seed=1).tokens == expected[0]
    cache = model().leased[0]
    monkeypatch.setattr(graphs.StepGraph, "capture", lambda *_: pytest.fail("captured again"))
    assert run("graphs", decoding, seed=2).tokens == expected[1]
    assert model().leased[0] is cache


def test_a_cache_in_use_is_nobody_elses() -> None:
    own = noisy_model()
    own.kernels = KernelConfig(engine="graphs")
    owners = [Batcher(own, DecodingConfig(), batch=2, context=20) for _ in range(2)]
    caches = [graphs.lease(own, owner, 2, 20, 1, 2) for owner in owners]
    assert caches[0] is not caches[1]
    assert graphs.lease(own, owners[0], 1, 20, 1, 2) is caches[0]
    larger = graphs.lease(own, owners[0], 3, 20, 1, 3)
    assert larger is not caches[0] and larger.rows == 4 and larger.capacity == graphs.CAPACITY_STEP
    del owners
    assert graphs.lease(own, own, 2, 200, 1, 4) is larger


def test_what_is_left_behind_frees_its_memory_at_once() -> None:
    own = noisy_model()
    own.kernels = KernelConfig(engine="graphs")
    gc.disable()
    try:
        generate(own, [[1, 2]], SETTINGS["dense levels"], max_new_tokens=5)
        cache = ref(own.leased[0])
        assert cache() is not None
        own.leased = None
        assert cache() is None
    finally:
        gc.enable()


def test_a_dropped_model_frees_its_memory_at_once() -> None:
    """With the cache and the graphs that it keeps for the next generation."""
    own = noisy_model()
    own.kernels = KernelConfig(engine="graphs")
    gc.disable()
    try:
        generate(own, [[1, 2]], SETTINGS["mixed levels"], max_new_tokens=5)
        left = ref(own), ref(own.leased[0])
        assert all(found() is not None for found in left)
        del own
        assert [found() for found in left] == [None, None]
    finally:
        gc.enable()


def test_graphs_of_one_cache_share_the_logits_of_their_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "captured", recorded)
    decoding = SETTINGS["mixed levels"]
    model().leased = None
    assert run("graphs", decoding, seed=4).tokens == run("eager", decoding, seed=4).tokens
    made = model().leased[0].bound.graphs._graphs
    logits = [graph._drafted.logits for graph in made.values()]
    assert len(logits) > 1 and [len(part) for part in logits] == [rows for rows, _ in made]
    assert len({part.untyped_storage().data_ptr() for part in logits}) == 1
    model().leased = None


@pytest.mark.parametrize("failing", ["warm-up", "capture"])
def test_after_a_capture_that_failed_the_next_try_starts_clean(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what it had made, and with the lengths of before."""
    decoding = warm(SETTINGS["sparse levels"])
    expected = run("eager", decoding, seed=1).tokens
    model().kernels = KernelConfig(engine="graphs")
    model().leased = None

    def fail(function: Any, _device: torch.device, *, warm: Any, **_: Any) -> Any:
        warm() if failing == "capture" else function()
        raise torch.OutOfMemoryError

    try:
        batcher, found = Batcher(model(), decoding, batch=5, context=40), {i: [] for i in range(len(PROMPTS))}
        for index, prompt in enumerate(PROMPTS):
            batcher.submit(Request(prompt, LIMITS[index], (1, index), (7,)))
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(graphs, "captured", fail)
            batcher.step()
        cache = model().leased[0]
        assert cache.bound.graphs is None and cache.device_lengths().tolist()[:5] == cache.lengths
        while batcher.active or batcher.waiting:
            for event in batcher.step():
                found[event.id] += event.tokens
        assert list(found.values()) == expected
    finally:
        model().kernels = KernelConfig()
        model().leased = None


class Stream:
    """Of a GPU: torch hands out the same few in turn."""

    made = 0

    def __init__(self, _device: object) -> None:
        self.index, Stream.made = Stream.made % 3, Stream.made + 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.index == self.index

    __hash__ = None  # type: ignore[assignment]

    def wait_stream(self, _other: Stream) -> None: ...


def test_no_capture_runs_on_the_stream_of_the_warm_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is one for all of them; those that share a pool are captured on the stream they are given."""
    graphs._aside.cache_clear()
    entered: list[Stream] = []
    captures: list[Stream] = []

    def capture(_graph: object, *, stream: Stream, **_: object) -> Any:
        captures.append(stream)
        return nullcontext()

    def enter(stream: Stream) -> Any:
        entered.append(stream)
        return nullcontext()

    current = Stream(None)
    fakes = {
        "Stream": Stream,
        "stream": enter,
        "current_stream": lambda _: current,
        "CUDAGraph": lambda: SimpleNamespace(replay=None),
        "graph": capture,
        "device": lambda _: nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    device, own = torch.device("cuda", 0), Stream(None)
    for _ in range(7):
        graphs.captured(lambda: None, device)
    graphs.captured(lambda: None, device, stream=own)  # type: ignore[arg-type]
    graphs._aside.cache_clear()
    warm_ups = [stream for stream in entered if stream is not current]
    assert len(warm_ups) == 8 and all(stream is warm_ups[0] for stream in warm_ups)
    assert captures[-1] is own and all(stream != warm_ups[0] for stream in captures[:-1])


def test_the_least_recently_used_graph_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    decoding = warm(SETTINGS["dense levels"])
    assert run("graphs", decoding).tokens == run("eager", decoding).tokens


def test_a_trace_takes_the_steps_as_they_are() -> None:
    trace: list = []
    model().kernels = KernelConfig(engine="graphs")
    try:
        found = generate(model(), PROMPTS, SETTINGS["two_forward"], max_new_tokens=LIMITS, stop_tokens=[7], trace=trace)
    finally:
        model().kernels = KernelConfig()
    assert found.tokens == run("eager", SETTINGS["two_forward"]).tokens
    assert trace and all(step.logits.dtype == torch.float32 for step in trace)


def test_requests_that_come_and_go_between_steps_change_nothing() -> None:
    decoding = warm(SETTINGS["sparse levels"])
    outputs = []
    for engine in ("eager", "graphs"):
        model().kernels = KernelConfig(engine=engine)  # type: ignore[arg-type]
        batcher, found = Batcher(model(), decoding, batch=4, context=40), {}
        for index, prompt in enumerate(PROMPTS):
            found[batcher.submit(Request(prompt, LIMITS[index], (1, index), ()))] = []
            for event in batcher.step():
                found[event.id] += event.tokens
            if index == 3:
                batcher.cancel(2)
        while batcher.active or batcher.waiting:
            for event in batcher.step():
                found[event.id] += event.tokens
        outputs.append(found)
    model().kernels = KernelConfig()
    assert outputs[0] == outputs[1]


def test_static_uniforms_are_those_of_each_stream_in_order() -> None:
    static, plain = StaticRandomness(4, torch.device("cpu")), Randomness(3, 2)
    for count in (3, 1, 5):
        assert static.uniform(count, torch.device("cpu")).shape == (4, count)
    static.allocate()
    streams = Randomness(3, 2).generators
    for _ in range(3):
        static.rewind()
        static.fill(streams)
        for count in (3, 1, 5):
            found = static.uniform(count, torch.device("cpu"))[:2]
            assert torch.equal(found, plain.uniform(count, torch.device("cpu")))


def test_a_bucket_holds_its_batch_with_little_padding() -> None:
    for batch in range(1, 700):
        assert batch <= bucket(batch) <= max(2 * batch - 1, batch + 255)
        assert bucket(bucket(batch)) == bucket(batch)
