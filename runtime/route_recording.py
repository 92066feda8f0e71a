"""Routes to time experts with: those that a model chose, or drawn like those whose facts were recorded."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hardware.files import known
from runtime.bench import token_rows
from runtime.checkpoint import load_model
from runtime.config import DecodingConfig, ModelConfig, require
from runtime.conversion.data import source_prompts
from runtime.conversion.tasks import FAMILIES, draw
from runtime.layout import Layout, causal
from runtime.model.zaya import Zaya
from runtime.routing import BlockFacts, Routes, RoutingFacts, read_routing
from runtime.samplers import advance
from runtime.samplers.acceptance import Randomness
from runtime.samplers.state import Decode
from runtime.tokenizer import BOS, VOCABULARY

SOURCE_TOKENS = 256
CHUNK_TOKENS = 2048  # of one forward: bounds its memory
ROWS = 64  # forwards whose routes are kept to time with
_KINDS = ("verify", "single", "draft", "decode")  # which facts of a block are taken, where several have its slots


@dataclass
class Recording(Decode):
    """A decode that keeps the routes of its last forward of each kind, int64 [layers, B, S]."""

    routes: dict[str, Tensor] = field(default_factory=dict)

    def forward(self, kind: str, tokens: Tensor, layout: Layout, *, counts: list[int] | None = None) -> Tensor:
        """Run one forward and keep its routes."""
        found: list[Tensor] = []
        hidden = self.model.forward(tokens, layout, self.cache, counts=counts, routes=found)
        self.routes[kind] = torch.stack(found).view(len(found), *tokens.shape)
        return hidden


def prefixes(model: Zaya, count: int, seed: int) -> list[list[int]]:
    """Tokens up to a random place of a worked task or of source text; random ids for another vocabulary."""
    rng = random.Random(f"routing/{seed}")
    if model.config.vocab_size != VOCABULARY:
        return [row[: rng.randrange(8, 33)] for row in token_rows(model, count, 32, seed=seed)]
    families, rows = list(FAMILIES), []
    source = [text for text, _ in source_prompts(count, SOURCE_TOKENS, seed, 0)]
    for i in range(count):
        if i % 4 == 3:
            begin, text = SOURCE_TOKENS // 4, [BOS, *source[i]]
        else:
            problem = draw(families[i % len(families)], rng, "test")
            begin = 1 + len(problem.prompt)
            text = [BOS, *(problem.prompt + problem.solution).encode()]
        rows.append(text[: rng.randrange(begin, len(text))])
    return rows


@torch.inference_mode()
def record(model: Zaya, rows: Sequence[Sequence[int]], decoding: DecodingConfig) -> dict[str, Routes]:
    """The routes of one step's forwards behind these prefixes, by kind, int64 [layers, sequences, slots].

    Of single_forward they are the second step's: the first one has no drafts.
    """
    device = model.model.embed_tokens.weight.device
    found: dict[str, list[Routes]] = defaultdict(list)
    chunk = max(1, CHUNK_TOKENS // decoding.slots)
    for begin in range(0, len(rows), chunk):
        prompts = [list(row) for row in rows[begin : begin + chunk]]
        width, steps = max(map(len, prompts)), 2 if decoding.sampler == "single_forward" else 1
        cache = model.new_cache(len(prompts), width + steps * decoding.slots, decoding.slots)
        counts = [len(p) - 1 for p in prompts]
        padded = torch.tensor([p[:-1] + [0] * (width - len(p)) for p in prompts], device=device)
        model.forward(padded, causal(width - 1, str(device)), cache, counts=counts)
        cache.advance(counts)
        anchors = torch.tensor([p[-1:] for p in prompts], device=device)
        decode = Recording(model, cache, decoding, anchors, Randomness(0, len(prompts)), list(range(len(prompts))))
        for _ in range(steps):
            advance(decode)
        for kind, routes in decode.routes.items():
            found[kind].append(routes.cpu().numpy())
    return {kind: np.concatenate(parts, axis=1) for kind, parts in found.items()}


@dataclass(frozen=True)
class RouteRows:
    """Routes of forwards of one size: int64 [rows, tokens], each row another layer's where layers are known.

    source: where they came from, in words, as a record says it.
    """

    rows: Routes
    source: str


def route_rows(
    routing: str,
    config: ModelConfig,
    batch: int,
    slots: int,
    *,
    decoding: DecodingConfig | None = None,
    device: str = "cpu",
    rows: int = ROWS,
    seed: int = 0,
) -> RouteRows:
    """Routes for forwards of batch x slots tokens of a model of this config.

    routing: `recorded:MODEL` (a checkpoint, run now), `measured:FILE` (drawn like those of which the file has the
    facts, see `drawn`), or `uniform`. decoding: whose slots they are; None: one decoded token, or a block and its
    verification. A model of another vocabulary than our tokenizer's reads random tokens, and the source says so.
    UserError for routes of another number of experts: who chooses among 8 says nothing of 16.
    """
    kind, _, name = routing.partition(":")
    if routing == "uniform":
        rng = np.random.default_rng(seed)
        return RouteRows(rng.integers(0, config.num_experts + 1, (rows, batch * slots)), "uniform")
    if kind not in ("recorded", "measured") or not name:
        raise known("routing", routing, ("recorded:MODEL", "measured:FILE", "uniform"))
    if kind == "measured":
        facts = read_routing(Path(name))
        _same_experts(facts.experts, facts.model, config)
        block = nearest_block(facts, slots)
        return RouteRows(drawn(block, batch, slots, rows, seed), f"measured:{name} ({block.kind} of {block.slots})")
    model = load_model(name, device=device, engine="eager")  # captured steps would keep their routes to themselves
    _same_experts(model.config.num_experts, name, config)
    decoding = decoding or (DecodingConfig() if slots == 1 else DecodingConfig("two_forward", slots - 1))
    require(decoding.slots == slots, f"{decoding.sampler} must send the slots, but sends {decoding.slots}, not {slots}")
    found = record(model, prefixes(model, max(batch, rows // 4), seed), decoding)
    kinds = [routes for routes in found.values() if routes.shape[2] == slots]
    text = "" if model.config.vocab_size == VOCABULARY else ", behind random tokens"
    return RouteRows(_forwards(kinds, batch, rows, seed), f"recorded:{name} ({decoding.sampler}{text})")


def _same_experts(experts: int, name: str, config: ModelConfig) -> None:
    require(
        experts == config.num_experts,
        f"routes must be of a model with as many experts, {config.num_experts}, but {name} has {experts}",
    )


def _forwards(kinds: Sequence[Routes], batch: int, rows: int, seed: int) -> Routes:
    """Forwards of `batch` of the recorded sequences, kinds and layers in turn."""
    rng, found = np.random.default_rng(seed), []
    for row in range(rows):
        routes = kinds[row % len(kinds)]
        layers, sequences, _ = routes.shape
        chosen = rng.permutation(sequences)[:batch]
        found.append(routes[row // len(kinds) % layers, chosen].reshape(-1))
    return np.stack(found)


def nearest_block(facts: RoutingFacts, slots: int) -> BlockFacts:
    """The facts of blocks of so many slots, or of the nearest number that was recorded; UserError without any."""
    require(len(facts.blocks) > 0, f"these routing facts of {facts.model} must have blocks, but have none")
    return min(facts.blocks, key=lambda b: (abs(b.slots - slots), _KINDS.index(b.kind)))


def drawn(block: BlockFacts, batch: int, slots: int, rows: int, seed: int = 0) -> Routes:
    """Forwards with these loads and correlations, int64 [rows, batch x slots], a layer's in each row, in turn.

    A token skips with its layer's share. The real choices of a sequence are a Polya urn's: shares drawn from a
    Dirichlet distribution around the layer's loads, whose concentration 1 / rho - 1 gives two tokens of a block the
    recorded probability of choosing the same expert, chance + rho (1 - chance). Blocks of a batch are independent.
    What an expert's share depends on besides (the text) is not drawn.
    """
    rng, found = np.random.default_rng(seed), []
    for row in range(rows):
        layer = row % len(block.load)
        load = np.array(block.load[layer])
        share, skipped = load[:-1] / load[:-1].sum(), load[-1] / load.sum()
        rho = min(max(block.correlation_per_layer[layer], 0.0), 1 - 1e-6) if block.correlation_per_layer else 0.0
        real = np.stack([_urn(share, rho, slots, rng) for _ in range(batch)])
        found.append(np.where(rng.random(real.shape) < skipped, len(share), real).reshape(-1))
    return np.stack(found)


def _urn(share: npt.NDArray[np.float64], rho: float, slots: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    if rho > 1e-6:
        hit = share > 0  # a Dirichlet distribution has no share of nothing
        mixed = np.zeros_like(share)
        mixed[hit] = rng.dirichlet(share[hit] * (1 / rho - 1))
        share = mixed
    return rng.choice(len(share), size=slots, p=share / share.sum())
