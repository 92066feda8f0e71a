"""The model card of a trained checkpoint, written from its evaluation and its loss curve."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hardware.files import UserError
from runtime.conversion.evaluate import LOSSLESS, RUNS, SAMPLED, SOURCE, SOURCE_BYTES, Evaluation, Run
from runtime.conversion.recipe import Recipe
from runtime.conversion.tasks import FAMILIES
from runtime.statistics import Estimate


def table(evaluation: Evaluation) -> str:
    """The card's Markdown tables: acceptance by draft length and mixing, then losses and right answers."""
    blocks = [key for key in RUNS if key.startswith("K=")]
    mixed = [key for key in RUNS if key.startswith("w=")]
    shown = [*blocks, *mixed, f"T={SAMPLED}"]
    lines = _rows(
        ["family", *(k if k in blocks else f"K=16, {k}" for k in shown)],
        [
            *([name, *(_length(family.runs[k]) for k in shown)] for name, family in evaluation.families.items()),
            ["**tasks together**", *(_interval(evaluation.verifiable[k]) for k in shown)],
        ],
    )
    answers = ["autoregressive", LOSSLESS, *mixed, f"T={SAMPLED}"]
    rows = []
    for name, family in evaluation.families.items():
        before = "" if family.loss_before is None else f"{family.loss_before:.3f}"
        found = [family.runs[k].exact_match for k in answers]
        rows.append([name, before, f"{family.loss_after:.3f}", *("" if e is None else _percent(e) for e in found)])
    rows.append(["**tasks together**", "", "", *(_percent(evaluation.correct[k]) for k in answers)])
    heads = ["family", "loss before", "loss after", *(_answer_head(k) for k in answers)]
    return "\n".join([*lines, "", *_rows(heads, rows)])


def card(evaluation: Evaluation, recipe: Recipe, losses: Sequence[Mapping[str, Any]], parameters: int) -> str:
    """The checkpoint's README. losses: the entries of the run's losses.json."""
    model, lossless = recipe.model, evaluation.verifiable[LOSSLESS]
    mixed = {k: v for k, v in evaluation.verifiable.items() if k.startswith("w=")}
    best = max(mixed, key=lambda k: mixed[k].value)
    count = lossless.count
    source = evaluation.families[SOURCE].runs
    return f"""# {evaluation.model}

A model of the ZAYA architecture small enough to ship: {parameters / 1e6:.2f} M parameters, {model.num_hidden_layers} \
layers of width {model.hidden_size}, {model.num_experts} experts and a skip expert (top-1), CCA attention with \
{model.num_attention_heads} query and {model.num_key_value_heads} KV heads. Its vocabulary is the 256 bytes and a few \
specials. It was pretrained autoregressively and then converted to block diffusion with the TiDAR recipe; it exists to \
give *real* acceptance rates to a runtime and to a performance model, and is no assistant.

* Recipe: `{recipe.name}` (`runtime/conversion/recipes/{recipe.name}.yaml`), seed {recipe.seed}; repeat it with \
`ridgepoint convert --recipe {recipe.name} --out DIR`.
* Data: generated, verifiable tasks (`runtime/conversion/tasks.py`; one prompt in ten is held out by its hash) and the \
Python {evaluation.python} standard library's source (one file in twenty is held out by its name).
* Evaluated: {evaluation.date}, commit `{evaluation.commit[:12]}`, model hash `{evaluation.model_hash}`, seed \
{evaluation.seed}, by `{evaluation.command}`.

## Training

{chr(10).join(_curve(losses))}

Mean losses in nats per byte over the ten steps that end there; all points are in `losses.json`.

## What it does

Acceptance length is tokens committed per draft-and-verify step (the verifier's own token included), greedy unless T \
is given, over {count} held-out problems in all ({count // len(FAMILIES)} per family) and as many source excerpts per \
family. Intervals are 95%, over problems. "anchor" takes the first draft from the anchor's own row.

{table(evaluation)}

Losses are nats per byte of the held-out solution (for source text: of the {SOURCE_BYTES} bytes that follow \
{SOURCE_BYTES}), under the causal half. Lossless greedy decoding equalled autoregressive decoding token for token in \
{_equal(evaluation):.1%} of the outputs. Share of tokens that are not the model's own greedy choice after the same \
prefix, over the task families: {_differing(evaluation)}.

Goals on the tasks: acceptance length >= 4.6 lossless (reached: {lossless.value:.2f}) and >= 7.7 at some w < 1 \
(reached: {mixed[best].value:.2f} at {best}, with {evaluation.correct[best].value:.0%} right answers against \
{evaluation.correct[LOSSLESS].value:.0%} lossless).

## Limits

* The tasks are templates: worked solutions repeat their state line by line, so drafts of many bytes can be right; \
source text reaches only {_length(source[LOSSLESS])} at K = 16.
* A small model under greedy decoding may loop on source text, and a loop is easy to draft: the sampled column \
(T = {SAMPLED}) shows how much of the length is left without it.
* One seed, one run; the intervals are over problems and say nothing about other seeds.
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


def _curve(losses: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for stage in dict.fromkeys(str(entry["stage"]) for entry in losses):
        entries = [e for e in losses if e["stage"] == stage]
        last = len(entries) - 1
        for index in sorted({round(share * last) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)}):
            entry = entries[index]
            mask = f"{entry['mask']:.3f}" if "mask" in entry else ""
            rows.append([stage, str(entry["step"]), f"{entry['next_token']:.3f}", mask])
    return _rows(["stage", "step", "next-token loss", "mask loss"], rows)


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _length(run: Run) -> str:
    return f"{run.acceptance_length.value:.2f}"


def _interval(found: Estimate) -> str:
    return f"**{found.value:.2f}** ({found.low:.2f}-{found.high:.2f})"


def _percent(found: Estimate) -> str:
    return f"{found.value:.0%} ({found.low:.0%}-{found.high:.0%})"


def _answer_head(label: str) -> str:
    return "right, AR" if label == "autoregressive" else "right, lossless" if label == LOSSLESS else f"right, {label}"


def _differing(evaluation: Evaluation) -> str:
    shown = [LOSSLESS, *(key for key in RUNS if key.startswith("w=")), f"T={SAMPLED}"]
    shares = {
        key: sum(family.runs[key].disagreement for name, family in evaluation.families.items() if name != SOURCE)
        for key in shown
    }
    named = {key: "w = 1" if key == LOSSLESS else key.replace("=", " = ") for key in shown}
    return ", ".join(f"{shares[key] / len(FAMILIES):.1%} at {named[key]}" for key in shown)


def _equal(evaluation: Evaluation) -> float:
    runs = [family.runs[LOSSLESS] for family in evaluation.families.values()]
    return sum(run.equal_to_autoregressive for run in runs) / len(runs)
