"""Everything to learn on a machine with a GPU, in one go: probe, correctness, full-size step times, real generations.

python -m benchmarks.gpu --out DIR [--device cuda] [--small]      (or benchmarks/gpu.sh, which picks the device)

It needs torch, numpy, pyyaml and safetensors only. Each record is written as soon as it exists; a point that does not
fit in memory, or that this torch cannot run, is skipped and its reason kept. Full-size weights are random: routing and
acceptance are then not real, and the records say so.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import command, fail_in_one_line
from hardware.files import UserError, write_atomic
from hardware.probe import probe
from hardware.profile import save_profile
from perfmodel.steps import title
from runtime.bench import Identity, Prefilled, identify, measure_forward, prefill
from runtime.bench_generation import measure_generation, task_prompts
from runtime.checkpoint import bundled, empty_model, load_model, random_model
from runtime.config import DecodingConfig, ExpertMode, KernelConfig, ModelConfig
from runtime.engine import generate
from runtime.measurement import ForwardKind, Measurement, append_jsonl, read_jsonl
from runtime.model.zaya import Zaya
from runtime.policy import apply_kernels

RANDOM = "random weights: routing and acceptance are not real"
MODES: tuple[ExpertMode, ...] = ("loop", "grouped", "gather", "dense")
GATHERED_TOKENS = 64  # beyond, copying each token's expert weights is hopeless
RELATIVE_ERROR = 1e-3  # of fp32 logits on two devices, over the largest logit
LOSSLESS = (
    DecodingConfig("two_forward", draft_tokens=4),
    DecodingConfig("two_forward", anchor_draft=True),
    DecodingConfig("single_forward", draft_tokens=4),
    DecodingConfig("single_forward", proposal_levels=(0, 4, 7, 11)),
    DecodingConfig("denoising", draft_tokens=8, denoising_steps=4, verify=True),
    DecodingConfig("denoising", denoising_steps=2, confidence_threshold=0.9, verify=True),
)
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Plan:
    """What is run: full size on a GPU, or a shrunk model on few points to test this program."""

    name: str
    model: ModelConfig
    dtype: Any
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    draft_tokens: tuple[int, ...]
    repeats: int
    generations: int
    checked_tokens: int
    generated_tokens: int


FULL = Plan(
    "zaya1-8b",
    ModelConfig(mask_token_id=262_271, eos_token_id=None),  # without an end token no random sequence stops early
    "bfloat16",
    (1, 4, 16, 64),
    (512, 2048, 8192),
    (4, 16),
    10,
    3,
    64,
    32,
)
SHRUNK = ModelConfig(
    vocab_size=264,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    moe_intermediate_size=32,
    router_hidden_size=16,
    max_position_embeddings=512,
    eos_token_id=None,
    pad_token_id=256,
    bos_token_id=257,
    mask_token_id=259,
)
SMALL = Plan("zaya-shrunk", SHRUNK, "float32", (1, 2), (16,), (4,), 2, 1, 8, 6)


@dataclass
class Session:
    """Where results go, and how much time is left."""

    device: str
    out: Path
    deadline: float
    command: str
    checks: dict[str, Any] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        print(text, file=sys.stderr, flush=True)

    def attempt(self, point: str, run: Callable[[], Any]) -> Any:
        """run(), or None where it cannot: out of memory, not supported by this torch, or out of time."""
        if time.monotonic() > self.deadline:
            self._skip(point, "out of time")
            return None
        reason = ""
        try:
            return run()
        except (RuntimeError, UserError) as error:  # torch's OutOfMemoryError is a RuntimeError
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        # Outside of the handler: the traceback, and with it the failed run's tensors, is gone.
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        self._skip(point, reason)
        return None

    def measure(self, name: str, point: str, run: Callable[[], Measurement]) -> None:
        """Append the record to NAME.jsonl, where there is one; it is on disk when this returns."""
        record = self.attempt(point, run)
        if record is not None:
            append_jsonl(self.out / f"{name}.jsonl", record)

    def _skip(self, point: str, reason: str) -> None:
        self.skipped.append({"point": point, "reason": reason})
        with (self.out / "skipped.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(self.skipped[-1]) + "\n")
        self.say(f"  skipped {point}: {reason}")


def check(session: Session, name: str, passed: bool, **facts: Any) -> None:
    """Keep the outcome of one correctness check."""
    session.checks[name] = {"passed": passed, **facts}
    write_atomic(session.out / "correctness.json", json.dumps(session.checks, indent=1) + "\n")
    session.say(f"  {'ok    ' if passed else 'FAILED'} {name} {facts}")


def correctness(session: Session, name: str, on_cpu: Zaya, plan: Plan) -> None:
    """Logits on the device equal the CPU's however the experts run, and lossless decoding is lossless."""
    on_device = empty_model(on_cpu.config, device=session.device)
    on_device.load_state_dict(on_cpu.state_dict())
    on_device.freeze()
    prompts = task_prompts(on_cpu, 7)
    ids = torch.tensor([prompts[0] * 3])
    with torch.inference_mode():
        expected = on_cpu.logits(ids)
    for mode in MODES:
        label = f"{name}: logits equal the CPU's, experts {mode}"
        session.attempt(label, partial(_check_logits, session, label, on_device, ids, expected, mode))
    apply_kernels(on_device, KernelConfig())
    for batch in (1, 7):
        for way in LOSSLESS:
            label = f"{name}: greedy {_title(way)} equals autoregressive, batch {batch}"
            session.attempt(
                label, partial(_check_lossless, session, label, on_device, prompts[:batch], way, plan.checked_tokens)
            )
            if label not in session.checks:  # a law that could not be tried has not been shown
                check(session, label, False, reason=session.skipped[-1]["reason"])


@torch.inference_mode()
def _check_logits(session: Session, label: str, model: Zaya, ids: Tensor, expected: Tensor, mode: ExpertMode) -> None:
    apply_kernels(model, KernelConfig({1_000_000: mode}))
    found = model.logits(ids.to(session.device)).cpu()
    error = float((found - expected).abs().max() / expected.abs().max())
    check(session, label, error <= RELATIVE_ERROR, relative_error=error)


def _check_lossless(
    session: Session, label: str, model: Zaya, prompts: list[list[int]], way: DecodingConfig, tokens: int
) -> None:
    plain, drafted = (generate(model, prompts, w, max_new_tokens=tokens) for w in (DecodingConfig(), way))
    check(session, label, plain.tokens == drafted.tokens, acceptance_length=drafted.acceptance_length)


def forwards(session: Session, model: Zaya, identity: Identity, plan: Plan) -> None:
    """Time every kind of forward over batch x context, for every way of running the experts."""
    points: list[tuple[ForwardKind, int, tuple[int, ...]]] = [("decode", 1, (0,))]
    for k in plan.draft_tokens:
        levels = four_levels(k)
        points += [("draft", k + 1, (0,)), ("verify", k + 1, (0,)), ("single", (k + 1) * (1 + len(levels)), levels)]
    widest = max(slots for _, slots, _ in points)
    for context, batch in itertools.product(plan.contexts, plan.batches):
        where = f"batch {batch}, context {context}"
        session.say(f"  {where}")
        filled: Prefilled | None = session.attempt(f"prefill {where}", partial(prefill, model, batch, context, widest))
        if filled is None:
            continue
        for (kind, slots, levels), mode in itertools.product(points, MODES):
            if mode == "gather" and batch * slots > GATHERED_TOKENS:
                continue
            measure = partial(
                measure_forward,
                model,
                identity,
                kind=kind,
                batch=batch,
                slots=slots,
                context=context,
                levels=levels,
                kernels=KernelConfig({1_000_000: mode}),
                repeats=plan.repeats,
                prefilled=filled,
            )
            session.measure("forwards", f"{kind}, {slots} slots, {where}, experts {mode}", measure)
        del filled, measure  # the next cache needs the room


def generations(
    session: Session, model: Zaya, identity: Identity, plan: Plan, *, tokens: int, kernels: KernelConfig
) -> None:
    """Whole generations, with the engine's and the sampler's own time in them."""
    drafts = itertools.product(plan.draft_tokens, (False, True))
    ways = [DecodingConfig(), *(DecodingConfig("two_forward", draft_tokens=k, anchor_draft=a) for k, a in drafts)]
    most = max(plan.draft_tokens)
    ways += [DecodingConfig("single_forward", most, proposal_levels=levels) for levels in (four_levels(most), None)]
    ways += [DecodingConfig("denoising", most, denoising_steps=4, verify=verified) for verified in (False, True)]
    for batch, way in itertools.product(plan.batches, ways):
        measure = partial(
            measure_generation,
            model,
            identity,
            task_prompts(model, batch),
            way,
            kernels=kernels,
            max_new_tokens=tokens,
            repeats=plan.generations,
        )
        session.measure("generations", f"{identity.model} {_title(way)}, batch {batch}", measure)


def four_levels(draft_tokens: int) -> tuple[int, ...]:
    """Four proposal levels, evenly spaced over 0 .. K."""
    return tuple(sorted({i * (draft_tokens + 1) // 4 for i in range(4)}))


def _title(way: DecodingConfig) -> str:
    return f"{title(way)} with K {way.draft_tokens}" if way.drafts else way.sampler


def fastest_modes(records: list[Measurement]) -> KernelConfig:
    """By tokens in a forward, the way of running the experts that was fastest over all points of that size."""
    times: dict[int, dict[str, list[float]]] = {}
    for record in records:
        by_mode = times.setdefault(record.workload.batch * record.slots, {})
        by_mode.setdefault(next(iter(record.kernels.experts.values())), []).append(record.median_seconds)
    best: dict[int, ExpertMode] = {}
    for tokens, by_mode in sorted(times.items()):
        most = max(map(len, by_mode.values()))  # a mode that failed at some point cannot be compared by its sum
        best[tokens] = min((m for m in by_mode if len(by_mode[m]) == most), key=lambda m: sum(by_mode[m]))  # type: ignore
    return KernelConfig(best) if best else KernelConfig()


def step_table(records: list[Measurement]) -> Iterator[str]:
    """Per batch and context the fastest forwards, as Markdown. From so many tokens a step the samplers pay:
    two_forward (a draft and a verify), and single_forward with four levels."""
    fastest: dict[tuple[int, int], dict[tuple[str | None, int], float]] = {}
    for record in records:
        cell = fastest.setdefault((record.context, record.workload.batch), {})
        key = (record.forward, record.decoding.draft_tokens + 1 if record.forward == "single" else record.slots)
        cell[key] = min(cell.get(key, float("inf")), record.median_seconds)
    yield (
        "| context | batch | K | autoregressive step | draft | verify | single | two_forward breaks even "
        "| single_forward breaks even |"
    )
    yield "| ---: " * 9 + "|"
    for (context, batch), cell in sorted(fastest.items()):
        decode = cell.get(("decode", 1))
        for slots in sorted({slots for _, slots in cell if slots > 1}):
            draft, verify, single = (cell.get((kind, slots)) for kind in ("draft", "verify", "single"))
            if decode and draft and verify:
                alone, pays = (f"{single * 1e3:.2f} ms", f"{single / decode:.2f}") if single else ("-", "-")
                yield (
                    f"| {context} | {batch} | {slots - 1} | {decode * 1e3:.2f} ms | {draft * 1e3:.2f} ms "
                    f"| {verify * 1e3:.2f} ms | {alone} | {(draft + verify) / decode:.2f} | {pays} |"
                )


def slug(name: str) -> str:
    """A device's name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(arguments: list[str] | None = None) -> int:
    """Run everything; the exit code is 1 when a correctness check failed or none ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for all results; must be empty or absent")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--small", action="store_true", help="a shrunk model on few points, to test this program")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no new point after so long")
    parser.add_argument("--measurements", type=Path, help="copy the records to a folder per device in here")
    chosen = parser.parse_args(arguments)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"no device {chosen.device}: torch sees no GPU; --small --device cpu tests this program")
    if chosen.out.is_dir() and any(chosen.out.iterdir()):
        raise UserError(f"{chosen.out} holds results already; choose another folder")
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    plan = SMALL if chosen.small else FULL
    deadline = time.monotonic() + 60 * chosen.minutes
    session = Session(chosen.device, chosen.out, deadline, command("benchmarks.gpu", arguments))

    session.say("probe")
    kind = session.device.partition(":")[0]
    profile = session.attempt("probe", lambda: probe(kind, quick=True, threads=1 if chosen.small else None))
    if profile is not None:
        save_profile(profile, session.out / "hardware.yaml")

    session.say("correctness")
    tiny = random_model(SHRUNK, seed=1).freeze()
    session.attempt("correctness", lambda: correctness(session, "zaya-shrunk", tiny, plan))
    nano = load_model("zaya-nano") if "zaya-nano" in bundled() and not chosen.small else None
    if nano is not None:
        session.attempt("correctness", lambda: correctness(session, "zaya-nano", nano, plan))

    if nano is not None:  # the one model with real acceptance; first, because it is quick
        session.say("zaya-nano generations")
        trained = load_model("zaya-nano", device=session.device)
        identity = identify(trained, "zaya-nano", session.command)
        generations(session, trained, identity, plan, tokens=150, kernels=KernelConfig())

    session.say(f"{plan.name}, {plan.dtype}, {RANDOM}")

    def build() -> Zaya:
        return random_model(plan.model, device=session.device, dtype=plan.dtype).freeze()

    model = session.attempt(f"{plan.name} weights", build)
    found: list[Measurement] = []
    if model is not None:
        identity = identify(model, plan.name, session.command, simulated=RANDOM)
        session.say("forwards")
        forwards(session, model, identity, plan)
        path = session.out / "forwards.jsonl"
        found = read_jsonl(path) if path.is_file() else []
        session.say("generations")
        generations(session, model, identity, plan, tokens=plan.generated_tokens, kernels=fastest_modes(found))

    table = list(step_table(found))
    write_atomic(session.out / "steps.md", "\n".join(table) + "\n")
    print("\n".join(table))
    failed = [name for name, outcome in session.checks.items() if not outcome["passed"]]
    print(
        f"\n{len(session.checks)} checks, {len(failed)} failed; {len(found)} forwards, {len(session.skipped)} skipped"
    )
    if chosen.measurements is not None and found:
        target = chosen.measurements / slug(found[0].device["device"])
        target.mkdir(parents=True, exist_ok=True)
        kept = ("forwards.jsonl", "generations.jsonl", "correctness.json", "steps.md", "hardware.yaml", "skipped.jsonl")
        for name in kept:
            (target / name).unlink(missing_ok=True)  # or a file of an earlier run would stand beside this one's
            if (session.out / name).is_file():
                write_atomic(target / name, (session.out / name).read_bytes())
        print(f"results: {session.out}, copied to {target}")
    return 1 if failed or not session.checks else 0


if __name__ == "__main__":
    sys.exit(fail_in_one_line(main))
