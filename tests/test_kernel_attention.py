"""Block attention: the reference sees what the eager forward sees, for every layout, ragged lengths and windows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from runtime.cache import Cache
from runtime.config import ModelConfig
from runtime.kernels.attention.reference import attention
from runtime.kernels.attention.tilings import tilings
from runtime.kernels.check import check
from runtime.kernels.problem import ODD, SLIDING, Problem, problem_of
from runtime.kernels.registry import kernel
from runtime.kernels.target import TARGETS, Target
from runtime.layout import Layout, causal, draft, single_forward
from runtime.model.attention import attend
from runtime.model.frame import build_frame
from runtime.model.rotary import Rotary
from tests.interpreter import interpreted

# The registry's check has too few keys for its tilings to divide them: several splits per tile, one or two launches,
# fewer splits than programs, several row tiles, and programs handed out to XCDs.

LAYOUTS = {
    "decode": causal(1),
    "verify": causal(5),
    "draft": draft(4),
    "single_forward": single_forward(2, (0, 2)),
    "wide": single_forward(7, tuple(range(8))),  # 72 slots: eager attention no longer folds the heads into rows
}


def config(window: int | None) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=window,
        layer_types=("hybrid",) if window is None else ("hybrid_sliding",),
        max_position_embeddings=256,
    )


def filled(layout: Layout, lengths: list[int], window: int | None) -> tuple[Cache, torch.Tensor]:
    """A cache with random keys and values in every row, also behind the slots, and queries [B, S, heads, D]."""
    model, generator = config(window), torch.Generator().manual_seed(3)
    cache = Cache(model, batch=len(lengths), capacity=max(lengths) + layout.slots + 3, max_slots=layout.slots)
    for tensor in cache.keys + cache.values:
        tensor.normal_(generator=generator)
    cache.lengths = list(lengths)
    shape = (len(lengths), layout.slots, model.num_attention_heads, model.head_dim)
    return cache, torch.randn(shape, generator=generator)


def by_reference(query: torch.Tensor, cache: Cache, layout: Layout, window: int | None) -> torch.Tensor:
    batch, slots, heads, width = query.shape
    found = attention(
        query.reshape(-1, heads, width),
        cache.keys[0],
        cache.values[0],
        torch.tensor(cache.lengths, dtype=torch.int32)[:batch],
        slots,
        None if layout.visible is None else layout.visible.to(torch.int8),
        layout.offsets.to(torch.int32),
        window,
    )
    return found.view(batch, slots, heads * width)


@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("lengths", [[7], [5, 0, 11], [0, 0]], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_reference_equals_eager_attention(layout: Layout, lengths: list[int], window: int | None) -> None:
    cache, query = filled(layout, lengths, window)
    model = cache.config
    frame = build_frame(model, Rotary(model), layout, cache, batch=len(lengths), counts=None, dtype=torch.float32)
    keys, values = (t[:, : frame.total].transpose(1, 2) for t in (cache.keys[0], cache.values[0]))
    expected = attend(query, keys, values, frame.masks[model.layer_types[0]])
    torch.testing.assert_close(by_reference(query, cache, layout, window), expected, rtol=1e-5, atol=1e-6)


def test_leading_rows_of_a_larger_cache_serve() -> None:
    layout = LAYOUTS["verify"]
    cache, query = filled(layout, [5, 0, 11], None)
    torch.testing.assert_close(
        by_reference(query[:2], cache, layout, None), by_reference(query, cache, layout, None)[:2]
    )


def test_unseen_rows_do_not_count() -> None:
    """Neither rows behind the slots, nor slots that the mask hides, nor keys that the window has left behind."""
    layout, window = LAYOUTS["draft"], 4
    cache, query = filled(layout, [9], window)
    before = by_reference(query, cache, layout, window)
    for tensor in cache.keys + cache.values:
        tensor[:, :6] += 1  # slot 0 at position 9 sees 6 .. 9
        tensor[:, 14:] -= 1
    torch.testing.assert_close(by_reference(query, cache, layout, window), before, rtol=0, atol=0)
    cache.values[0][:, 10:14] += 1
    after = by_reference(query, cache, layout, window)
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=0)
    assert (after[:, 1:] - before[:, 1:]).abs().min() > 0


def divided() -> None:
    problems = (
        (Problem(ODD, 3, 1, 90), "float32"),
        (Problem(replace(ODD, head_dim=24), 2, 5, 70, "draft"), "float16"),
        (Problem(ODD, 1, 9, 50, "single", (0, 2)), "float16"),
        (Problem(replace(SLIDING, sliding_window=40), 2, 5, 90), "float32"),
        (Problem(replace(SLIDING, sliding_window=3), 2, 9, 60, "single", (0, 2)), "float32"),
    )
    sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "PROGRAMS": 24, "num_warps": 4, "num_stages": 2}
    for problem, dtype in problems:
        for blocks, launches, xcds in ((1, 1, 8), (2, 2, 1)):
            tiling = sizes | {"SPLIT_BLOCKS": blocks, "LAUNCHES": launches, "XCDS": xcds}
            for seed in range(2 if launches == 1 else 1):  # the counters must be back at zero for the second
                result = check(kernel("attention"), problem, dtype, "cpu", tiling, seed)
                assert result.passed, str(result)


def test_divided_keys_are_joined() -> None:
    interpreted(__name__, "divided")


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("tokens", [1, 16, 17, 272, 2048])
def test_candidates_differ_and_may_fit(tokens: int, target: Target) -> None:
    found = tilings(target, problem_of(tokens, ModelConfig()))
    assert 5 <= len(found) <= 30 and len({tuple(sorted(t.items())) for t in found}) == len(found)
    for tiling in found:  # one stage of bfloat16 keys and values
        assert 2 * tiling["BLOCK_N"] * ModelConfig().head_dim * 2 <= target.shared_bytes
        assert (target.backend == "hip") == ("kpack" in tiling)
