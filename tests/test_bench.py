"""Bench: what is timed is repeatable, records say where they came from, comparisons are fair."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import batching
from hardware.files import UserError, plain
from runtime.bench import Identity, identify, interleave, measure_forward, paired_ratio, prefill, token_rows
from runtime.bench_generation import fair_count, measure_generation, sample_generation, task_prompts
from runtime.checkpoint import model_hash, random_model, save_model
from runtime.config import DecodingConfig, KernelConfig, ModelConfig, replace
from runtime.engine import generate
from runtime.layout import Layout, causal
from runtime.measurement import append_jsonl, interval_name, read_jsonl
from runtime.model.zaya import Zaya
from runtime.policy import using
from runtime.samplers.state import Decode
from runtime.tokenizer import BOS, VOCABULARY

TINY = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=4,
    moe_intermediate_size=24,
    router_hidden_size=16,
    max_position_embeddings=1100,
    eos_token_id=258,
    mask_token_id=259,
)


@pytest.fixture(scope="module")
def model() -> Zaya:
    return random_model(TINY, seed=1).freeze()


@pytest.fixture(scope="module")
def identity(model: Zaya) -> Identity:
    return identify(model, "tiny", "pytest", simulated="random weights")


def test_a_record_survives_the_file_and_says_where_it_came_from(
    model: Zaya, identity: Identity, tmp_path: Path
) -> None:
    forward = measure_forward(model, identity, kind="draft", batch=2, slots=5, context=7, repeats=4, warmup=1)
    whole = measure_generation(
        model, identity, task_prompts(model, 3), DecodingConfig("two_forward", 4), batch=2, max_new_tokens=6, repeats=2
    )
    for record in (forward, whole):
        append_jsonl(tmp_path / "runs.jsonl", record)
        assert record.model_hash == model_hash(model)
        assert record.simulated == "random weights"
        assert record.device["torch"] == torch.__version__
        assert record.kernels.threads == torch.get_num_threads()
    assert read_jsonl(tmp_path / "runs.jsonl") == [forward, whole]
    assert (len(forward.seconds), forward.slots, forward.context, forward.workload.batch) == (4, 5, 7, 2)
    assert (forward.kind, forward.forward, whole.kind, whole.forward) == ("forward", "draft", "generation", None)
    assert forward.experts_per_layer is not None and 0 < forward.experts_per_layer <= TINY.num_experts


@pytest.mark.parametrize(("kind", "slots"), [("decode", 1), ("draft", 6), ("verify", 6), ("single", 6)])
def test_a_timed_forward_leaves_the_cache_as_it_was(model: Zaya, identity: Identity, kind: str, slots: int) -> None:
    """So every repeat does the same work, and one prefill serves all kinds."""
    filled = prefill(model, 2, 9, 6)
    before = [{k: v.clone() for k, v in filled.cache.state(row).items()} for row in range(2)]
    measure_forward(model, identity, kind=kind, batch=2, slots=slots, context=9, prefilled=filled, repeats=3)
    assert filled.cache.lengths == [9, 9]
    for row in range(2):
        for name, tensor in filled.cache.state(row).items():
            assert torch.equal(tensor, before[row][name]), name


def test_a_prefilled_cache_continues_like_the_whole_text(model: Zaya) -> None:
    """Also over more than one prefill chunk."""
    rows = token_rows(model, 2, 523)
    filled = prefill(model, 2, 520, 3, tokens=rows)
    assert filled.following.tolist() == [row[520:] for row in rows]
    with torch.inference_mode():
        continued = model.project(model.forward(filled.following, causal(3), filled.cache))
        whole = model.logits(torch.tensor(rows))[:, 520:]
    assert torch.allclose(continued, whole, atol=1e-4 * float(whole.abs().max()))


def test_more_slots_take_longer(identity: Identity) -> None:
    wide = random_model(replace(TINY, hidden_size=256, moe_intermediate_size=512)).freeze()
    few, many = (
        measure_forward(wide, identity, kind="verify", batch=b, slots=s, context=8, repeats=5)
        for b, s in ((1, 2), (8, 64))
    )
    assert min(many.seconds) > 2 * min(few.seconds)


def test_a_generation_is_the_engines(model: Zaya, identity: Identity) -> None:
    prompts, decoding = task_prompts(model, 4), DecodingConfig("two_forward", draft_tokens=3)
    sample = sample_generation(model, prompts, decoding, batch=2, max_new_tokens=10)
    results = [generate(model, prompts[i : i + 2], decoding, max_new_tokens=10) for i in (0, 2)]
    assert [list(o) for o in sample.outputs] == [t for r in results for t in r.tokens]
    assert sample.tokens == sum(map(len, sample.outputs))
    assert sample.forwards == sum(r.forwards for r in results)
    record = measure_generation(model, identity, prompts, decoding, batch=2, max_new_tokens=10, repeats=3)
    assert record.workload.batch == 2
    assert record.forwards == 3 * sample.forwards
    steps = sum(sum(r.steps) for r in results)
    assert record.acceptance_length == pytest.approx(sample.tokens / steps)
    baseline = measure_generation(model, identity, prompts, DecodingConfig(), max_new_tokens=10, repeats=1)
    assert baseline.acceptance_length is None
    assert len(baseline.tokens) == 1


def test_continuous_batching_gives_the_same_text_on_slots_that_are_refilled(model: Zaya, identity: Identity) -> None:
    prompts, decoding = task_prompts(model, 6), DecodingConfig("single_forward", 3, proposal_levels=(0, 2))
    limits = [3, 12, 5, 9, 1, 12]
    closed, continuous = (
        sample_generation(model, prompts, decoding, batch=2, batching=mode, max_new_tokens=limits)
        for mode in ("closed", "continuous")
    )
    assert closed.outputs == continuous.outputs and [len(o) for o in closed.outputs] <= limits
    assert continuous.forwards < closed.forwards  # closed batches of 2 wait for the longer one
    assert continuous.full_tokens > closed.full_tokens > 0
    assert continuous.prefill_seconds > 0
    record = measure_generation(
        model, identity, prompts, decoding, batch=2, batching="continuous", max_new_tokens=4, repeats=1
    )
    assert record.batching == "continuous" and record.full_tokens_per_second is not None
    assert record.full_tokens_per_second > 0


def test_a_record_of_before_says_that_its_batches_were_closed(model: Zaya, identity: Identity, tmp_path: Path) -> None:
    record = measure_generation(model, identity, task_prompts(model, 2), DecodingConfig(), max_new_tokens=2, repeats=1)
    old = {k: v for k, v in plain(record).items() if k not in ("batching", "full_tokens_per_second")}
    (tmp_path / "old.jsonl").write_text(json.dumps(old) + "\n")
    [read] = read_jsonl(tmp_path / "old.jsonl")
    assert read == replace(record, full_tokens_per_second=None) and read.batching == "closed"


def test_a_timed_single_forward_is_the_samplers(
    model: Zaya, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same slots, the same layout; as many rows of the LM head as a step projects."""
    seen: list[tuple[int, Layout]] = []
    projected: list[int] = []
    run, project = Zaya.run, Zaya.project

    def noted(self: Zaya, tokens: Tensor, layout: Layout, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen.append((tokens.shape[1], layout))
        return run(self, tokens, layout, *args, **kwargs)

    def counted(self: Zaya, hidden: Tensor) -> Tensor:
        projected.append(hidden.shape[1])
        return project(self, hidden)

    monkeypatch.setattr(Zaya, "run", noted)
    monkeypatch.setattr(Zaya, "project", counted)
    decoding = DecodingConfig("single_forward", 3, proposal_levels=(0, 2))
    generate(model, [[1, 2]], decoding, max_new_tokens=1)
    step, rows = seen[-1], sum(projected)
    projected.clear()
    record = measure_forward(
        model, identity, kind="single", batch=1, slots=12, levels=(0, 2), context=1, repeats=1, warmup=0
    )
    assert seen[-1] == step and projected == [rows, rows]
    assert record.decoding == decoding and record.forward == "single"


BATCHING = ["--requests", "6", "--batch", "2", "--rounds", "1", "--new-tokens", "8"]


def test_the_batching_program_finds_a_difference(
    model: Zaya, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(model, tmp_path)
    arguments = ["--model", str(tmp_path), *BATCHING]
    assert batching.main([*arguments, "--out", str(tmp_path / "batching.json")]) == 0
    assert capsys.readouterr().out.count("| 0 |") == len(batching.WAYS)
    found = json.loads((tmp_path / "batching.json").read_text())
    for way in found["ways"].values():
        assert 0 < way["continuous"]["full_share_of_seconds"] <= 1
        assert way["different"] == {"closed": [], "continuous": []}
    put = Decode.put

    def wrong(decode: Decode, rows: list[int], source: Decode) -> None:  # the anchor of who was there before
        anchors = decode.anchors
        put(decode, rows, source)
        decode.anchors = anchors

    monkeypatch.setattr(Decode, "put", wrong)
    monkeypatch.setattr(batching, "WAYS", {"autoregressive": DecodingConfig()})
    assert batching.main([*arguments, "--json"]) == 1
    way = json.loads(capsys.readouterr().out)["ways"]["autoregressive"]
    assert way["different"]["closed"] == []
    assert all(d["margin"] > 0 for d in way["different"]["continuous"] if d["position"] is not None)


def test_kernel_settings_hold_for_the_run_only(model: Zaya, identity: Identity) -> None:
    before, threads = model.kernels, torch.get_num_threads()
    dense = KernelConfig({1_000_000: "dense"}, threads=1)
    record = measure_forward(model, identity, kind="decode", batch=2, slots=1, context=4, kernels=dense, repeats=1)
    assert record.kernels == dense
    assert model.kernels.experts == before.experts and torch.get_num_threads() == threads
    with pytest.raises(ZeroDivisionError), using(model, dense):
        raise ZeroDivisionError
    assert model.kernels.experts == before.experts


def test_runs_alternate_and_no_run_is_always_first() -> None:
    order: list[str] = []
    done: list[int] = []
    results = interleave(
        {"a": lambda: order.append("a") or len(order), "b": lambda: order.append("b") or len(order)},
        3,
        warmup=1,
        progress=done.append,
    )
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]  # the first pair is the warm-up
    assert results == {"a": [3, 6, 7], "b": [4, 5, 8]}
    assert done == list(range(1, 9))


def test_a_ratio_of_rounds_does_not_see_the_machines_drift() -> None:
    drift = [1.0, 1.5, 4.0, 2.0, 1.0, 3.0, 1.2]
    noise = [1.0, 1.02, 0.98, 1.01, 0.99, 1.0, 1.03]
    slow = [2 * d for d in drift]
    fast = [d * n for d, n in zip(drift, noise, strict=True)]
    ratio, low, high = paired_ratio(slow, fast)
    assert 1.9 < low <= ratio <= high < 2.1
    assert paired_ratio(slow, fast) == (ratio, low, high)
    assert paired_ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)
    with pytest.raises(UserError, match="pairs"):
        paired_ratio([1.0], [])


def test_an_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    rng = random.Random(0)
    for rounds in (6, 9, 12):
        pairs = [([rng.lognormvariate(0, 0.1) for _ in range(rounds)], [1.0] * rounds) for _ in range(1000)]
        found = [paired_ratio(*pair) for pair in pairs]
        assert sum(low <= 1 <= high for _, low, high in found) > 0.93 * len(found)
        assert interval_name(rounds) == "95% interval"
    assert interval_name(5) == "range of 5 rounds"


def test_interleaved_sleeps_have_their_ratio() -> None:
    def sleep(seconds: float) -> float:
        began = time.perf_counter()
        time.sleep(seconds)
        return time.perf_counter() - began

    found = interleave({"long": lambda: sleep(0.05), "short": lambda: sleep(0.005)}, 5)
    ratio, low, high = paired_ratio(found["long"], found["short"])
    assert low <= ratio <= high
    assert ratio > 1.5


def test_prompts_are_held_out_tasks_and_repeat(model: Zaya) -> None:
    prompts = task_prompts(model, 12, seed=5)
    assert prompts == task_prompts(model, 12, seed=5) != task_prompts(model, 12, seed=6)
    assert all(p[0] == BOS and p[-1] == ord("\n") for p in prompts)
    other = random_model(replace(TINY, vocab_size=300)).freeze()
    assert {max(r) < 300 for r in token_rows(other, 3, 20)} == {True}
    assert max(map(max, token_rows(other, 3, 200))) >= VOCABULARY


def test_every_family_is_asked_equally_often_and_every_batch_is_full(model: Zaya) -> None:
    for least, batch in ((1, 1), (10, 8), (41, 8), (3, 7)):
        count = fair_count(least, batch)
        assert count >= least and count % batch == 0
        starts = Counter(bytes(prompt[1:4]) for prompt in task_prompts(model, count))
        assert starts[b"add"] == starts[b"rev"] == starts[b"sor"] == count / 10
    with pytest.raises(UserError, match="batch >= 1"):
        fair_count(1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "guess"}, "unknown kind of forward 'guess'; known: decode, draft, single, verify"),
        ({"kind": "decode", "slots": 2}, "a decode forward has 1 slot"),
        ({"kind": "draft", "slots": 1}, "at least 2 slots"),
        ({"kind": "single", "slots": 5}, "\\(K \\+ 1\\) \\* \\(1 \\+ 1\\) slots for the levels \\(0,\\), but got 5"),
        ({"kind": "single", "slots": 4, "levels": (0, 3)}, "slots for the levels \\(0, 3\\), but got 4"),
        ({"kind": "single", "slots": 6, "levels": (0, 3)}, "proposal_levels must ascend"),
        ({"batch": 0}, "batch >= 1"),
        ({"repeats": 0}, "repeats >= 1"),
        ({"context": 1099}, "must fit the model's 1100 positions, but got 1099 \\+ 4"),
        ({"context": -1}, "context >= 0"),
    ],
)
def test_impossible_points_are_refused(
    model: Zaya, identity: Identity, changes: dict[str, object], message: str
) -> None:
    point = {"kind": "verify", "batch": 1, "slots": 4, "context": 8} | changes
    with pytest.raises(UserError, match=message):
        measure_forward(model, identity, **point)


def test_a_model_without_masks_cannot_draft(identity: Identity) -> None:
    plain = random_model(replace(TINY, mask_token_id=None)).freeze()
    with pytest.raises(UserError, match="no mask_token_id"):
        measure_forward(plain, identity, kind="draft", batch=1, slots=4, context=8)
