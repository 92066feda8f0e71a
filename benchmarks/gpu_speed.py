"""Full-size speed of `benchmarks.gpu`: batch-1 decoding beside `transformers`, forwards and whole steps by batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.engine_equality import compare_logits
from benchmarks.gpu_session import RANDOM, Plan, Session
from hardware.files import UserError, plain
from perfmodel.steps import title
from runtime.bench import (
    Identity,
    Prefilled,
    identify,
    interleave,
    measure_forward,
    paired_ratio,
    prefill,
    token_rows,
    wait,
)
from runtime.bench_generation import measure_generation, sample_generation
from runtime.checkpoint import empty_model, random_model
from runtime.config import DecodingConfig, Engine, KernelConfig
from runtime.engines import engine_of
from runtime.measurement import ForwardKind, append_jsonl
from runtime.model.zaya import Zaya
from runtime.operators import measure_operators
from runtime.policy import using


def full_size(session: Session, plan: Plan) -> None:
    """Speed of the default engine at full size: batch-1 decoding, `transformers` beside it, and steps by batch."""
    session.say(f"{plan.name}, {plan.dtype}, {RANDOM}")
    model: Zaya | None = session.attempt(
        f"{plan.name} weights", lambda: random_model(plan.model, device=session.device, dtype=plan.dtype).freeze()
    )
    if model is None:
        return
    identity = identify(model, plan.name, session.command, simulated=RANDOM)
    fast = KernelConfig(engine=engine_of(model))
    generation(session, plan, model, identity, fast, DecodingConfig(), 1, plan.new_tokens[0], plan.rounds)
    session.attempt("beside", lambda: beside(session, plan, model, identity, fast))
    session.release()
    for batch in plan.batches:
        steps(session, plan, model, identity, fast, batch)
    for batch in plan.batches[:2]:
        forwards(session, plan, model, identity, KernelConfig(), batch)
    session.attempt("logits", lambda: full_logits(session, plan, model, fast.engine))


def generation(
    session: Session,
    plan: Plan,
    model: Zaya,
    identity: Identity,
    kernels: KernelConfig,
    way: DecodingConfig,
    batch: int,
    tokens: int,
    repeats: int,
) -> None:
    """One record: whole steps, with drawing, judging and what the host does between them."""
    measure = partial(
        measure_generation,
        model,
        identity,
        token_rows(model, batch, plan.context),
        way,
        kernels=kernels,
        max_new_tokens=tokens,
        repeats=repeats,
    )
    session.measure("generations", f"{kernels.engine} {title(way)}, batch {batch}", measure)
    session.release()


def steps(session: Session, plan: Plan, model: Zaya, identity: Identity, kernels: KernelConfig, batch: int) -> None:
    """The forwards of a step at one batch, and the whole steps of two_forward and single_forward."""
    forwards(session, plan, model, identity, kernels, batch)
    ways = [
        DecodingConfig("two_forward", plan.drafts),
        DecodingConfig("single_forward", plan.drafts, proposal_levels=plan.levels),
    ]
    if batch > 1:
        ways.append(DecodingConfig())
    for way in ways:
        generation(session, plan, model, identity, kernels, way, batch, plan.new_tokens[1], 1)


def forwards(session: Session, plan: Plan, model: Zaya, identity: Identity, kernels: KernelConfig, batch: int) -> None:
    """One forward of each kind, over a cache that is filled once."""
    width = plan.drafts + 1
    kind: ForwardKind
    points: list[tuple[ForwardKind, int, tuple[int, ...]]] = [
        ("decode", 1, (0,)),
        ("draft", width, (0,)),
        ("verify", width, (0,)),
        ("single", width * (1 + len(plan.levels)), plan.levels),
    ]
    where = f"batch {batch}, context {plan.context}, {kernels.engine}"
    widest = max(slots for _, slots, _ in points)
    filled: Prefilled | None = session.attempt(f"prefill {where}", lambda: prefill(model, batch, plan.context, widest))
    if filled is None:
        return
    for kind, slots, levels in points:
        measure = partial(
            measure_forward,
            model,
            identity,
            kind=kind,
            batch=batch,
            slots=slots,
            context=plan.context,
            levels=levels,
            kernels=kernels,
            repeats=plan.repeats,
            prefilled=filled,
        )
        session.measure("forwards", f"{kind}, {slots} slots, {where}", measure)
    timed: list[tuple[ForwardKind, int]] = [("decode", 1), ("verify", width)]
    for kind, slots in timed if kernels.engine != "eager" else ():
        point = partial(operators, session, plan, model, identity, kernels, kind, batch, slots, filled)
        session.attempt(f"operators of {kind}, {slots} slots, {where}", point)
        del point
    del filled, measure  # the next cache needs the room
    session.release()


def operators(
    session: Session,
    plan: Plan,
    model: Zaya,
    identity: Identity,
    kernels: KernelConfig,
    kind: ForwardKind,
    batch: int,
    slots: int,
    filled: Prefilled,
) -> None:
    """A record of each operator where it stands in such a forward."""
    with using(model, kernels):
        found = measure_operators(
            model,
            identity,
            kind=kind,
            batch=batch,
            slots=slots,
            context=plan.context,
            repeats=plan.repeats,
            prefilled=filled,
        )
    for record in found:
        append_jsonl(session.out / "operators.jsonl", record)
    spent = ", ".join(f"{record.operator} {record.median_seconds * 1e6:.0f}" for record in found)
    session.say(f"  {kind}, batch {batch}, us of all layers: {spent}")


def beside(session: Session, plan: Plan, model: Zaya, identity: Identity, fast: KernelConfig) -> None:
    """Seconds per token of batch-1 decoding: the default engine, the eager one and `transformers` in turn."""
    prompt, tokens = token_rows(model, 1, plan.context)[0], plan.new_tokens[2]

    def ours(kernels: KernelConfig) -> tuple[float, list[int]]:
        sample = sample_generation(model, [prompt], DecodingConfig(), kernels=kernels, max_new_tokens=tokens)
        return sample.seconds / sample.tokens, list(sample.outputs[0])

    runs: dict[str, Callable[[], tuple[float, list[int]]]] = {fast.engine: partial(ours, fast)}
    if fast.engine != "eager":
        runs["eager"] = partial(ours, KernelConfig())
    reference = session.attempt("transformers", lambda: tried_transformers(model, prompt))
    if reference is not None:
        runs["transformers"] = partial(decode_by_transformers, reference, prompt, tokens)
    found = interleave(runs, plan.rounds)
    seconds = {name: [s for s, _ in samples] for name, samples in found.items()}
    written = {name: samples[0][1] for name, samples in found.items()}
    first = written[fast.engine]
    session.write(
        "beside",
        model=plan.name,
        dtype=plan.dtype,
        simulated=RANDOM,
        batch=1,
        context=plan.context,
        tokens=tokens,
        seconds_per_token=seconds,
        speedup={n: paired_ratio(s, seconds[fast.engine]) for n, s in seconds.items() if n != fast.engine},
        # Rounding decides between near logits of random weights, and what follows then differs.
        equal_leading_tokens={n: _equal(first, tokens) for n, tokens in written.items() if n != fast.engine},
        device=identity.device,
        commit=identity.commit,
        command=identity.command,
    )
    for name, values in seconds.items():
        session.say(f"  {1 / sorted(values)[len(values) // 2]:10.1f} tokens/s  {name}")


def _equal(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def load_transformers(model: Zaya) -> Any:
    """The same weights in `transformers`, copied on the device. UserError where the library has no ZAYA."""
    try:
        from transformers import ZayaConfig, ZayaForCausalLM
    except ImportError as error:
        raise UserError(f"transformers with ZAYA is not installed: {error}") from error
    weight, default = model.model.embed_tokens.weight, torch.get_default_dtype()
    try:
        torch.set_default_dtype(weight.dtype)  # as from_pretrained does: what must be in float32 says so itself
        with torch.device(weight.device):
            reference = ZayaForCausalLM(ZayaConfig(**plain(model.config))).eval()
    finally:
        torch.set_default_dtype(default)
    reference.load_state_dict(model.state_dict())
    return reference


def tried_transformers(model: Zaya, prompt: list[int]) -> Any:
    """`load_transformers` that has decoded once. UserError where it fails: our own times are wanted all the same."""
    reference = load_transformers(model)
    try:
        decode_by_transformers(reference, prompt, 2)
    except Exception as error:  # whatever another library raises
        raise UserError(f"transformers cannot decode here: {type(error).__name__}: {error}") from error
    return reference


@torch.inference_mode()
def decode_by_transformers(reference: Any, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    """Seconds per token, without the prefill, and the tokens: a long greedy generation less one of a single token."""
    ids = torch.tensor([prompt], device=reference.device)
    mask, seconds, found = torch.ones_like(ids), [], ids
    for new_tokens in (1, tokens):
        wait(ids.device)
        began = time.perf_counter()
        found = reference.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
        wait(ids.device)
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / (tokens - 1), found[0, len(prompt) :].tolist()


def full_logits(session: Session, plan: Plan, model: Zaya, engine: Engine) -> None:
    """How far the engine's logits are from eager's, and both from those of the same weights in float32."""
    exact = empty_model(model.config, device=session.device)
    exact.load_state_dict(model.state_dict())
    exact.freeze()
    width = plan.drafts + 1
    text = torch.tensor(token_rows(model, 1, 32 + 2 * width), device=session.device)
    for slots in (1, width):
        found = compare_logits(model, exact, engine, text, 32, slots)
        facts = {name: None if value != value else value for name, value in asdict(found).items()}
        allowed = 1e-5 if plan.dtype == "float32" else 1.5 * found.eager_error_to_float32
        # NaN, when no position takes the same experts in all layers, which random weights can do: nothing is compared.
        passed = not found.error_to_float32 > allowed
        session.check(f"{plan.name}: logits of {slots} slots as good as eager's", passed, **facts)
