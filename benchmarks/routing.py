"""Record which experts forwards choose, against tokens in flight, for batches of single tokens and for blocks.

python -m benchmarks.routing --out measurements/zaya-nano/routing.json [--model zaya-nano] [--sequences 256]

Every sequence is cut at a random place of a held-out worked task or, every fourth, of held-out source text, and decoded
greedily by one step of each sampler: decode is one token, draft [anchor, K masks], verify [anchor, K drafts], single
both for some levels. Coverages are then compared with what other prompts record, at other batches and slots.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import command, counting, fail_in_one_line
from hardware.fingerprint import git_commit
from perfmodel.experts import ExpertCoverage, coverage_of, fit_rho
from runtime.checkpoint import load_model, model_hash
from runtime.config import DecodingConfig, replace, require
from runtime.measurement import ForwardKind
from runtime.model.zaya import Zaya
from runtime.route_recording import prefixes, record
from runtime.routing import (
    FORMAT,
    HeldOut,
    Routes,
    RoutingFacts,
    RoutingPoint,
    batches_of,
    block_of,
    point_of,
    routing_json,
    write_routing,
)

WIDE = 48  # slots beyond which a quarter of the sequences is recorded, at a quarter of the batches
LARGEST_BATCH = 128
LARGEST_BLOCKS = 64


def _single(draft_tokens: int, *levels: int) -> DecodingConfig:
    return DecodingConfig("single_forward", draft_tokens, proposal_levels=levels)


def _blocks(*slots: int) -> list[DecodingConfig]:
    return [DecodingConfig("two_forward", n - 1) for n in slots]


RECORDED = [
    DecodingConfig(),
    *_blocks(2, 3, 5, 9, 13, 17, 21, 25, 33),
    *(_single(4, 0), _single(8, 0, 4), _single(16, 0, 8), _single(16, 0, 4, 7, 11), _single(16, *range(17))),
]
HELD_OUT = [DecodingConfig(), *_blocks(4, 7, 11, 15, 19), _single(16, 0, 5, 10)]
HELD_OUT_BATCHES = (1, 3, 6, 12, 24)


def record_all(
    model: Zaya, sequences: int, decodings: Sequence[DecodingConfig], *, seed: int, progress: Callable[[int], None]
) -> list[tuple[ForwardKind, Routes]]:
    """The routes of every kind of forward of these settings, by kind."""
    rows, found = prefixes(model, sequences, seed), []
    for done, decoding in enumerate(decodings, 1):
        used = rows if decoding.slots <= WIDE else rows[: max(2, sequences // 4)]
        found += list(record(model, used, decoding).items())
        progress(done)
    return found  # type: ignore[return-value]  # the samplers name their forwards


def points_of(
    recorded: Sequence[tuple[ForwardKind, Routes]], experts: int, batches: Sequence[int] | None = None
) -> list[RoutingPoint]:
    """A point per kind, slots and batch; batches: those to count, as far as the sequences suffice (None: doubling)."""
    found = []
    for kind, routes in recorded:
        sequences = routes.shape[1]
        largest = LARGEST_BATCH if kind == "decode" else LARGEST_BLOCKS
        doubling = batches_of(sequences, largest)
        wanted = doubling if batches is None else [b for b in batches if b <= doubling[-1]]
        found += [point_of(kind, routes, batch, experts) for batch in wanted]
    return sorted(found, key=lambda p: (p.kind, p.slots, p.batch))


def compare(points: Sequence[RoutingPoint], coverages: dict[str, ExpertCoverage], experts: int) -> tuple[HeldOut, ...]:
    """Each named coverage against these points, by kind of forward."""
    found = []
    for kind in dict.fromkeys(p.kind for p in points):
        own = [p for p in points if p.kind == kind]
        batch, slots, distinct = (np.array(c) for c in zip(*((p.batch, p.slots, p.distinct) for p in own), strict=True))
        for name, coverage in coverages.items():
            error = np.abs(coverage.of(kind).distinct(batch, slots, experts) - distinct)
            found.append(HeldOut(name, kind, len(own), round(float(error.mean()), 4), round(float(error.max()), 4)))
    return tuple(found)


def facts_of(
    model: Zaya, name: str, *, said: str, sequences: int, progress: Callable[[str, int], Callable[[int], None]]
) -> RoutingFacts:
    """Record, count, fit and compare. progress: given what comes and in how many parts, what to call after each."""
    experts = model.config.num_experts
    recorded = record_all(model, sequences, RECORDED, seed=0, progress=progress("recording", len(RECORDED)))
    points = points_of(recorded, experts)
    apart = record_all(model, sequences, HELD_OUT, seed=1, progress=progress("held out", len(HELD_OUT)))
    facts = RoutingFacts(
        FORMAT,
        name,
        model_hash(model),
        said,
        git_commit(Path(__file__)),
        f"{datetime.now(UTC):%Y-%m-%d}",
        model.config.num_hidden_layers,
        experts,
        tuple(points),
        tuple(sorted((block_of(kind, routes, experts) for kind, routes in recorded), key=lambda b: (b.kind, b.slots))),
        {},
        (),
    )
    measured = coverage_of(facts)
    rhos = {kind: round(fit_rho(measured.of(kind), experts), 4) for kind in ("draft", "verify", "single")}
    held_out = points_of(apart, experts, HELD_OUT_BATCHES)
    named = {"uniform": ExpertCoverage(), "measured": measured}
    found = compare(held_out, named, experts)
    for kind, rho in rhos.items():
        fitted = ExpertCoverage("correlated", rho=rho, skip_share=measured.of(kind).skip_share)
        found += compare([p for p in held_out if p.kind == kind], {str(fitted): fitted}, experts)
    return replace(facts, fitted_rho=rhos, held_out=found)


def main(arguments: list[str] | None = None) -> int:
    """Record, write and print; returns the exit code."""
    chosen = _arguments(arguments)
    require(chosen.sequences >= 8, f"sequences >= 8 must hold, but got {chosen.sequences}")
    require(chosen.threads >= 1, f"threads >= 1 must hold, but got {chosen.threads}")
    torch.set_num_threads(chosen.threads)
    model = load_model(chosen.model)

    def progress(what: str, parts: int) -> Callable[[int], None]:
        print(what, file=sys.stderr)
        return counting(parts)

    said = command("benchmarks.routing", arguments)
    facts = facts_of(model, chosen.model, said=said, sequences=chosen.sequences, progress=progress)
    if chosen.out is not None:
        write_routing(facts, chosen.out)
    print(routing_json(facts) if chosen.json else _table(facts))
    return 0


def _table(facts: RoutingFacts) -> str:
    lines = [f"distinct experts of {facts.experts} per layer", "kind    slots  batch: distinct"]
    for block in facts.blocks:
        own = [p for p in facts.points if (p.kind, p.slots) == (block.kind, block.slots)]
        rho = "" if block.correlation is None else f"  rho {block.correlation:.3f} [{block.low:.3f}, {block.high:.3f}]"
        counts = "  ".join(f"{p.batch}: {p.distinct:.2f}" for p in own)
        lines.append(f"{block.kind:6}  {block.slots:5}  {counts}  skip {block.skip_share:.3f}{rho}")
    lines += [f"fitted: {kind} correlated({rho:g})" for kind, rho in facts.fitted_rho.items()]
    lines.append("against other prompts, batches and slots: mean and largest error in experts")
    lines += [
        f"  {h.kind:6}  {h.coverage:20}  {h.mean_absolute_error:.3f}  {h.largest_error:.3f}"
        for h in sorted(facts.held_out, key=lambda h: h.kind)
    ]
    return "\n".join(lines)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zaya-nano", help="a checkpoint folder or a bundled name")
    parser.add_argument("--sequences", type=int, default=256, help="prompts recorded, and as many held out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the file to write, for --expert-coverage measured:FILE")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
