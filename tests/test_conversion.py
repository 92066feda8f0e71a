"""The conversion trains what inference runs, and a run can be killed anywhere and still end in the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.config import ModelConfig, RopeParameters, replace
from runtime.conversion.objective import (
    block_starts,
    conversion_layout,
    conversion_loss,
    label_counts,
    next_token_loss,
)
from runtime.layout import causal, draft
from runtime.model.zaya import Zaya
from tests.models import TINY, noisy_model, random_ids, relative_error

torch.set_num_threads(1)
MASK = TINY.mask_token_id or 0
CONFIGS: dict[str, ModelConfig] = {
    "plain": TINY,
    "long-convolutions": replace(TINY, cca_time0=3, cca_time1=2, attention_bias=True),
    "sliding": replace(
        TINY,
        layer_types=("hybrid_sliding", "hybrid"),
        sliding_window=6,
        rope_parameters={"hybrid": RopeParameters(1000.0), "hybrid_sliding": RopeParameters(50.0)},
    ),
}
configurations = pytest.mark.parametrize("name", CONFIGS)


def starts_of(rows: int, length: int, max_block: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(block_starts(np.random.default_rng(seed), rows, length, max_block))


def drafted(model: Zaya, clean: list[int], block: list[int]) -> Tensor:
    """Hidden states [1 + K, hidden] of the anchor (the last clean token) and a block, as a draft forward gives them."""
    cache = model.new_cache(1, len(clean) + len(block), len(block) + 1)
    if len(clean) > 1:
        model.forward(torch.tensor([clean[:-1]]), causal(len(clean) - 1), cache)
        cache.advance([len(clean) - 1])
    return model.forward(torch.tensor([[clean[-1], *block]]), draft(len(block)), cache)[0]


# The layout


@configurations
@pytest.mark.parametrize("revealed_share", [0.0, 0.4])
@torch.no_grad()
def test_training_sees_what_a_draft_forward_sees(name: str, revealed_share: float) -> None:
    model, length = noisy_model(CONFIGS[name], seed=1), 22
    tokens, starts = random_ids(3, length, MASK), starts_of(3, length, 7)
    revealed = torch.rand(3, length, generator=torch.Generator().manual_seed(0)) < revealed_share
    masked = torch.where(revealed, tokens, MASK)
    hidden = model.forward(torch.cat([tokens, masked], dim=1), conversion_layout(starts))
    for row in range(3):
        blocks = sorted(set(starts[row].tolist()) - {0})
        assert len(blocks) > 2
        for begin, end in zip(blocks, [*blocks[1:], length], strict=True):
            expected = drafted(model, tokens[row, :begin].tolist(), masked[row, begin:end].tolist())
            assert relative_error(hidden[row, length + begin : length + end], expected[1:]) < 1e-5
            assert relative_error(hidden[row, begin - 1], expected[0]) < 1e-5


@configurations
@torch.no_grad()
def test_clean_half_is_the_plain_causal_model(name: str) -> None:
    model = noisy_model(CONFIGS[name], seed=1)
    tokens, starts = random_ids(3, 22, MASK), starts_of(3, 22, 7)
    hidden = model.forward(torch.cat([tokens, torch.full_like(tokens, MASK)], dim=1), conversion_layout(starts))
    assert relative_error(model.project(hidden[:, :22]), model.logits(tokens)) < 1e-5


@configurations
@torch.no_grad()
def test_no_block_sees_its_own_tokens_or_later_ones(name: str) -> None:
    model, length = noisy_model(CONFIGS[name], seed=1), 16
    tokens = random_ids(1, length, MASK)
    starts = torch.tensor([[0, *[1] * 4, *[5] * 3, *[8] * 8]])
    masks = torch.full_like(tokens, MASK)
    before = model.forward(torch.cat([tokens, masks], dim=1), conversion_layout(starts))[0, length:]
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % MASK
    after = model.forward(torch.cat([changed, masks], dim=1), conversion_layout(starts))[0, length:]
    assert relative_error(after[:8], before[:8]) < 1e-6  # the blocks at 1 and at 5
    assert (after[8:] - before[8:]).abs().amax(-1).min() > 1e-3  # the block at 8 sees tokens 5..7


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(1, 4), length=st.integers(1, 60), max_block=st.integers(1, 30), seed=st.integers(0, 2**32 - 1))
def test_block_starts_cut_a_sequence_into_blocks(rows: int, length: int, max_block: int, seed: int) -> None:
    starts = block_starts(np.random.default_rng(seed), rows, length, max_block)
    assert starts.shape == (rows, length) and starts.dtype == np.int64
    position = np.arange(length)
    assert (starts[:, 0] == 0).all() and (starts[:, 1:] >= 1).all()  # position 0 stands alone
    assert (starts <= position).all()
    goes_on = starts[:, 1:] == starts[:, :-1]
    assert (goes_on | (starts[:, 1:] == position[1:])).all()
    assert (position - starts < max_block).all()
    assert np.array_equal(starts, block_starts(np.random.default_rng(seed), rows, length, max_block))


def test_every_block_length_and_offset_is_drawn_equally_often() -> None:
    starts = block_starts(np.random.default_rng(0), 4000, 40, 5)
    begins = [np.unique(row) for row in starts]
    lengths = np.concatenate([np.diff(row)[1:][row[1:-1] < 35] for row in begins])  # those that the end cannot cut
    share = np.bincount(lengths, minlength=6)[1:] / len(lengths)
    assert np.abs(share - 0.2).max() < 0.01
    offsets = np.bincount(np.concatenate(begins), minlength=40)[12:] / 4000
    assert np.abs(offsets - 1 / 3).max() < 0.03  # blocks of 3 on average: a third of the rows has one begin there


# The loss


@configurations
def test_losses_are_those_of_separate_forwards(name: str) -> None:
    model, length = noisy_model(replace(CONFIGS[name], pad_token_id=0), seed=1), 14
    tokens, starts = random_ids(2, length + 1, MASK, seed=2), starts_of(2, length, 5, seed=2)
    tokens[1, 10:] = 0
    revealed = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.3
    found = conversion_loss(model, tokens, starts, alpha=0.5, revealed=revealed)

    next_token, mask = [], []
    logits = model.logits(tokens[:, :-1])
    for row in range(2):
        clean = tokens[row, :-1].tolist()
        masked = torch.where(revealed[row], tokens[row, :-1], MASK).tolist()
        for t in range(length):
            if tokens[row, t + 1] != 0:
                next_token.append(F.cross_entropy(logits[row, t], tokens[row, t + 1]))
            if t > 0 and not revealed[row, t] and clean[t] != 0:
                begin = int(starts[row, t])
                end = begin + int((starts[row] == begin).sum())
                hidden = drafted(model, clean[:begin], masked[begin:end])
                mask.append(F.cross_entropy(model.project(hidden[1 + t - begin]), tokens[row, t]))
    expected, expected_mask = torch.stack(next_token).mean(), torch.stack(mask).mean()
    assert found.mask is not None
    torch.testing.assert_close(found.next_token, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mask, expected_mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.total, (0.5 * expected + expected_mask) / 1.5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(next_token_loss(model, tokens).total, expected, rtol=1e-4, atol=1e-5)


PARTS = (
    "embed",
    "q_proj",
    "v_proj_delayed",
    "conv",
    "temp",
    "experts",
    "router_mlp",
    "states_scale",
    "residual",
    "norm",
)


@configurations
def test_a_step_along_the_gradient_of_any_part_changes_the_loss_as_it_says(name: str) -> None:
    """With one expert, because choosing another one has no slope."""
    model = noisy_model(replace(CONFIGS[name], num_experts=1), seed=1)
    for layer in model.model.layers:
        layer.mlp.gate.balancing_biases[-1] = -9.0
    model.train().requires_grad_(True)
    tokens, starts = random_ids(2, 11, MASK), starts_of(2, 10, 4)
    conversion_loss(model, tokens, starts).total.backward()
    for part in PARTS:
        parameters = [p for n, p in model.named_parameters() if part in n]
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
        assert len(gradients) == len(parameters) > 0
        square = sum(float(g.square().sum()) for g in gradients)
        assert square > 1e-6, part
        step, ends = 0.01 / square, []
        for times in (1, -2, 1):  # to a loss 0.01 higher, to one 0.01 lower, and back
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter += times * step * gradient
                ends.append(float(conversion_loss(model, tokens, starts).total))
        assert ends[0] - ends[1] == pytest.approx(0.02, rel=0.05), part


# Parts of a batch


def gradients(model: Zaya, total: Tensor) -> Tensor:
    total.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def test_gradients_of_parts_add_up_to_those_of_the_batch_however_the_labels_lie() -> None:
    """And a mean of the parts' own means, the usual mistake, is told apart."""
    model = noisy_model(seed=1).train().requires_grad_(True)
    tokens, starts = random_ids(6, 15, MASK), starts_of(6, 14, 5)
    generator = torch.Generator().manual_seed(0)
    revealed = torch.rand(6, 14, generator=generator) < 0.3
    judged = torch.rand(6, 15, generator=generator) < torch.tensor([0.9, 0.0, 0.1, 0.0, 0.0, 0.5])[:, None]

    def loss(rows: slice, counts: tuple[int, int] | None) -> Tensor:
        return conversion_loss(
            model, tokens[rows], starts[rows], revealed=revealed[rows], judged=judged[rows], counts=counts
        ).total

    whole = gradients(model, loss(slice(None), None))
    counts = label_counts(TINY, tokens, judged, revealed)
    for size in (1, 2, 3):
        parts = [slice(begin, begin + size) for begin in range(0, 6, size)]
        added = sum(gradients(model, loss(rows, counts)) for rows in parts)
        assert isinstance(added, Tensor) and relative_error(added, whole) < 1e-5
        naive = sum(gradients(model, loss(rows, None) / len(parts)) for rows in parts)
        assert isinstance(naive, Tensor) and relative_error(naive, whole) > 0.05


def test_rows_without_a_label_cost_nothing() -> None:
    model = noisy_model().train().requires_grad_(True)
    tokens, starts = random_ids(2, 9, MASK), starts_of(2, 8, 4)
    none = torch.zeros(2, 9, dtype=torch.bool)
    for total in (
        conversion_loss(model, tokens, starts, judged=none).total,
        next_token_loss(model, tokens, judged=none).total,
    ):
        assert float(total.detach()) == 0
        assert not gradients(model, total).any()
