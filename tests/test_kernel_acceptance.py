"""The kernels that draw and judge: equal to their references, and of the same law, in Triton's interpreter.

Each check runs in a process where triton interprets. `runtime.kernels.check` tries the same kernels on a model's sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from runtime.config import ModelConfig
from runtime.kernels.acceptance.inputs import errors_draw, errors_verify, inputs_draw, inputs_verify
from runtime.kernels.acceptance.tilings import tilings_draw, tilings_verify
from runtime.kernels.problem import ODD_PROBLEMS, Problem
from runtime.kernels.target import TARGETS, Target
from runtime.samplers import acceptance
from runtime.samplers.acceptance import Accepted, Draft
from tests.interpreter import interpreted

CHECKS: list[str] = []
LAST = 1 - 2**-53  # the largest uniform


def tried_there(check: Callable[[], None]) -> Callable[[], None]:
    CHECKS.append(check.__name__)
    return check


def draw(logits: Tensor, temperatures: Tensor, uniform: Tensor | None, block: int = 4) -> Tensor:
    from runtime.kernels.acceptance import kernel

    return kernel.draw(logits, temperatures, uniform, tiling={"BLOCK": block})


def verify(
    logits: Tensor, draft: Draft, temperature: float, weight: float, uniform: Tensor | None, block: int = 4
) -> Accepted:
    from runtime.kernels.acceptance import kernel

    return kernel.verify(logits, draft, temperature, weight, uniform, tiling={"BLOCK": block, "ROWS": 2})


def argmax_draft(tokens: list[list[int]], logits: Tensor) -> Draft:
    return Draft(torch.tensor(tokens), logits, torch.zeros(logits.shape[1]))


@tried_there
def equal_to_the_reference() -> None:
    """Token for token: the sizes are odd, the number of splits is 3, and rows are judged two at a time."""
    random = torch.Generator().manual_seed(0)
    seen = set()
    settings = itertools.product((0.0, 0.8), (1.0, 0.4), ((0.0,) * 3, (0.9,) * 3, (0.9, 0.0, 0.0)))
    for number, (temperature, weight, temperatures) in enumerate(settings):
        logits = torch.randn(4, 4, 11, generator=random)
        drafted = logits[:, :3] + torch.randn(4, 3, 11, generator=random) / 2
        uniform = torch.rand(4, 7, generator=random, dtype=torch.float64)
        warm, at = uniform[:, 4:].contiguous() if any(temperatures) else None, torch.tensor(temperatures)
        tokens = acceptance.draw(drafted, at, warm)
        assert torch.equal(draw(drafted, at, warm), tokens)
        lengths = torch.randint(0, 4, (4,), generator=random) if number % 2 else None
        arguments = (logits, Draft(tokens, drafted, at, lengths), temperature, weight, uniform[:, :4].contiguous())
        expected, found = acceptance.verify(*arguments), verify(*arguments)
        assert torch.equal(found.count, expected.count) and torch.equal(found.token, expected.token)
        seen.update(found.count.tolist())
    assert seen == {0, 1, 2, 3}


@tried_there
def drawn_as_often_as_probable() -> None:
    """Of uniforms on a grid, each token takes its share, up to the one at either end."""
    probabilities = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.1, 0.2])
    grid = (torch.arange(40, dtype=torch.float64)[:, None] + 0.5) / 40
    logits = (0.7 * probabilities.log()).expand(40, 1, 6).contiguous()
    tokens = draw(logits, torch.tensor([0.7]), grid).flatten()
    assert ((torch.bincount(tokens, minlength=6) - 40 * probabilities).abs() <= 1).all()
    assert tokens.tolist() == sorted(tokens.tolist())


@tried_there
def what_is_committed_follows_the_target() -> None:
    """All drafts, in proportion to q, judged by uniforms on a grid; a redraw from the target itself gives 0.55."""
    p, q, steps = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.2, 0.6]), 18
    grid = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    uniform = torch.stack([grid, (grid * steps * 0.618) % 1], dim=1).repeat(3, 1)
    drafts = torch.arange(3).repeat_interleave(steps)[:, None]
    logits, drafted = (x.log().expand(3 * steps, n, 3).contiguous() for x, n in ((p, 2), (q, 1)))
    found = verify(logits, Draft(drafts, drafted, torch.ones(1)), 1.0, 1.0, uniform)
    first = torch.where(found.count == 1, drafts[:, 0], found.token)
    share = torch.zeros(3).index_add_(0, first, q[drafts[:, 0]] / steps)
    assert torch.allclose(share, p, atol=0.05)


@tried_there
def nothing_impossible_is_drawn() -> None:
    """By uniforms at either end, next to tokens without probability, and where a whole split has none."""
    logits = torch.full((2, 1, 13), -torch.inf)
    logits[:, 0, [1, 9]] = 0.0
    uniform = torch.tensor([[0.0], [LAST]], dtype=torch.float64)
    assert draw(logits, torch.ones(1), uniform).flatten().tolist() == [1, 9]
    bonus = logits.expand(2, 2, 13)
    draft = argmax_draft([[1], [9]], torch.zeros(2, 1, 13))
    found = verify(bonus, draft, 1.0, 1.0, torch.tensor([[0.0, 0.0], [LAST, LAST]], dtype=torch.float64))
    assert found.count.tolist() == [1, 0] and found.token.tolist() == [1, 1]


@tried_there
def a_rejection_that_leaves_nothing_redraws_from_the_target() -> None:
    """Probabilities equal but for rounding; the last token has none."""
    target = torch.tensor([[[0.0, 0.3, -200.0]] * 2])
    draft = Draft(torch.zeros(1, 1, dtype=torch.int64), target[:, :1] + torch.tensor([3e-8, 0.0, 0.0]), torch.ones(1))
    found = verify(target, draft, 1.0, 1.0, torch.full((1, 2), LAST, dtype=torch.float64))
    assert (found.count.item(), found.token.item()) in {(0, 1), (1, 1)}


@tried_there
def the_first_of_equals_is_the_argmax() -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0, 2.0, 2.0, 0.0], [3.0, 0.0, 0.0, 0.0, 0.0, 3.0]]])
    assert draw(logits, torch.zeros(2), None).tolist() == [[1, 0]]
    draft = argmax_draft([[1]], torch.zeros(1, 1, 6))
    found = verify(logits, draft, 0.0, 1.0, None)
    assert (found.count.item(), found.token.item()) == (1, 0)


@tried_there
def draft_logits_are_not_read_without_need() -> None:
    """At weight 1 with argmax drafts, or where no draft counts: then they may be a stand-in without memory."""
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 3, 9, generator=random)
    uniform = torch.rand(3, 3, generator=random, dtype=torch.float64)
    best = logits[:, :2].argmax(-1).tolist()
    for temperature in (0.0, 1.0):
        spoilt = argmax_draft(best, torch.full((3, 2, 9), torch.nan))
        clean = spoilt._replace(logits=torch.zeros(1).expand(3, 2, 9))
        expected = acceptance.verify(logits, clean, temperature, 1.0, uniform)
        for draft in (spoilt, clean):
            found = verify(logits, draft, temperature, 1.0, uniform)
            assert torch.equal(found.count, expected.count) and torch.equal(found.token, expected.token)
        none = clean._replace(lengths=torch.zeros(3, dtype=torch.int64), temperatures=torch.ones(2))
        found = verify(logits, none, temperature, 0.5, uniform)
        assert found.count.tolist() == [0, 0, 0]
        assert torch.equal(found.token, acceptance.verify(logits, none, temperature, 0.5, uniform).token)


@tried_there
def narrow_logits_are_widened_first() -> None:
    random = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 3, 9, generator=random).half()
    uniform = torch.rand(2, 3, generator=random, dtype=torch.float64)
    draft = Draft(logits[:, 1:].argmax(-1), logits[:, :2].clone(), torch.full((2,), 0.9))
    found, wide = (
        verify(x, draft._replace(logits=y), 0.8, 0.3, uniform)
        for x, y in ((logits, draft.logits), (logits.float(), draft.logits.float()))
    )
    assert torch.equal(found.count, wide.count) and torch.equal(found.token, wide.token)


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name: str) -> None:
    interpreted(__name__, name)


# Inputs and judgement


@pytest.mark.parametrize("problem", ODD_PROBLEMS, ids=str)
def test_the_reference_passes_its_own_judgement_and_others_do_not(problem: Problem) -> None:
    drawing = inputs_draw(problem, torch.float32, "cpu")
    right = acceptance.draw(**drawing)
    assert errors_draw(drawing, right, right)["token"] < 1e-6
    assert errors_draw(drawing, right, (right + 1) % problem.config.vocab_size)["token"] > 1e-3
    judging = inputs_verify(problem, torch.float32, "cpu")
    found = acceptance.verify(**judging)
    errors = errors_verify(judging, found, found)
    assert errors["count"] == 0 and errors["token"] < 1e-6
    other = found._replace(token=(found.token + 1) % problem.config.vocab_size)
    assert errors_verify(judging, found, other)["token"] > 1e-5
    last = torch.full_like(found.count, judging["draft"].tokens.shape[1])
    if judging["draft"].lengths is not None:
        last = judging["draft"].lengths
    wrong = found._replace(count=torch.where(found.count < last, found.count + 1, (found.count - 1).clamp_min(0)))
    assert errors_verify(judging, found, wrong)["count"] > 1e-5


def test_the_inputs_try_every_way_to_decide() -> None:
    tried = [inputs_verify(problem, torch.float32, "cpu") for problem in ODD_PROBLEMS]
    assert {t["temperature"] > 0 for t in tried} == {t["mixing_weight"] == 1 for t in tried} == {True, False}
    assert any(t["draft"].lengths is not None for t in tried)
    counts = [acceptance.verify(**t).count for t in tried]
    shares = torch.cat([c / t["draft"].tokens.shape[1] for c, t in zip(counts, tried, strict=True)])
    assert 0 in shares and 1 in shares and len(shares.unique()) > 3
    for problem in ODD_PROBLEMS:
        for inputs in (inputs_draw, inputs_verify):
            real, meta = (inputs(problem, torch.float16, device) for device in ("cpu", "meta"))
            for name, value in real.items():
                if isinstance(value, Tensor):
                    assert (value.shape, value.dtype) == (meta[name].shape, meta[name].dtype)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
@pytest.mark.parametrize("batch", [1, 128])
def test_tilings_differ_and_cut_a_row(target: Target, batch: int) -> None:
    for config in (ModelConfig(), ODD_PROBLEMS[0].config):
        for tilings in (tilings_draw, tilings_verify):
            found = tilings(target, Problem(config, batch, 17))
            assert 5 <= len(found) <= 30 or config.vocab_size < 2000
            assert len({tuple(sorted(t.items())) for t in found}) == len(found)
            assert all(2 * t["BLOCK"] < config.vocab_size and t["num_warps"] <= target.max_warps for t in found)
