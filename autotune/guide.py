"""Which settings to try next: predictions, corrected by what was measured of settings that are alike.

The performance model knows what a step costs and roughly how many tokens it commits. What it does not know, as what a
second thread gives on this machine, or drafts of several denoising steps, shows in the ratio of measured to
predicted, and settings that are alike are wrong alike. So the logarithm of that ratio is estimated for every setting
from those that were measured: a Gaussian process whose correlation falls with the distance of two settings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from autotune.seeding import Acceptance, Predict, Prediction
from autotune.space import Candidate, Parameter, Space, Value
from perfmodel.acceptance import judged
from runtime.config import SAMPLER_NAMES, DecodingConfig

if TYPE_CHECKING:
    import numpy.typing as npt

    from autotune.results import TrialRecord

    Numbers = npt.NDArray[np.float64]

# Standard deviations of parts of log(measured / predicted): what all settings have in common, those of a sampler, those
# with the same value of another parameter, what a setting has of its own, and a measurement's noise. They are fitted to
# no table. A sampler's part is the largest: acceptance is measured with one of them, and its own work is only counted.
_COMMON, _SAMPLER, _EACH, _OWN, _NOISE = (math.log(1 + share) for share in (0.15, 0.5, 0.1, 0.3, 0.08))
# What divides a correlation by e is a distance of 1: that of another choice, and of the two ends of a number's range.
_OTHER_CHOICE, _OTHER_END = 0.7, 2.0
_HOPE = 0.5  # standard deviations that the unknown is taken to be better than expected: tried in case of doubt
_FAILED = math.log(0.1)  # what failed counts as a tenth of its prediction, so that its like is left alone
_FEW = 4  # values of a parameter that are considered, where it has many
_APART = 4  # drafts: seeds that differ in nothing else are right or wrong together


@dataclass(frozen=True)
class _Table:
    """The settings that are considered: their parameters, their places beside each other, what is predicted of them."""

    settings: list[Candidate]
    params: list[dict[str, Value]]
    keys: dict[str, int]
    places: Places
    predictions: list[Prediction]
    log_speed: Numbers


class Places(NamedTuple):
    """Settings as points, a row each and a column per parameter: the index of a choice, and the place of a number."""

    samplers: npt.NDArray[np.int64]
    choices: npt.NDArray[np.int64]
    numbers: Numbers

    def covariance(self, others: Places) -> Numbers:
        """Of the unknown factors of each of these settings with each of those, as logarithms."""
        same = self.samplers[:, None] == others.samplers
        found = _COMMON**2 + _SAMPLER**2 * same
        own = _OWN**2 * np.where(same, 1.0, math.exp(-_OTHER_CHOICE))
        for mine, theirs in zip(self.choices.T, others.choices.T, strict=True):
            same = mine[:, None] == theirs
            found += _EACH**2 * (same & (theirs >= 0))
            own *= np.where(same, 1.0, math.exp(-_OTHER_CHOICE))
        for place, other in zip(self.numbers.T, others.numbers.T, strict=True):
            likeness = np.exp(-_OTHER_END * abs(place[:, None] - other))
            found += _EACH**2 * likeness
            own *= likeness
        return found + own

    @property
    def variance(self) -> float:
        """Of any one setting's factor."""
        return _COMMON**2 + _SAMPLER**2 + _OWN**2 + _EACH**2 * (self.choices.shape[1] + self.numbers.shape[1])


class Expected(NamedTuple):
    """Of every setting of a table: the logarithm of its speed, the standard deviation of that, and its divergence."""

    log_speed: Numbers
    deviation: Numbers
    divergence: Numbers


class Guide:
    """Proposes settings of a space. It keeps the predictions, which depend on what the pilots accepted alone."""

    def __init__(self, space: Space, predict: Predict) -> None:
        self._space, self._predict = space, predict
        self._for: Acceptance | None = None
        self._table: _Table | None = None
        self._rows: dict[str, Numbers] = {}  # of covariance with the table, by setting
        self._known: dict[str, tuple[Candidate, dict[str, Value]]] = {}  # settings of trials

    def seeds(self, trials: Sequence[TrialRecord], acceptance: Acceptance | None, count: int) -> list[Candidate]:
        """The first `count` new settings of the Pareto fronts of expected speed and divergence, front after front.

        Within one, the fastest first; each further one has at most a quarter of the divergence. Settings that differ in
        K alone are at least _APART apart, and none has a confidence threshold: when one ends a block is not predicted.
        Of n tokens without a difference less than 1 / n is not believed, so that each front reaches a lossless setting.
        """
        table = self._table_for(acceptance)
        if not table.settings:
            return []
        expected = self._expected(table, acceptance, trials)
        lossless = np.array([c.decoding.lossless for c in table.settings])
        divergence = np.where(lossless, 0.0, np.maximum(expected.divergence, 1 / _counted(trials)))
        done = self._done(trials)
        known = {table.keys[key] for key in done if key in table.keys}
        left = [
            i
            for i in np.argsort(-expected.log_speed, kind="stable").tolist()
            if i not in known and table.settings[i].decoding.confidence_threshold is None
        ]
        found: list[int] = []
        drafts: dict[str, list[int]] = {}
        while left and len(found) < count:
            least, rest = math.inf, list[int]()
            for i in left:
                others = json.dumps({n: v for n, v in table.params[i].items() if n != "draft_tokens"})
                k, alike = table.settings[i].decoding.draft_tokens, drafts.setdefault(others, [])
                if any(abs(k - other) < _APART for other in alike):
                    continue
                far = float(divergence[i])
                if far >= least or far > least / 4:  # another of this front is no slower, and as near or nearly so
                    rest.append(i)
                    continue
                least = far
                alike.append(k)
                found.append(i)
            left = rest
        return [table.settings[i] for i in found[:count]]

    def next(
        self, trials: Sequence[TrialRecord], acceptance: Acceptance | None, max_divergence: float = 0.0
    ) -> Candidate | None:
        """The new setting that is expected to be the fastest of those that may be chosen, in case of doubt hopefully.

        None when none is left, or nothing can be predicted.
        """
        table = self._table_for(acceptance)
        if not table.settings:
            return None
        expected = self._expected(table, acceptance, trials)
        hoped = expected.log_speed + _HOPE * expected.deviation
        most = max_divergence + math.sqrt(
            max_divergence / _counted(trials)
        )  # of which a count of so many tokens is certain
        for i, setting in enumerate(table.settings):
            if not setting.decoding.lossless and not 0 < most >= expected.divergence[i]:
                hoped[i] = -math.inf
        for key in self._done(trials):
            if key in table.keys:
                hoped[table.keys[key]] = -math.inf
        best = int(hoped.argmax())
        return table.settings[best] if math.isfinite(hoped[best]) else None

    def expected(self, trials: Sequence[TrialRecord], acceptance: Acceptance | None) -> dict[str, tuple[float, float]]:
        """Tokens per second and divergence that are expected by now of every setting considered, by its key."""
        table = self._table_for(acceptance)
        if not table.settings:
            return {}
        found = self._expected(table, acceptance, trials)
        return {key: (math.exp(found.log_speed[i]), float(found.divergence[i])) for key, i in table.keys.items()}

    def _done(self, trials: Sequence[TrialRecord]) -> set[str]:
        """What was tried, or is being tried."""
        whole = (trial.params for trial in trials if self._space.complete(trial.params))
        return {json.dumps(self._setting(params)[1], sort_keys=True) for params in whole}

    def _setting(self, params: dict[str, Value]) -> tuple[Candidate, dict[str, Value]]:
        """What a trial runs, and the parameters that all equal settings have."""
        name = json.dumps(params)
        if name not in self._known:
            candidate = self._space.candidate(params)
            self._known[name] = candidate, self._space.encode(candidate)
        return self._known[name]

    def _table_for(self, acceptance: Acceptance | None) -> _Table:
        if self._table is None or self._for != acceptance:
            coarse = {p.name: _few(p) for p in self._space.parameters if p.name in ("mixing_weight", "threads")}
            predicted = [(c, self._predict(c, acceptance)) for c in self._space.grid(coarse)]
            known = [(c, p) for c, p in predicted if p is not None]
            settings, predictions = [c for c, _ in known], [p for _, p in known]
            params = [self._space.encode(c) for c in settings]
            self._table = _Table(
                settings,
                params,
                {json.dumps(p, sort_keys=True): i for i, p in enumerate(params)},
                self._places(params),
                predictions,
                np.log([p.tokens_per_second for p in predictions]),
            )
            self._for, self._rows = acceptance, {}
        return self._table

    def _places(self, params: Sequence[dict[str, Value]]) -> Places:
        """A parameter that a setting does not have, as it is another sampler's, is a choice of its own."""
        samplers = np.array([SAMPLER_NAMES.index(given["sampler"]) for given in params])
        varied = [p for p in self._space.parameters if len(p.values()) > 1 and p.name != "sampler"]
        numeric = [p for p in varied if p.kind != "choice"]
        optional = [p for p in varied if p.kind == "choice" or p.when is not None]
        choices = np.zeros((len(params), len(optional)), dtype=np.int64)
        numbers = np.zeros((len(params), len(numeric)))
        for row, given in enumerate(params):
            for column, parameter in enumerate(optional):
                value = given.get(parameter.name)
                if value is None:
                    choices[row, column] = -1
                elif parameter.kind == "choice":
                    choices[row, column] = parameter.choices.index(value)
            for column, parameter in enumerate(numeric):
                value = float(given.get(parameter.name, parameter.low))
                numbers[row, column] = (value - parameter.low) / (parameter.high - parameter.low)
        return Places(samplers, choices, numbers)

    def _expected(self, table: _Table, acceptance: Acceptance | None, trials: Sequence[TrialRecord]) -> Expected:
        """What is expected now: the prediction times the likely factor, and the divergence likewise."""
        own = _DivergencePrior(trials, self._space)
        prior = np.array([own(c.decoding) for c in table.settings])
        params, ratios, excess = list[dict[str, Value]](), list[float](), list[float]()
        for trial in trials:
            if trial.outcome is None or trial.same_as is not None:
                continue
            candidate, given = self._setting(trial.params)
            at = table.keys.get(json.dumps(given, sort_keys=True))
            prediction = self._predict(candidate, acceptance) if at is None else table.predictions[at]
            ratio = None if prediction is None else _log_ratio(trial, prediction)
            if ratio is not None:
                params.append(given)
                ratios.append(ratio)
                excess.append(0.0 if trial.divergence is None else trial.divergence - own(candidate.decoding))
        if not params:
            return Expected(table.log_speed, np.full(len(prior), math.sqrt(table.places.variance)), prior)
        measured = self._places(params)
        among = measured.covariance(measured) + _NOISE**2 * np.eye(len(params))
        across = self._across(table, params, measured)
        weights = np.linalg.solve(among, across)  # a column per setting: what each measured one says of it
        variance = measured.variance - (across * weights).sum(0)
        divergence = np.maximum(prior + np.asarray(excess) @ weights, 0.0)
        divergence[[c.decoding.lossless for c in table.settings]] = 0.0
        return Expected(table.log_speed + np.asarray(ratios) @ weights, np.sqrt(np.maximum(variance, 0.0)), divergence)

    def _across(self, table: _Table, params: Sequence[dict[str, Value]], measured: Places) -> Numbers:
        """Covariance of what was measured with all settings, of which only new rows are computed."""
        keys = [json.dumps(given, sort_keys=True) for given in params]
        new = [i for i, key in enumerate(keys) if key not in self._rows]
        if new:
            rows = self._places([params[i] for i in new]).covariance(table.places)
            self._rows |= {keys[i]: row for i, row in zip(new, rows, strict=True)}
        return np.array([self._rows[key] for key in keys])


class _DivergencePrior:
    """Divergence of a setting before any other but the pilots is known.

    Judged drafts: between the pilots' mixing weights. Others: in proportion to K, as the pilot that nothing verified
    had it (without one 1): a draft is the more often wrong the further it is from what is decided.
    """

    def __init__(self, trials: Sequence[TrialRecord], space: Space) -> None:
        self._by_weight, self._kept = {1.0: 0.0}, 1.0
        for trial in trials:
            if trial.source == "pilot" and trial.divergence is not None:
                decoding = space.candidate(trial.params).decoding
                if judged(decoding) and not decoding.lossless:
                    self._by_weight[decoding.mixing_weight] = trial.divergence
                elif not decoding.lossless:
                    self._kept = trial.divergence / decoding.draft_tokens

    def __call__(self, decoding: DecodingConfig) -> float:
        if decoding.lossless:
            return 0.0
        if not judged(decoding):
            return min(1.0, self._kept * decoding.draft_tokens)
        weights = sorted(self._by_weight)
        return float(np.interp(decoding.mixing_weight, weights, [self._by_weight[w] for w in weights]))


def _counted(trials: Sequence[TrialRecord]) -> float:
    """Tokens of a pass, by which divergence is counted; infinite before any."""
    return max((float(trial.tokens[0]) for trial in trials if trial.tokens), default=math.inf)


def _log_ratio(trial: TrialRecord, prediction: Prediction) -> float | None:
    """log(measured / predicted) speed. None for a trial that says nothing of it."""
    if trial.outcome == "correct" and trial.tokens_per_second:
        return math.log(trial.tokens_per_second / prediction.tokens_per_second)
    if trial.outcome == "slower":  # than the best, by its step alone
        return math.log(prediction.step_seconds / trial.step_seconds) if trial.step_seconds else None
    return _FAILED


def _few(parameter: Parameter) -> tuple[Value, ...]:
    """All values where they are few; of threads the powers of two and the most; of a mixing weight four."""
    values = parameter.values()
    if len(values) <= _FEW:
        return values
    if parameter.kind == "integer":
        powers = {2**i for i in range(int(values[-1]).bit_length())}
        return tuple(v for v in values if v in powers or v == values[-1])
    return tuple(values[round(i)] for i in np.linspace(0, len(values) - 1, _FEW))
