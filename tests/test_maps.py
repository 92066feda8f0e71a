"""The break-even map and what would change a point: laws of the data that their figures draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dashboards.changes import accepted_info, change_info, sensitivity_info
from dashboards.choice import Choice, answer, contexts_of, explanation, pays_map
from dashboards.maps import HeadlineInfo, MapInfo, contour, map_info, map_plot, outline
from hardware.files import UserError
from hardware.profile import load_profile
from perfmodel.breakeven import break_even
from perfmodel.contenders import Contender
from perfmodel.decoding import setting
from perfmodel.explain import Explanation
from perfmodel.known_acceptance import load_acceptance
from perfmodel.model_spec import load_spec
from runtime.config import DecodingConfig
from tests.test_dashboard import one_level

CHOICES = [
    Choice(batch=48, context=3000),
    Choice(sampler="single_forward", acceptance="aime25-on"),
    Choice(sampler="denoising", denoising_steps=4, batch=7),
]


def made_up(speedup: list[list[float]], headlines: tuple[HeadlineInfo, ...] = ()) -> MapInfo:
    """A map of these speedups over batches (rows) and contexts that double."""
    batch, context = (tuple(2**n for n in range(count)) for count in (len(speedup), len(speedup[0])))
    cells = tuple(tuple(None if math.isnan(s) else s for s in row) for row in speedup)
    lines = tuple(contour(batch, context, np.log(np.array(speedup))))
    return MapInfo("x", "y", 2.0, batch, context, cells, cells, lines, headlines, (1, 1), "")


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.sampler)
@pytest.mark.parametrize("device", ["h100-sxm", "mi300x"])
def test_the_cells_are_what_predictions_say(choice: Choice, device: str) -> None:
    """Of every eleventh cell; what does not fit is refused there."""
    hardware = load_profile(device)
    info = map_info(pays_map(choice, hardware), device, choice.sampler, (choice.batch, choice.context))
    assert choice.batch in info.batch and choice.context in info.context
    cells = [(b, c) for b in info.batch for c in info.context]
    for batch, context in {*cells[::11], (choice.batch, choice.context)}:
        speedup = info.speedup[info.batch.index(batch)][info.context.index(context)]
        at = Choice(**{**vars(choice), "batch": batch, "context": context})
        if speedup is None:
            with pytest.raises(UserError, match="weights and caches must fit"):
                answer(at, hardware)
        else:
            assert answer(at, hardware).chosen.speedup_over_autoregressive == pytest.approx(speedup)
    columns = info.columns()
    assert {len(values) for values in columns.values()} == {len(cells)}
    assert [s is None for s in columns["speedup_over_autoregressive"]] == [not fits for fits in columns["fits"]]


levels = st.integers(2, 5).flatmap(
    lambda width: st.lists(
        st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 3.0, math.nan]), min_size=width, max_size=width),
        min_size=2,
        max_size=5,
    )
)


@settings(deadline=None, max_examples=200)
@given(levels)
def test_the_contour_separates_what_pays_from_what_does_not(level: list[list[float]]) -> None:
    """Between two neighbours of a known square the line passes exactly where one pays and the other does not.

    Inside a square the ends of its pieces lie on its sides (or on the diagonal, where one corner is not known).
    """
    values = np.array(level)
    x, y = [2.0**n for n in range(values.shape[0])], [3.0**n for n in range(values.shape[1])]
    for i in range(len(x) - 1):
        for j in range(len(y) - 1):
            square = values[i : i + 2, j : j + 2]
            ends = [end for piece in contour(x[i : i + 2], y[j : j + 2], square) for end in piece]
            unknown = int(np.isnan(square).sum())
            if unknown > 1:
                assert not ends
                continue
            places = [(math.log2(a) - i, math.log(b, 3) - j) for a, b in ends]
            assert all(-1e-9 <= part <= 1 + 1e-9 for place in places for part in place)
            sides = [
                (square[0, 0], square[0, 1], [b for a, b in places if abs(a) < 1e-9]),
                (square[1, 0], square[1, 1], [b for a, b in places if abs(a - 1) < 1e-9]),
                (square[0, 0], square[1, 0], [a for a, b in places if abs(b) < 1e-9]),
                (square[0, 1], square[1, 1], [a for a, b in places if abs(b - 1) < 1e-9]),
            ]
            for low, high, crossings in sides:
                if not (math.isnan(low) or math.isnan(high)) and 0.0 not in (low, high):
                    assert len(crossings) == ((low > 0) != (high > 0))
                    for part in crossings:
                        assert low + part * (high - low) == pytest.approx(0, abs=1e-6)


def test_the_contour_of_a_real_map_lies_where_the_speedup_is_one() -> None:
    """Along a row, the line passes between a batch that pays and the next one, near the exact end that is said."""
    choice, hardware = Choice(sampler="single_forward"), load_profile("h100-sxm")
    found = pays_map(choice, hardware)
    info = map_info(found, "h100-sxm", "it", (1, 2048))
    (stretch,) = found.by_batch[info.context.index(2048)]
    assert f"At context 2,048 it pays at batch 1 to {stretch.last}" in info.words
    crossings = [batch for piece in info.contour for batch, context in piece if context == pytest.approx(2048)]
    assert crossings == [pytest.approx(stretch.last, rel=0.1)] * 2  # the line goes on from one square to the next


def test_a_headline_is_outlined_where_it_holds_and_else_said_to_hold_nowhere() -> None:
    at = setting(load_spec("zaya1-8b"), one_level(), "bfloat16")
    contender = Contender(DecodingConfig("two_forward", 4), 3.0)
    found = break_even(at, [contender], [1, 64], [64, 512], headlines=(0.01, 4.6, 7.7))
    small, usual, beyond = map_info(found, "plain", "it", (1, 64)).headlines
    remaining = float(found.headlines[1].remaining.max())
    assert f"holds nowhere in this map: at most {remaining:.2f}x of it remains" in usual.words
    assert "cannot hold: no step of this setting commits 7.7 tokens" in beyond.words
    assert not small.holds  # the share of a headline does not depend on the headline
    held = HeadlineInfo(4.6, ((0, 0), (0, 1)), (4.6, 1, 2))
    assert "holds (95% of it or more is left) in 2 cells, outlined" in held.words
    figure = map_plot(made_up([[1.5, 1.5], [0.5, math.nan]], (held,)))
    assert "dotted outline: the headline 4.6x holds" in figure.layout.title.text
    assert "hatched: does not fit the memory" in figure.layout.title.text
    assert sum(trace.line.dash == "dot" for trace in figure.data if trace.type == "scatter") == 1


def test_an_outline_goes_around_what_it_encloses() -> None:
    assert len(outline([(0, 0)])) == 4
    assert len(outline([(0, 0), (0, 1), (1, 1)])) == 8
    assert ((0.5, -0.5), (0.5, 0.5)) in outline([(0, 0), (0, 1)])


def test_nothing_that_fits_is_said() -> None:
    info = made_up([[math.nan, math.nan], [math.nan, math.nan]])
    assert info.words == "Nothing fits the memory of x in this map."
    assert not info.contour
    map_plot(info)


def test_maps_need_a_sampler_that_drafts_and_stay_within_the_model() -> None:
    with pytest.raises(UserError, match="what a break-even map compares with"):
        pays_map(Choice(sampler="autoregressive"), one_level())
    assert contexts_of(Choice(context=3000), 3) == [3000, 16_384, 32_768, 65_536]
    tiny = Choice(model="zaya-nano", context=5)
    assert max(contexts_of(tiny, 8)) + 17 <= load_spec("zaya-nano").max_context


@pytest.fixture(scope="module")
def explained() -> dict[str, Explanation]:
    choice = Choice(sampler="single_forward", acceptance="aime25-on")
    return {name: explanation(choice, load_profile(name)) for name in ("h100-sxm", "mi300x")}


def test_changes_are_what_the_model_explains_strongest_first(explained: dict[str, Explanation]) -> None:
    changes, sensitivities = change_info(explained), sensitivity_info(explained)
    for device, found in explained.items():
        gains = {e.name: (e.tokens_per_second, e.speedup) for e in changes.effects if e.device == device}
        assert gains == {c.name: (c.tokens_per_second_ratio - 1, c.speedup_ratio - 1) for c in found.changes}
        own = {e.name: e.tokens_per_second for e in sensitivities.effects if e.device == device}
        assert own == {s.name: s.elasticity for s in found.sensitivities}
    assert sensitivities.effects[0].name == "acceptance length"  # tokens per second follow it fully
    sizes = [abs(e.tokens_per_second) for e in sensitivities.effects if e.device == "h100-sxm"]
    assert sizes[0] == max(sizes)
    assert any(words.startswith("Not possible on h100-sxm and mi300x: K 32 (aime25-on") for words in changes.refused)
    assert {len(values) for values in changes.columns("gained").values()} == {len(changes.effects)}


@pytest.mark.parametrize(("name", "k"), [("aime25-on", 16), ("zaya-nano-t1", 8)])
def test_the_histogram_has_the_mean_that_is_predicted_with(name: str, k: int) -> None:
    choice = Choice(acceptance=name, draft_tokens=k)
    tokens = choice.accepted.tokens(choice.decoding)
    info = accepted_info(name, load_acceptance(name).histogram("two_forward", k), tokens)
    assert sum(info.shares) == pytest.approx(1)
    assert 1 + sum(n * share for n, share in enumerate(info.shares)) == pytest.approx(tokens)
    assert info.columns()["accepted_drafts"] == list(range(k + 1))
