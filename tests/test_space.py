"""The search space as data: every setting is a point of it and back, and people can read it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.space import (
    MAX_DRAFT_TOKENS,
    Candidate,
    Parameter,
    Space,
    Value,
    decoding_space,
    default_candidate,
)
from hardware.files import UserError, build, plain
from runtime.config import SAMPLER_NAMES, DecodingConfig, KernelConfig
from runtime.levels import optimal
from tests.made_up import MadeUp, run, small_space, subject


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("histogram", [(), (5.0, 3.0, 2.0, 4.0, 9.0)])
def test_settings_survive_their_parameters(batch: int, lossless: bool, histogram: tuple[float, ...]) -> None:
    """Every setting is one point of the space and back, and a lossless space holds lossless ones."""
    space = decoding_space(batch=batch, cores=2, lossless=lossless, histogram=histogram)
    grid = space.grid({"mixing_weight": (0.5, 0.95, 1.0), "draft_tokens": (1, 2, 3, 7, 24)})
    assert len({space.key(c) for c in grid}) == len(grid)
    for candidate in grid:
        assert space.candidate(space.encode(candidate)) == candidate
    weights = {c.decoding.mixing_weight for c in grid}
    assert weights == ({1.0} if lossless else {0.5, 0.95, 1.0})
    assert {c.decoding.lossless for c in grid} == ({True} if lossless else {True, False})
    assert {c.decoding.sampler for c in grid} == set(SAMPLER_NAMES)
    kept = build(Space, json.loads(json.dumps(plain(space))), "a study")
    assert kept == space  # as a study's storage gives it back


def test_levels_are_spread_evenly_or_best_for_what_was_recorded() -> None:
    even = decoding_space(batch=1, cores=1)
    assert even.levels(4, 16) == (0, 4, 8, 12) and even.levels(1, 5) == (0,)
    assert even.levels("dense", 16) is even.levels(8, 7) is even.levels(8, 3) is None
    recorded = (5.0, 1.0, 0.0, 0.0, 0.0, 9.0, 9.0, 1.0)
    found = decoding_space(batch=1, cores=1, histogram=recorded)
    assert found != even
    assert found.levels(2, 7) == optimal(recorded, 2) != even.levels(2, 7)
    assert found.levels(2, 4) == optimal([5.0, 1.0, 0.0, 0.0, 19.0], 2)  # a shorter draft ends where the longer goes on
    for k in (1, 2, 5, 7, 9, 24):
        for count in (1, 2, 4, 8):
            levels = found.levels(count, k)
            assert levels is None if count > k else len(levels or ()) == count


def test_equal_settings_have_equal_parameters_however_they_were_drawn() -> None:
    space = decoding_space(batch=1, cores=1)
    drawn: dict[str, Value] = {
        "sampler": "denoising",
        "threads": 1,
        "draft_tokens": 2,
        "verify": True,
        "experts_block": "loop",
    }
    settings = [
        space.candidate({**drawn, "denoising_steps": steps, "confidence_threshold": 0.9})  # of a block of 2: 2, 2 and 2
        for steps in (2, 4, 8)
    ]
    assert len({space.key(s) for s in settings}) == 1
    early: dict[str, Value] = {"confidence_threshold": 0.9}
    one = [space.candidate({**drawn, "denoising_steps": 1}), space.candidate({**drawn, "denoising_steps": 1, **early})]
    assert one[0] == one[1]  # one step decides every token


def test_a_study_of_the_earlier_space_is_read_and_told_apart(tmp_path: Path) -> None:
    """Its conditions named one value, as they still may; another space is refused by name."""
    old = Space(
        1,
        (
            Parameter("sampler", "choice", "", ("autoregressive", "two_forward")),
            Parameter("experts_single", "choice", "", ("loop", "gather"), when=("sampler", "autoregressive")),
            Parameter("threads", "integer", "", low=1, high=2),
            Parameter("draft_tokens", "integer", "", low=1, high=24, when=("sampler", "two_forward")),
            Parameter("experts_block", "choice", "", ("loop", "gather"), when=("sampler", "two_forward")),
        ),
    )
    stored = json.loads(json.dumps(plain(old)))
    del stored["histogram"]  # which it did not have
    assert build(Space, stored, "a study") == old
    params: dict[str, Value] = {"sampler": "two_forward", "draft_tokens": 6, "experts_block": "loop", "threads": 1}
    assert old.candidate(params).decoding == DecodingConfig("two_forward", draft_tokens=6)
    run(tmp_path, MadeUp(), subject(space=old), default=default_candidate(old, 1), trials=3)
    with pytest.raises(UserError, match="another search space"):
        run(tmp_path, MadeUp())


def test_the_tuned_mode_serves_the_forwards_that_the_sampler_sends() -> None:
    """... of all sequences and of the few left at the end; a prefill of thousands of tokens keeps the default."""
    space = decoding_space(batch=8, cores=1)
    for candidate in space.grid({"mixing_weight": (1.0,), "draft_tokens": (16,)}):
        params = space.encode(candidate)
        mode = params.get("experts_block") or params.get("experts_single")
        slots = candidate.decoding.slots
        assert {candidate.kernels.expert_mode(b * slots) for b in range(1, 9)} == {mode}
        assert candidate.kernels.expert_mode(4096) == KernelConfig().expert_mode(4096)


def test_settings_outside_the_space_are_refused() -> None:
    space = decoding_space(batch=1, cores=2, lossless=True)
    default = default_candidate(space, 2)
    assert default.decoding == DecodingConfig()
    for decoding, kernels in [
        (DecodingConfig("two_forward", draft_tokens=25), default.kernels),
        (DecodingConfig("two_forward", mixing_weight=0.5), default.kernels),
        (DecodingConfig("single_forward", proposal_levels=(0, 1)), default.kernels),
        (DecodingConfig("denoising", denoising_steps=3, verify=True), default.kernels),
        (DecodingConfig("denoising", denoising_steps=2), default.kernels),  # not lossless
        (DecodingConfig("denoising", denoising_steps=2, confidence_threshold=0.5, verify=True), default.kernels),
        (DecodingConfig(temperature=1.0), default.kernels),
        (DecodingConfig(), replace(default.kernels, threads=3)),
    ]:
        with pytest.raises(UserError):
            space.encode(Candidate(decoding, kernels))
    single = decoding_space(batch=1, cores=2, drafts=False)
    assert {c.decoding.sampler for c in single.grid()} == {"autoregressive"}


def test_a_gpu_has_no_threads_to_set() -> None:
    space = decoding_space(batch=4, cores=None, engine="graphs")
    assert "threads" not in {p.name for p in space.parameters}
    default = default_candidate(space, None)
    assert default == default_candidate(space, 8) == Candidate(DecodingConfig(), KernelConfig(engine="graphs"))
    coarse: dict[str, tuple[Value, ...]] = {"draft_tokens": (1, 16), "mixing_weight": (1.0,)}
    for candidate in space.grid(coarse):
        assert candidate.kernels.threads is None
        assert space.candidate(space.encode(candidate)) == candidate
    assert {c.kernels.engine for c in space.grid(coarse)} == {"graphs", "eager"}


def test_a_space_says_what_it_holds() -> None:
    """A row per parameter, in the order they are drawn, and how many settings they make: fewer than all products."""
    space = decoding_space(batch=1, cores=2)
    rows = {row["name"]: row for row in space.describe()}
    assert list(rows) == [p.name for p in space.parameters]
    assert all(row["meaning"] and row["values"] for row in rows.values())
    assert rows["draft_tokens"]["values"] == f"1 to {MAX_DRAFT_TOKENS}" and rows["verify"]["values"] == "no, yes"
    assert rows["verify"]["condition"] == "sampler is denoising" and rows["sampler"]["condition"] == ""
    assert rows["mixing_weight"]["values"] == "0.25 to 1.0 in steps of 0.05"
    small = small_space()
    assert small.size() == len({small.key(c) for c in small.grid()}) < space.size()
    with pytest.raises(UserError, match="in steps of 2"):
        Parameter("draft_tokens", "integer", "", low=1, high=24, step=2)
