"""The cache: whatever was drafted, accepted and rejected, its state is that of a fresh prefill of the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardware.files import UserError
from runtime.cache import Cache
from runtime.config import ModelConfig, RopeParameters, replace
from runtime.layout import causal, draft
from runtime.model.zaya import Zaya
from tests.models import TINY, noisy_model, random_ids, relative_error

torch.set_num_threads(1)
SLOTS, ROWS, CAPACITY = 6, 3, 80
CONFIGS: dict[str, ModelConfig] = {
    "plain": TINY,
    "sliding-biased-long": replace(
        TINY,
        layer_types=("hybrid", "hybrid_sliding"),
        sliding_window=5,
        rope_parameters={"hybrid": RopeParameters(1000.0), "hybrid_sliding": RopeParameters(50.0, 1.0)},
        attention_bias=True,
        cca_time0=3,
    ),
}
MODELS = {name: noisy_model(config, seed=1) for name, config in CONFIGS.items()}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def per_row(low: int, high: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(low, high), min_size=ROWS, max_size=ROWS)


OPERATIONS = st.one_of(
    st.tuples(st.just("draft"), st.integers(1, SLOTS - 1), per_row(0, 0)),
    st.tuples(st.just("verify"), st.integers(1, SLOTS), per_row(0, SLOTS)),
    st.tuples(st.just("verify"), st.integers(1, SLOTS), per_row(1, 1)),
    st.tuples(st.just("prefill"), st.integers(1, 15), per_row(0, 15)),
    st.tuples(st.just("rollback"), st.just(0), per_row(0, 2 * SLOTS)),
)


class History:
    """A batch of sequences under random decoding; `kept` is what each of them should consist of."""

    def __init__(self, model: Zaya, seed: int) -> None:
        self.model, self.cache = model, model.new_cache(ROWS, CAPACITY, SLOTS)
        self.kept: list[list[int]] = [[] for _ in range(ROWS)]
        self.generator = torch.Generator().manual_seed(seed)
        self.refused = 0

    def tokens(self, width: int) -> Tensor:
        return torch.randint(0, TINY.vocab_size, (ROWS, width), generator=self.generator)

    def apply(self, kind: str, width: int, numbers: list[int]) -> None:
        if max(self.cache.lengths) + max(width, 1) > CAPACITY:
            return
        if kind == "draft":
            self.model.forward(self.tokens(width + 1), draft(width), self.cache)
        elif kind == "rollback":
            lengths = [max(0, len(row) - n) for row, n in zip(self.kept, numbers, strict=True)]
            try:
                self.cache.rollback(lengths)
            except UserError:
                self.refused += 1
                return
            self.kept = [row[:n] for row, n in zip(self.kept, lengths, strict=True)]
        else:
            tokens, counts = self.tokens(width), [min(width, n) for n in numbers]
            ragged = counts if kind == "prefill" else None
            self.model.forward(tokens, causal(width), self.cache, counts=ragged)
            self.cache.advance(counts)
            for row, new, n in zip(self.kept, tokens.tolist(), counts, strict=True):
                row += new[:n]

    def check(self) -> None:
        assert self.cache.lengths == [len(row) for row in self.kept]
        for row, tokens in enumerate(self.kept):
            assert_same_state(self.cache.state(row), fresh(self.model, tokens).state(0))

    def check_next(self) -> None:
        """A forward from here reads nothing but that state."""
        following = self.tokens(SLOTS - 1)
        found = self.model.forward(following, causal(SLOTS - 1), self.cache)
        for row, tokens in enumerate(self.kept):
            whole = self.model.forward(
                torch.tensor([tokens + following[row].tolist()]), causal(len(tokens) + SLOTS - 1)
            )
            assert relative_error(found[row], whole[0, len(tokens) :]) < 1e-5


def fresh(model: Zaya, tokens: list[int]) -> Cache:
    """The cache of one sequence after a single prefill."""
    cache = model.new_cache(1, CAPACITY, SLOTS)
    if tokens:
        model.forward(torch.tensor([tokens]), causal(len(tokens)), cache)
        cache.advance([len(tokens)])
    return cache


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=60, deadline=None)
@given(operations=st.lists(OPERATIONS, min_size=1, max_size=9), seed=st.integers(0, 10**6))
def test_any_history_leaves_the_state_of_a_fresh_prefill(
    name: str, operations: list[tuple[str, int, list[int]]], seed: int
) -> None:
    with torch.no_grad():
        history = History(MODELS[name], seed)
        for operation in operations:
            history.apply(*operation)
        history.check()
        history.check_next()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_long_run_goes_round_the_ring_many_times(name: str) -> None:
    history = History(MODELS[name], seed=5)
    history.apply("prefill", 15, [15, 2, 0])
    for step in range(12):
        history.apply("draft", SLOTS - 1, [0] * ROWS)
        history.apply("verify", SLOTS, [1 + (step + row) % SLOTS for row in range(ROWS)])
        history.check()
    assert min(history.cache.lengths) > 2 * history.cache.ring


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_step_can_always_be_taken_back(name: str) -> None:
    history = History(MODELS[name], seed=6)
    history.apply("prefill", 9, [9, 4, 1])
    for accepted in (1, SLOTS // 2, SLOTS):
        history.apply("verify", SLOTS, [accepted] * ROWS)
        history.apply("rollback", 0, [accepted] * ROWS)
        assert history.cache.lengths == [9, 4, 1]
        history.check()
    assert history.refused == 0


def test_single_steps_can_be_taken_back_as_far_as_the_ring_reaches() -> None:
    history = History(MODELS["plain"], seed=7)
    for _ in range(SLOTS + 4):
        history.apply("verify", 1, [1] * ROWS)
    history.apply("rollback", 0, [SLOTS, 0, 3])
    assert history.cache.lengths == [4, 10, 7]
    history.check()


def test_a_cut_below_what_the_ring_holds_is_refused_however_it_is_split() -> None:
    model, tokens = MODELS["plain"], random_ids(1, 20, TINY.vocab_size)
    for cuts in ([20 - SLOTS - 1], [17, 20 - SLOTS - 1], [14, 8]):
        cache = fresh(model, tokens[0].tolist())
        for length in cuts[:-1]:
            cache.rollback([length])
        with pytest.raises(UserError, match=f"at most {SLOTS} short of the 20 positions written, but got {cuts[-1]}"):
            cache.rollback(cuts[-1:])
        assert cache.lengths == [cuts[-2] if len(cuts) > 1 else 20]


def test_rejected_slots_count_as_written() -> None:
    """A verify forward writes columns over the oldest ones; cutting behind its start would read the new ones."""
    model = MODELS["plain"]
    cache = fresh(model, random_ids(1, 20, TINY.vocab_size)[0].tolist())
    model.forward(random_ids(1, SLOTS, TINY.vocab_size), causal(SLOTS), cache)
    cache.advance([1])
    cache.rollback([20])
    with pytest.raises(UserError):
        cache.rollback([19])


def test_committing_less_than_the_ring_holds_of_a_wide_forward_is_refused() -> None:
    model = MODELS["plain"]
    cache = model.new_cache(1, CAPACITY, SLOTS)
    model.forward(random_ids(1, 20, TINY.vocab_size), causal(20), cache)
    with pytest.raises(UserError):
        cache.advance([5])
    cache.advance([20])


@pytest.mark.parametrize(("length", "what"), [(11, "longer"), (-1, "negative")])
def test_a_rollback_only_shortens(length: int, what: str) -> None:
    cache = fresh(MODELS["plain"], [1] * 10)
    with pytest.raises(UserError, match=r"0 <= length <= 10 must hold"):
        cache.rollback([length])


def test_advancing_beyond_what_was_written_is_refused() -> None:
    cache = fresh(MODELS["plain"], [1] * 10)
    with pytest.raises(UserError):
        cache.advance([1])
    MODELS["plain"].forward(random_ids(1, 4, TINY.vocab_size), draft(3), cache)
    with pytest.raises(UserError):  # a draft's slots keep no columns
        cache.advance([1])


def test_capacity_is_refused_and_nothing_written() -> None:
    model = MODELS["plain"]
    cache = fresh(model, random_ids(1, CAPACITY - 3, TINY.vocab_size)[0].tolist())
    before = {name: tensor.clone() for name, tensor in cache.state(0).items()}
    with pytest.raises(UserError, match=f"{CAPACITY + 1} positions do not fit the cache of {CAPACITY}"):
        model.forward(random_ids(1, 4, TINY.vocab_size), causal(4), cache)
    for name, tensor in cache.state(0).items():
        assert torch.equal(tensor, before[name]), name
    model.forward(random_ids(1, 3, TINY.vocab_size), causal(3), cache)


def test_a_batch_of_another_size_is_refused() -> None:
    cache = MODELS["plain"].new_cache(2, CAPACITY, SLOTS)
    with pytest.raises(UserError, match="the cache holds 2 sequences, but got 3"):
        MODELS["plain"].forward(random_ids(3, 2, TINY.vocab_size), causal(2), cache)


def test_select_keeps_sequences_in_order_and_they_go_on_unchanged() -> None:
    history = History(MODELS["sliding-biased-long"], seed=8)
    history.apply("prefill", 12, [12, 3, 7])
    history.apply("verify", SLOTS, [2, 1, 4])
    rows = [2, 0]
    expected = [{name: t.clone() for name, t in history.cache.state(row).items()} for row in rows]
    history.cache.select(rows)
    assert history.cache.batch == 2 and history.cache.lengths == [11, 14]
    for row, state in enumerate(expected):
        assert_same_state(history.cache.state(row), state)
    history.cache.rollback([7, 12])
    following = random_ids(2, 3, TINY.vocab_size)
    found = history.model.forward(following, causal(3), history.cache)
    for row, (index, length) in enumerate(zip(rows, (7, 12), strict=True)):
        tokens = torch.tensor([history.kept[index][:length] + following[row].tolist()])
        assert relative_error(found[row], history.model.forward(tokens, causal(length + 3))[0, -3:]) < 1e-5


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 2], [1, 2], [2, 1, 0], [0], [1, 0, 1, 2, 2]], ids=str)
def test_sequences_move_without_the_tensors_moving(rows: list[int]) -> None:
    model = MODELS["plain"]
    cache = model.new_cache(ROWS, CAPACITY, SLOTS, rows=5)
    model.forward(random_ids(ROWS, 12, TINY.vocab_size), causal(12), cache, counts=[12, 3, 7])
    cache.advance([12, 3, 7])
    places = [tensor.data_ptr() for tensor in (*cache.keys, *cache.values, *cache.columns, cache.device_lengths())]
    expected = [{name: t.clone() for name, t in cache.state(row).items()} for row in rows]
    cache.select(rows)
    for row, state in enumerate(expected):
        assert_same_state(cache.state(row), state)
    now = [tensor.data_ptr() for tensor in (*cache.keys, *cache.values, *cache.columns, cache.device_lengths())]
    assert now == places
    following = random_ids(len(rows), 2, TINY.vocab_size, seed=1)
    found = model.forward(following, causal(2), cache)
    alone = [fresh(model, random_ids(ROWS, 12, TINY.vocab_size)[r, : [12, 3, 7][r]].tolist()) for r in rows]
    for row, other in enumerate(alone):
        assert relative_error(found[row], model.forward(following[row : row + 1], causal(2), other)[0]) < 1e-5


def test_the_lengths_on_the_device_follow() -> None:
    model = MODELS["plain"]
    cache = model.new_cache(2, CAPACITY, SLOTS, rows=4)

    def check(lengths: list[int]) -> None:
        assert cache.lengths == lengths
        assert cache.device_lengths().tolist() == lengths + [0] * (4 - len(lengths))

    check([0, 0])
    model.forward(random_ids(2, 5, TINY.vocab_size), causal(5), cache)
    cache.advance([5, 4])
    check([5, 4])
    cache.rollback([3, 4])
    check([3, 4])
    model.forward(random_ids(2, 2, TINY.vocab_size), causal(2), cache)
    cache.device_lengths()[:2] += torch.tensor([1, 2], dtype=torch.int32)  # as a step on the device does
    cache.advance([1, 2], on_device=True)
    check([4, 6])
    cache.select([1, 0, 1])
    check([6, 4, 6])
    cache.put(0, fresh(model, [1] * 9), 0)
    check([9, 4, 6])


def test_more_sequences_than_rows_are_refused() -> None:
    cache = MODELS["plain"].new_cache(2, CAPACITY, SLOTS)
    with pytest.raises(UserError, match="the cache has 2 rows, but got 3 sequences"):
        cache.select([0, 1, 1])
    with pytest.raises(UserError, match="batch <= rows must hold, but got 2 and 1"):
        MODELS["plain"].new_cache(2, CAPACITY, SLOTS, rows=1)


def test_a_row_is_replaced_in_place_and_the_others_stay() -> None:
    history = History(MODELS["sliding-biased-long"], seed=9)
    history.apply("prefill", 12, [12, 3, 7])
    history.apply("verify", SLOTS, [2, 1, 4])
    tokens = random_ids(1, 9, TINY.vocab_size, seed=1)[0].tolist()
    source = history.model.new_cache(2, 9, SLOTS)  # as small as its prompts
    history.model.forward(torch.tensor([[0] * 9, tokens]), causal(9), source)
    source.advance([9, 9])
    stores = [tensor.data_ptr() for tensor in (*history.cache.keys, *history.cache.columns)]
    history.cache.put(1, source, 1)
    assert [tensor.data_ptr() for tensor in (*history.cache.keys, *history.cache.columns)] == stores
    history.kept[1] = tokens
    history.check()
    history.apply("rollback", 0, [1, SLOTS, 2])
    history.check_next()


def test_a_row_of_another_ring_or_too_long_is_refused() -> None:
    cache, long = fresh(MODELS["plain"], [1] * 10), MODELS["plain"].new_cache(1, 5, SLOTS)
    with pytest.raises(UserError, match="the rings must be equal"):
        cache.put(0, MODELS["plain"].new_cache(1, 5, SLOTS + 1), 0)
    with pytest.raises(UserError, match="10 positions do not fit the cache of 5"):
        long.put(0, cache, 0)


def test_state_size_is_the_published_one() -> None:
    """40,960 bytes of KV a token and 215,040 of CCA state a sequence in bf16, for the 8B model."""
    config = ModelConfig()
    cache = Cache(config, 1, 1, 17, dtype=torch.bfloat16, device="meta")
    assert sum(t.numel() * 2 for t in (*cache.keys, *cache.values)) == 40_960
    widths = [t.shape[-1] for t in cache.columns]
    qk = config.query_size + config.kv_size
    assert sum((config.conv_history * qk + (width - qk)) * 2 for width in widths) == 215_040
