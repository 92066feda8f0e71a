"""Logits that tokens were drawn from and drafts were judged by: kept from a trace, stored, and reasoned about.

Everything is computed in float64, from logits alone: what was stored can be analysed later without the model.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hardware.files import UserError, build, plain
from runtime.checkpoint import load_tensors, save_tensors
from runtime.config import DecodingConfig, require
from runtime.samplers.state import TraceStep

FORMAT = "ridgepoint-logits-1"


@dataclass(frozen=True)
class StoredLogits:
    """N committed tokens, request by request and in order, and the J drafts that were judged on the way to them.

    A draft is judged when all drafts before it in its step were accepted, so its row of `target` gave a token too.
    """

    decoding: DecodingConfig
    target: Tensor  # float32 [N, V]: what each token was drawn from, at decoding.temperature; mixed where logits are
    request: Tensor  # int64 [N]: whose token it is
    place: Tensor  # int64 [N]: which token of its step, from 0; a row at 0 begins a step
    draft: Tensor  # float32 [J, V]: what each draft was drawn from
    draft_temperature: Tensor  # float32 [J]; 0 is argmax
    draft_token: Tensor  # int64 [J]
    row: Tensor  # int64 [J]: the row of `target` that judged it, whose place is the draft's index in its block
    accepted: Tensor  # bool [J]

    def of(self, request: int) -> Tensor:
        """The rows [n, V] of one request's tokens."""
        return self.target[self.request == request]

    @property
    def steps(self) -> int:
        """Steps of single sequences."""
        return int((self.place == 0).sum())

    def expected_acceptance(self) -> Tensor:
        """The probability of every judged draft to be accepted, given its block so far: float64 [J]."""
        if not len(self.row):
            return torch.zeros(0, dtype=torch.float64)
        p = probabilities(self.target[self.row], self.decoding.temperature)
        q = torch.empty_like(p)
        for temperature in self.draft_temperature.unique().tolist():
            rows = self.draft_temperature == temperature
            q[rows] = probabilities(self.draft[rows], temperature, self.draft_token[rows])
        return 1 - _distance(p, q)


def collect(trace: Sequence[TraceStep], decoding: DecodingConfig, lengths: Sequence[int] | None = None) -> StoredLogits:
    """Sort a trace by request. Tensors are copied to the CPU.

    lengths: how many tokens of each request were kept (the engine cuts what a step commits at a stop token and at the
    length limit); rows behind them, and the drafts they judged, are left out. Raises UserError for an empty trace.
    """
    require(len(trace) > 0, "there is no step in this trace")
    by_request: dict[int, list[tuple[TraceStep, int]]] = defaultdict(list)
    for step in trace:
        for b, request in enumerate(step.sequences):
            by_request[request].append((step, b))
    target: list[Tensor] = []
    places: list[Tensor] = []
    requests: list[int] = []
    judged: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    rows = 0
    for request in sorted(by_request):
        room = None if lengths is None else lengths[request]
        for step, b in by_request[request]:
            committed = step.committed[b]
            kept = committed if room is None else min(committed, room)
            room = None if room is None else room - kept
            if not kept:
                continue
            target.append(step.logits[b, :kept])
            places.append(torch.arange(kept))
            requests += [request] * kept
            draft = step.draft
            if draft is not None:
                length = draft.tokens.shape[1] if draft.lengths is None else int(draft.lengths[b])
                count = min(kept, length)  # the last committed token judged a draft too, unless it is the bonus
                index = torch.arange(count)
                judged.append(
                    (draft.logits[b, :count].cpu(), draft.temperatures[:count].cpu(), draft.tokens[b, :count].cpu(),
                     rows + index, index < committed - 1)
                )  # fmt: skip
            rows += kept
    stacked = torch.cat(target).float().cpu()
    empty = torch.zeros(0, dtype=torch.int64)
    none = (stacked[:0], stacked[:0, 0], empty, empty, empty.bool())
    draft_logits, temperatures, tokens, at, accepted = (torch.cat(p) for p in zip(none, *judged, strict=True))
    return StoredLogits(
        decoding, stacked, torch.tensor(requests), torch.cat(places), draft_logits, temperatures, tokens, at, accepted
    )


def save_logits(stored: StoredLogits, path: Path, origin: dict[str, Any] | None = None) -> None:
    """One safetensors file, renamed into place. origin: where it came from (model hash, command), kept beside it."""
    tensors = {name: getattr(stored, name).contiguous() for name in _TENSORS}
    settings = json.dumps(plain(stored.decoding))
    save_tensors(tensors, path, {"stored": FORMAT, "decoding": settings, "origin": json.dumps(origin or {})})


def load_logits(path: Path) -> tuple[StoredLogits, dict[str, Any]]:
    """What `save_logits` wrote, and its origin. UserError for a file that is something else."""
    tensors = load_tensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if metadata.get("stored") != FORMAT or sorted(tensors) != sorted(_TENSORS):
        raise UserError(f"{path} holds no stored logits ({FORMAT}), but {', '.join(sorted(tensors)[:5]) or 'nothing'}")
    try:
        settings, origin = json.loads(metadata["decoding"]), json.loads(metadata["origin"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} does not say what its logits are of: {error!r}") from error
    return StoredLogits(decoding=build(DecodingConfig, settings, f"{path}: decoding"), **tensors), origin


_TENSORS = tuple(f.name for f in dataclasses.fields(StoredLogits) if f.name != "decoding")


def probabilities(logits: Tensor, temperature: float, tokens: Tensor | None = None) -> Tensor:
    """float64 [..., V]: the softmax at a temperature; at 0 all of the mass on the argmax, or on `tokens` [...]."""
    require(temperature >= 0, f"temperature >= 0 must hold, but got {temperature}")
    if temperature > 0:
        return torch.softmax(logits.double() / temperature, -1)
    best = logits.argmax(-1) if tokens is None else tokens
    return torch.nn.functional.one_hot(best, logits.shape[-1]).double()


def total_variation(logits_a: Tensor, logits_b: Tensor, temperature: float) -> Tensor:
    """Half the L1 distance of the two distributions, float64 [...]: the share of draws that must differ.

    At temperature 0 it is 0 where the argmax agrees and 1 where it does not.
    """
    return _distance(probabilities(logits_a, temperature), probabilities(logits_b, temperature))


def kl_divergence(logits_a: Tensor, logits_b: Tensor, temperature: float) -> Tensor:
    """KL(a || b) in nats, float64 [...]; at temperature 0 it is 0 where the argmax agrees and infinite elsewhere."""
    if temperature == 0:
        agree = logits_a.argmax(-1) == logits_b.argmax(-1)
        return torch.where(agree, 0.0, torch.inf).double()
    require(temperature > 0, f"temperature >= 0 must hold, but got {temperature}")
    log_a, log_b = (torch.log_softmax(x.double() / temperature, -1) for x in (logits_a, logits_b))
    terms = log_a.exp() * (log_a - log_b)
    return torch.where(log_a == -torch.inf, 0.0, terms).sum(-1)  # what a never draws costs nothing


def expected_acceptance(
    draft_logits: Tensor, target_logits: Tensor, temperature: float, draft_temperature: float
) -> Tensor:
    """The probability that a draft from its row is accepted by its target row: float64 [...] from logits [..., V].

    sum_x q(x) min(1, p(x) / q(x)) = sum_x min(p, q) = 1 - TV(p, q) (arXiv 2211.17192, theorem 3.5), with p and q each
    at its own temperature. For an argmax draft x (q = 1 at x) that is p(x); where the target is greedy too, 0 or 1.
    """
    return 1 - _distance(probabilities(target_logits, temperature), probabilities(draft_logits, draft_temperature))


def histogram_from_acceptance(stored: StoredLogits, acceptance: Tensor) -> list[float]:
    """The share of steps that accept n drafts, n = 0 .. K, from the acceptance probability [J] of each judged draft.

    The share that accepts draft i of those that accepted all before it is the mean probability over the steps that
    got there, a step without a draft i counting as 0; the shares are chained over i. Given `accepted` itself, it is the
    observed histogram. For logits of whole steps: where `collect` cut the last one, it ends with an accepted draft.
    """
    places = stored.place[stored.row]
    reached, share, histogram = stored.steps, 1.0, []
    for i in range(int(places.max()) + 1 if len(places) else 0):
        here = places == i
        passed = share * float(acceptance[here].sum()) / reached if reached else 0.0
        histogram.append(share - passed)
        share, reached = passed, int(stored.accepted[here].sum())
    return [*histogram, share]


def _distance(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().sum(-1) / 2
