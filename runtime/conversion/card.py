"""The model card of a trained checkpoint, written from its evaluation and its loss curve."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hardware.files import UserError
from runtime.config import ModelConfig
from runtime.conversion.comparison import BASELINE, SPARSE, Comparison
from runtime.conversion.evaluate import Evaluation
from runtime.conversion.families import LOSSLESS, RUNS, SOURCE, SOURCE_BYTES
from runtime.conversion.recipe import Recipe
from runtime.conversion.tables import aup_table, curve_table, family_tables, interval, sampler_tables
from runtime.conversion.tasks import FAMILIES
from runtime.measurement import interval_name


def card(
    evaluation: Evaluation, config: ModelConfig, recipe: Recipe, losses: Sequence[Mapping[str, Any]], parameters: int
) -> str:
    """The checkpoint's README. losses: the entries of the run's losses.json."""
    lossless, mixed = evaluation.verifiable[LOSSLESS], [key for key in RUNS if key.startswith("w=")]
    best = max(mixed, key=lambda key: evaluation.verifiable[key].value)
    count = lossless.count
    source = evaluation.families[SOURCE].runs
    return f"""# {evaluation.model}

A model of the ZAYA architecture small enough to ship: {parameters / 1e6:.2f} M parameters, \
{config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_experts} experts and a skip expert \
(top-1), CCA attention with {config.num_attention_heads} query and {config.num_key_value_heads} KV heads, a context of \
{config.max_position_embeddings}. Its vocabulary is the 256 bytes and a few specials. It was pretrained \
autoregressively and then converted to block diffusion with the TiDAR recipe; it exists to give *real* acceptance \
rates to a runtime and to a performance model, and is no assistant.

* Recipe: `{recipe.name}` (`runtime/conversion/recipes/{recipe.name}.yaml`), seed {recipe.seed}; repeat it with \
`ridgepoint convert --recipe {recipe.name} --out DIR`.
* Data: generated, verifiable tasks (`runtime/conversion/tasks.py`; one prompt in ten is held out by its hash) and the \
Python {evaluation.python} standard library's source (one file in twenty is held out by its name).
* Evaluated: {evaluation.date}, commit `{evaluation.commit[:12]}`, model hash `{evaluation.model_hash}`, seed \
{evaluation.seed}, on {evaluation.device["device"]} with the engine {evaluation.engine}, by `{evaluation.command}`.

## Training

{curve_table(losses)}

Mean losses in nats per byte over the steps that were logged together; all points are in `losses.json`.

## Samplers

{_samplers(evaluation.samplers)}

## Acceptance by draft length and task family

Acceptance length is tokens committed per draft-and-verify step (the verifier's own token included), greedy unless T \
is given, over {count} held-out problems in all ({count // len(FAMILIES)} per family) and as many source excerpts per \
family. Intervals are 95%, over problems. "anchor" takes the first draft from the anchor's own row.

{family_tables(evaluation)}

Losses are nats per byte of the held-out solution (for source text: of the {SOURCE_BYTES} bytes that follow \
{SOURCE_BYTES}), under the causal half. Lossless greedy decoding equalled autoregressive decoding token for token in \
{_equal(evaluation):.1%} of the outputs. Share of tokens that are not the model's own greedy choice after the same \
prefix, over the task families: {_differing(evaluation)}.

Goals on the tasks: acceptance length >= 4.6 lossless (reached: {lossless.value:.2f}) and >= 7.7 at some w < 1 \
(reached: {evaluation.verifiable[best].value:.2f} at {best}, with {evaluation.correct[best].value:.0%} right answers \
against {evaluation.correct[LOSSLESS].value:.0%} lossless).

## Limits

* The tasks are templates: worked solutions repeat their state line by line, so drafts of many bytes can be right; \
source text reaches only {source[LOSSLESS].acceptance_length.value:.2f} at K = 16.
* A small model under greedy decoding may loop on source text, and a loop is easy to draft: the sampled figures show \
how much of the length is left without it.
* One seed, one run; the intervals are over problems (speeds: over rounds) and say nothing about other seeds.
"""


def read_losses(path: Path) -> list[dict[str, Any]]:
    """The loss curve a training run wrote. Raises UserError for what is no list."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must hold a list of logged steps")
    return entries


def _samplers(found: Comparison) -> str:
    """The samplers' tables and how to read them."""
    levels = (
        f" {SPARSE} drafts ahead for the levels {found.rows[SPARSE].decoding.levels}, the best four for what \
two_forward accepts on other problems."
        if SPARSE in found.rows
        else ""
    )
    reference = found.reference_repetition
    worked = f"; the worked solutions have {interval(reference, '.1%')}" if reference is not None else ""
    dials = (
        f"""

AUP, accuracy under parallelism (d3LLM, arXiv 2601.07568), of what one dial turns, {BASELINE} being its first point: \
the area under pass@1 in percent over speed, accuracies below the best one weighted down and those 5 points below the \
first left out. Its intervals are of the accuracies.

{aup_table(found)}"""
        if found.curves
        else ""
    )
    return f"""Every setting on the same {found.problems * len(FAMILIES)} held-out problems, K = 16: {found.samples} \
samples of each at T = {found.temperature} with the same seeds, and one greedy answer. Speeds are of one sequence at a \
time at that temperature, medians of {found.rounds} interleaved rounds; tokens per forward is of the same runs. w is \
the share of autoregressive logits, S the most forwards per block, t the confidence that decides a position \
earlier.{levels} Intervals are 95%; those of the speeds are the {interval_name(found.rounds)} over rounds.

{sampler_tables(found)}

The last column of the first table counts the samples that only one of the two got right, with the p of the exact \
McNemar test (of one comparison, not adjusted for their number). The second table is of the first sample of each \
problem, per token. TV and KL are between what a token was drawn from and the autoregressive distribution at its \
position, both at T = {found.temperature}; likelihood (NLL) and entropy are at temperature 1. A lower NLL without more \
repetition is sharper sampling, and with it a loop{worked}.{dials}"""


def _differing(evaluation: Evaluation) -> str:
    shown = [LOSSLESS, *(key for key in RUNS if "K=" not in key and key != BASELINE)]
    shares = {
        key: sum(family.runs[key].disagreement for name, family in evaluation.families.items() if name != SOURCE)
        for key in shown
    }
    named = {key: "w = 1" if key == LOSSLESS else key.replace("=", " = ") for key in shown}
    return ", ".join(f"{shares[key] / len(FAMILIES):.1%} at {named[key]}" for key in shown)


def _equal(evaluation: Evaluation) -> float:
    runs = [family.runs[LOSSLESS] for family in evaluation.families.values()]
    return sum(run.equal_to_autoregressive for run in runs) / len(runs)
