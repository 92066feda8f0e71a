"""The evaluation's Markdown tables, for the card and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.conversion.comparison import BASELINE, SAMPLED, Comparison, Row
from runtime.conversion.evaluate import Evaluation
from runtime.conversion.families import LOSSLESS, RUNS, Family, Run
from runtime.statistics import Estimate, Paired


def tables(evaluation: Evaluation) -> str:
    """All tables, the samplers' first."""
    parts = [sampler_tables(evaluation.samplers), aup_table(evaluation.samplers), family_tables(evaluation)]
    return "\n\n".join(part for part in parts if part)


def sampler_tables(found: Comparison) -> str:
    """Speed and right answers of every setting, then what its outputs are like."""
    speed = [
        [
            label,
            interval(row.tokens_per_forward),
            "" if row.decoding.sampler == BASELINE else interval(row.acceptance_length),
            interval(row.tokens_per_second, ".0f"),
            "" if row.speedup is None else interval(row.speedup),
            *(interval(value, ".1%") for value in row.pass_at.values()),
            interval(row.greedy, ".1%"),
            _pairs(row.sampled_pairs),
        ]
        for label, row in found.rows.items()
    ]
    ks = next(iter(found.rows.values())).pass_at
    heads = ["setting", "tokens per forward", "acceptance length", "tokens/s", "speedup"]
    heads += [*(f"pass@{k}" for k in ks), "right, greedy", "only AR / only this right"]
    like = [[label, *_likeness(row)] for label, row in found.rows.items()]
    columns = [
        "setting",
        "TV to AR",
        "KL to AR",
        "not AR's argmax",
        "NLL under AR",
        "entropy of AR",
        "repeated 8-grams",
    ]
    lines = [*markdown(heads, speed), "", *markdown(columns, like)]
    return "\n".join([*lines, "", lossless_line(found)])


def lossless_line(found: Comparison) -> str:
    """The statement that lossless settings keep the baseline's pass@k, as it was found."""
    if not found.lossless:
        return "No lossless setting was compared with the baseline."
    outside = [f"{c.setting} (pass@{c.k})" for c in found.lossless if not c.inside]
    inside = len(found.lossless) - len(outside)
    told = f"; outside: {', '.join(outside)}" if outside else ""
    return f"Lossless pass@k inside {BASELINE}'s interval: {inside} of {len(found.lossless)}{told}."


def aup_table(found: Comparison) -> str:
    """Accuracy under parallelism of each dial; empty without one."""
    rows = [
        [name, interval(c.by_tokens_per_forward, ".0f"), interval(c.by_tokens_per_second, ".0f")]
        for name, c in found.curves.items()
    ]
    return "\n".join(markdown(["dial", "AUP by tokens per forward", "AUP by tokens/s"], rows)) if rows else ""


def family_tables(evaluation: Evaluation) -> str:
    """Greedy acceptance by draft length and mixing, then losses and right answers, by task family."""
    blocks = [key for key in RUNS if key.startswith("K=")]
    mixed = [key for key in RUNS if key.startswith("w=")]
    shown = [*blocks, *mixed, f"T={SAMPLED}"]
    lines = markdown(
        ["family", *(k if k in blocks else f"K=16, {k}" for k in shown)],
        [
            *([name, *(_length(family.runs[k]) for k in shown)] for name, family in evaluation.families.items()),
            ["**tasks together**", *(_bold(evaluation.verifiable[k]) for k in shown)],
        ],
    )
    answers = [BASELINE, LOSSLESS, *mixed, f"T={SAMPLED}"]
    rows = [_losses(name, family, answers) for name, family in evaluation.families.items()]
    rows.append(["**tasks together**", "", "", *(interval(evaluation.correct[k], ".0%") for k in answers)])
    heads = ["family", "loss before", "loss after", *(_answer_head(k) for k in answers)]
    return "\n".join([*lines, "", *markdown(heads, rows)])


def curve_table(losses: Sequence[Mapping[str, Any]]) -> str:
    """A few points of every stage's loss curve."""
    rows = []
    for stage in dict.fromkeys(str(entry["stage"]) for entry in losses):
        entries = [e for e in losses if e["stage"] == stage]
        last = len(entries) - 1
        for index in sorted({round(share * last) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)}):
            entry = entries[index]
            mask = f"{entry['mask']:.3f}" if "mask" in entry else ""
            rows.append([stage, str(entry["step"]), f"{entry['next_token']:.3f}", mask])
    return "\n".join(markdown(["stage", "step", "next-token loss", "mask loss"], rows))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; columns but the first are aligned right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def interval(found: Estimate, form: str = ".2f") -> str:
    """A value with its interval behind it."""
    return f"{found.value:{form}} ({found.low:{form}}-{found.high:{form}})"


def _likeness(row: Row) -> list[str]:
    found = row.likeness
    distances = (found.total_variation, found.kl_divergence, found.disagreement)
    nats = (found.negative_log_likelihood, found.entropy)
    repeated = "" if found.repetition is None else interval(found.repetition, ".1%")
    return [
        *("" if d is None else interval(d, ".4f") for d in distances),
        *(interval(n, ".3f") for n in nats),
        repeated,
    ]


def _pairs(found: Paired | None) -> str:
    return "" if found is None else f"{found.only_first} / {found.only_second}, p = {found.p_value:.2g}"


def _losses(name: str, family: Family, answers: Sequence[str]) -> list[str]:
    before = "" if family.loss_before is None else f"{family.loss_before:.3f}"
    found = [family.runs[k].exact_match for k in answers]
    return [name, before, f"{family.loss_after:.3f}", *("" if e is None else interval(e, ".0%") for e in found)]


def _length(run: Run) -> str:
    return f"{run.acceptance_length.value:.2f}"


def _bold(found: Estimate) -> str:
    return f"**{found.value:.2f}** ({found.low:.2f}-{found.high:.2f})"


def _answer_head(label: str) -> str:
    return "right, AR" if label == BASELINE else "right, lossless" if label == LOSSLESS else f"right, {label}"
