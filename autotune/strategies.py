"""Which settings a search tries, and in which order. "seeded" is the product's; the others are there to be beaten."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal, Protocol, get_args

from autotune.guide import Guide
from autotune.results import StudyResult
from autotune.seeding import Predict, pilots
from autotune.space import Candidate, Space
from hardware.files import known

Sampler = Literal["seeded", "tpe", "random", "grid"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
SEEDS = 8

Proposal = tuple[Candidate, str]
"""A setting to queue, and its source: default, pilot, seed, guided or search."""


class Strategy(Protocol):
    """Proposes what the search library does not propose by itself."""

    def first(self) -> list[Proposal]:
        """What is tried before anything else, the default first."""

    def next(self, result: StudyResult) -> list[Proposal]:
        """What to try now that nothing waits to be tried. Empty: the search library shall propose a setting."""


class Seeded:
    """The default and the pilots, then the best predicted settings, then the guide's and the search library's in turn.

    The guide knows the model and what was measured nearby; the library knows nothing of the model, and finds what the
    model is wrong about.
    """

    def __init__(self, space: Space, default: Candidate, predict: Predict, max_divergence: float) -> None:
        self._space, self._default, self._max_divergence = space, default, max_divergence
        self._guide = Guide(space, predict)

    def first(self) -> list[Proposal]:
        """The default and the pilots."""
        settings = pilots(self._space, self._default)
        return [(c, "default" if c == self._default else "pilot") for c in settings]

    def next(self, result: StudyResult) -> list[Proposal]:
        """The seeds, once in a study; then, two times of three, what is expected to be the fastest."""
        trials, acceptance = result.trials, result.acceptance()
        if not any(t.source == "seed" for t in trials):
            found = self._guide.seeds(trials, acceptance, SEEDS)
            if found:
                return [(c, "seed") for c in found]
        if len(trials) % 3 == 2:
            return []
        guided = self._guide.next(trials, acceptance, self._max_divergence)
        return [] if guided is None else [(guided, "guided")]


class Unseeded:
    """The default, then the search library's proposals."""

    def __init__(self, default: Candidate) -> None:
        self._default = default

    def first(self) -> list[Proposal]:
        """The default."""
        return [(self._default, "default")]

    def next(self, result: StudyResult) -> list[Proposal]:
        """Nothing: the search library proposes."""
        return []


class Listed(Unseeded):
    """The default, then every setting of the space, in a drawn order or in that of the grid from a drawn place on."""

    def __init__(self, space: Space, default: Candidate, seed: int, *, shuffled: bool) -> None:
        super().__init__(default)
        settings, draw = space.grid(), random.Random(seed)
        if shuffled:
            draw.shuffle(settings)
        else:
            begin = draw.randrange(len(settings))
            settings = [*settings[begin:], *settings[:begin]]
        self._space, self._left = space, iter(settings)

    def next(self, result: StudyResult) -> list[Proposal]:
        """The next one that is not known yet; none when all are."""
        done = {self._space.key(result.candidate(t)) for t in result.measured}
        left: Iterator[Candidate] = (c for c in self._left if self._space.key(c) not in done)
        return [(c, "search") for c in (next(left, None),) if c is not None]


def strategy(
    name: Sampler, space: Space, default: Candidate, predict: Predict, max_divergence: float, seed: int
) -> Strategy:
    """The strategy of that name. UserError for an unknown one."""
    if name not in SAMPLERS:
        raise known("search strategy", name, SAMPLERS)
    if name == "seeded":
        return Seeded(space, default, predict, max_divergence)
    return Unseeded(default) if name == "tpe" else Listed(space, default, seed, shuffled=name == "random")
