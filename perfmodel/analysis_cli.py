"""`ridgepoint explain` and `breakeven`. Torch-free; tables and NumPy are imported when used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hardware.files import plain
from hardware.profile import load_profile
from perfmodel import cli_options as options
from perfmodel.terminal import Json, ms, print_json, print_table
from runtime.config import DecodingConfig, require

if TYPE_CHECKING:
    from perfmodel.breakeven import Paying, SamplerMap
    from perfmodel.contenders import Contender
    from perfmodel.explain import Explanation


def register(app: typer.Typer) -> None:
    """Add the commands to the root command."""
    app.command()(explain)
    app.command()(breakeven)


def explain(
    model: options.Model,
    hardware: options.Hardware,
    batch: options.Batch = 1,
    context: options.Context = 2048,
    sampler: options.Sampler = "autoregressive",
    draft_tokens: options.DraftTokens = 16,
    acceptance_length: options.Length = None,
    acceptance_rate: options.Rate = None,
    acceptance_histogram: options.Histogram = None,
    known_acceptance: options.KnownAcceptance = None,
    levels: options.Levels = None,
    steps: options.Steps = None,
    threshold: options.Threshold = None,
    steps_per_block: options.Fillings = None,
    verify: options.Verify = False,
    temperature: options.Temperature = 0.0,
    dtype: options.DType = None,
    weights: options.Weights = None,
    expert_weights: options.ExpertWeights = None,
    activations: options.Activations = None,
    cache_dtype: options.CacheDType = None,
    tensor_parallel: options.TensorParallel = 1,
    expert_parallel: options.ExpertParallel = 1,
    expert_coverage: options.Coverage = None,
    engine: options.Engine = None,
    as_json: Json = False,
) -> None:
    """Say which operator of a step waits for what, and what would change tokens per second most."""
    from perfmodel.explain import explain as run

    decoding = options.decoding_of(
        sampler, draft_tokens, None if levels is None else [levels], steps, threshold, steps_per_block, verify,
        temperature=temperature,
    )  # fmt: skip
    acceptance = options.acceptance_of(acceptance_length, acceptance_rate, acceptance_histogram, known_acceptance)
    device = load_profile(hardware)
    precision = options.precision_of(model, dtype, device, weights, expert_weights, activations, cache_dtype)
    at = options.setting_of(model, device, precision, expert_coverage, engine, tensor_parallel, expert_parallel)
    found = run(at, decoding, acceptance, batch=batch, context=context, fillings=steps_per_block)
    header = {"model": at.spec.name, "hardware": at.device.hardware.name, "engine": at.engine.name, "batch": batch,
              "context": context, "decoding": plain(decoding), "precision": str(at.precision),
              "parallel": plain(at.parallel), "expert_coverage": str(at.coverage)}  # fmt: skip
    if as_json:
        return print_json(header | plain(found))
    _print_explanation(
        f"{at.spec.name} ({at.precision}) on {at.device.hardware.name}, engine {at.engine.name}, {_short(decoding)}, "
        f"batch {batch}, context {context}",
        found,
    )


def breakeven(
    model: options.Model,
    hardware: options.Devices,
    batch: options.Batches = "1,2,4,8,16,32,64,128,256,512",
    context: options.Contexts = "1024,4096,16384,65536",
    draft_tokens: Annotated[
        str | None,
        typer.Option(
            help="Drafts per step, K: numbers with commas (default: those of --acceptance; of a length 16, else 4,8,16)"
        ),
    ] = None,
    sampler: options.Samplers = "two_forward,single_forward",
    acceptance_length: options.Length = None,
    acceptance_rate: options.Rate = None,
    acceptance_histogram: options.Histogram = None,
    known_acceptance: options.KnownAcceptance = None,
    levels: options.LevelSets = None,
    steps: options.Steps = None,
    threshold: options.Threshold = None,
    steps_per_block: options.Fillings = None,
    verify: options.Verify = False,
    dtype: options.DType = None,
    weights: options.Weights = None,
    expert_weights: options.ExpertWeights = None,
    activations: options.Activations = None,
    cache_dtype: options.CacheDType = None,
    tensor_parallel: options.TensorParallel = 1,
    expert_parallel: options.ExpertParallel = 1,
    expert_coverage: options.Coverage = None,
    engine: options.Engine = None,
    headlines: Annotated[
        str, typer.Option(help="Tokens per step claimed as speedups: numbers with commas.")
    ] = "4.6,7.7",
    as_json: Json = False,
) -> None:
    """Map where each sampler pays: its best K or levels by batch and context, and where it stops paying."""
    from perfmodel.acceptance import judged
    from perfmodel.breakeven import break_even
    from perfmodel.contenders import DRAFT_TOKENS, contenders

    batches, contexts = (options.numbers(name, text, int) for name, text in (("batch", batch), ("context", context)))
    drafts = None if draft_tokens is None else options.numbers("draft-tokens", draft_tokens, int)
    samplers = options.names("sampler", sampler)
    require("autoregressive" not in samplers, "autoregressive decoding is what a break-even map compares with")
    acceptance = options.acceptance_of(acceptance_length, acceptance_rate, acceptance_histogram, known_acceptance)
    most = max(drafts or DRAFT_TOKENS)
    chosen = options.decodings_of(samplers, most, levels, steps, threshold, steps_per_block, verify)
    length_of = [decoding.sampler for decoding in chosen if judged(decoding)]
    require(
        acceptance_length is None or len(length_of) <= 1,
        f"an acceptance length is that of one setting, but --sampler has {' and '.join(length_of)}: choose one, or "
        "give rates or a histogram",
    )
    sets = [options.levels_of(text) for text in levels] if levels else None
    tried = [contenders(decoding, acceptance, drafts, sets) for decoding in chosen]
    claimed = options.numbers("headlines", headlines, float)
    documents: list[dict[str, Any]] = []
    for name in options.names("hardware", hardware):
        device = load_profile(name)
        precision = options.precision_of(model, dtype, device, weights, expert_weights, activations, cache_dtype)
        at = options.setting_of(model, device, precision, expert_coverage, engine, tensor_parallel, expert_parallel)
        for settings in tried:
            own = steps_per_block if settings[0].decoding.sampler == "denoising" else None
            found = break_even(at, settings, batches, contexts, fillings=own, headlines=claimed)
            where = f"{at.spec.name} ({at.precision}) on {at.device.hardware.name}, engine {at.engine.name}"
            if as_json:
                header = {"hardware": at.device.hardware.name, "engine": at.engine.name,
                          "precision": str(at.precision), "parallel": plain(at.parallel),
                          "expert_coverage": str(at.coverage)}  # fmt: skip
                documents.append(header | _document(found))
            else:
                _print_map(where, found)
    if as_json:
        print_json({"model": model, "maps": documents})


def _short(decoding: DecodingConfig) -> str:
    """K and levels in a few characters."""
    if not decoding.drafts:
        return decoding.sampler
    levels = "" if decoding.proposal_levels is None else f" levels {','.join(map(str, decoding.proposal_levels))}"
    return f"{decoding.sampler} K {decoding.draft_tokens}{levels}"


def _cell(contender: Contender) -> str:
    d = contender.decoding
    return f"K{d.draft_tokens}" + (f" P{len(d.levels)}" if d.sampler == "single_forward" else "")


def _stretch(p: Paying) -> str:
    at = f"{p.first}" if p.first == p.last else f"{p.first} to {p.last}"
    return at + (" (what fits)" if p.ends_by == "memory" else " (and perhaps beyond)" if p.ends_by == "axis" else "")


def _print_map(where: str, m: SamplerMap) -> None:
    def text(i: int, j: int) -> str:
        return f"{m.speedup[i, j]:.2f}x {_cell(m.contenders[m.best[i, j]])}" if m.fits[i, j] else "does not fit"

    print_table(
        f"{where}: {m.sampler}, speedup over autoregressive decoding with the best of {len(m.contenders)} settings",
        ("batch", *(f"context {c}" for c in m.context)),
        [(str(b), *(text(i, j) for j in range(len(m.context)))) for i, b in enumerate(m.batch)],
    )
    if not m.fits.any():
        print("nothing fits the memory: no batch at any context\n")
        return
    for c, stretches in zip(m.context, m.by_batch, strict=True):
        print(f"context {c}: pays at batch {', '.join(map(_stretch, stretches)) or '(none)'}")
    for b, stretches in zip(m.batch, m.by_context, strict=True):
        print(f"batch {b}: pays at context {', '.join(map(_stretch, stretches)) or '(none)'}")
    used = sorted({int(i) for i in m.best[m.fits]})
    for i in used:
        print(f"{_cell(m.contenders[i])}: {_short(m.contenders[i].decoding)}, "
              f"{m.contenders[i].acceptance_length:.2f} tokens a step")  # fmt: skip
    for h in m.headlines:
        most = _most(h.remaining)
        if most is None:
            print(f"headline {h.tokens_per_step:g}x: no setting commits so many tokens a step")
            continue
        i, j = most
        print(
            f"headline {h.tokens_per_step:g}x ({h.tokens_per_step:g} tokens a step): holds in {int(h.holds.sum())} of "
            f"{int(m.fits.sum())} cells; at most {h.remaining[i, j]:.2f}x remains, at batch {m.batch[i]}, context "
            f"{m.context[j]}; with the acceptance given it is reached in {int(h.reached.sum())}"
        )
    print()


def _most(values: Any) -> tuple[int, int] | None:
    import numpy as np

    if np.isnan(values).all():
        return None
    i, j = np.unravel_index(int(np.nanargmax(values)), values.shape)
    return int(i), int(j)


def _document(m: SamplerMap) -> dict[str, Any]:
    import numpy as np

    def grid(values: Any) -> Any:
        """Nested lists [batch][context], None for NaN."""
        return [[None if v != v else v for v in row] for row in values.tolist()]

    return {
        "sampler": m.sampler,
        "batch": list(m.batch),
        "context": list(m.context),
        "settings": [
            {
                "draft_tokens": c.decoding.draft_tokens,
                "levels": list(c.decoding.levels) if c.decoding.sampler == "single_forward" else None,
                "acceptance_length": c.acceptance_length,
            }
            for c in m.contenders
        ],
        "best": np.where(m.fits, m.best.astype(object), np.array(None)).tolist(),  # the index of a setting
        "speedup": grid(m.speedup),
        "break_even_tokens_per_step": grid(m.step_cost),
        "pays_at_batch": [{"context": c, "stretches": plain(s)} for c, s in zip(m.context, m.by_batch, strict=True)],
        "pays_at_context": [{"batch": b, "stretches": plain(s)} for b, s in zip(m.batch, m.by_context, strict=True)],
        "headlines": [
            {
                "tokens_per_step": h.tokens_per_step,
                "remaining": grid(h.remaining),
                "holds": h.holds.tolist(),
                "reached": h.reached.tolist(),
            }
            for h in m.headlines
        ],
    }  # fmt: skip


def _print_explanation(where: str, e: Explanation) -> None:
    print_table(
        f"{where}: {ms(e.step_seconds)} ms a step, mostly {e.bound}",
        ("operator", "ms", "of the step", "waits for", "memory", "compute", "overhead"),
        [
            (o.name, ms(o.seconds), f"{o.share:.1%}", o.bound, *(f"{share:.0%}" for share in o.waits.values()))
            for o in e.operators
        ],
    )
    waits = ", ".join(f"{b} {s:.0%}" for b, s in e.waits.items())
    print(
        f"{e.tokens_per_second:.0f} tokens/s, {e.speedup_over_autoregressive:.2f}x over autoregressive decoding "
        f"({e.acceptance_length:.2f} tokens a step); of the step {waits}"
    )
    print_table(
        "what one per cent more of it does, in per cent",
        ("of", "tokens/s", "speedup"),
        [(s.name, f"{s.elasticity:+.2f}", f"{s.speedup_elasticity:+.2f}") for s in e.sensitivities],
    )
    print_table(
        "what a whole change does",
        ("change", "tokens/s", "speedup"),
        [(c.name, f"x {c.tokens_per_second_ratio:.2f}", f"x {c.speedup_ratio:.2f}") for c in e.changes],
    )
    for name, why in e.refused.items():
        print(f"not possible: {name} ({why})")
