"""Which settings a search tries, and in which order. "seeded" is the product's; the others are there to be beaten."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal, Protocol, get_args

from autotune.results import StudyResult
from autotune.seeding import Predict, pilots, seeds
from autotune.space import Candidate, Space
from hardware.files import known

Sampler = Literal["seeded", "tpe", "random", "grid"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
SEEDS = 8

Proposal = tuple[Candidate, str]
"""A setting to queue, and its source: default, pilot, seed or search."""


class Strategy(Protocol):
    """Proposes what the search library does not propose by itself."""

    def first(self) -> list[Proposal]:
        """What is tried before anything else, the default first."""

    def next(self, result: StudyResult) -> list[Proposal]:
        """What to try now that nothing waits to be tried. Empty: the search library shall propose a setting."""


class Seeded:
    """The default and the pilots, then the best predicted settings, then the search library's."""

    def __init__(self, space: Space, default: Candidate, predict: Predict) -> None:
        self._space, self._default, self._predict = space, default, predict
        self._seeded = False

    def first(self) -> list[Proposal]:
        """The default and the pilots."""
        settings = pilots(self._space, self._default)
        return [(c, "default" if c == self._default else "pilot") for c in settings]

    def next(self, result: StudyResult) -> list[Proposal]:
        """The seeds, once in a study."""
        if self._seeded or any(t.source == "seed" for t in result.trials):
            return []
        self._seeded = True
        return [(c, "seed") for c in seeds(self._space, self._predict, result.acceptance(), SEEDS)]


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


def strategy(name: Sampler, space: Space, default: Candidate, predict: Predict, seed: int) -> Strategy:
    """The strategy of that name. UserError for an unknown one."""
    if name not in SAMPLERS:
        raise known("search strategy", name, SAMPLERS)
    if name == "seeded":
        return Seeded(space, default, predict)
    return Unseeded(default) if name == "tpe" else Listed(space, default, seed, shuffled=name == "random")
