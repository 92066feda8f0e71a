"""Drafts per batch size for vLLM: `num_speculative_tokens_per_batch_size` of `--speculative-config`.

vLLM's documentation (docs/features/speculative_decoding/dynamic_speculative_decoding.md): entries [first batch, last
batch, K], the first from 1, not overlapping, K at most `num_speculative_tokens`, 0 for no drafts; batches beyond the
last entry keep its K. Tested there with eagle, eagle3 and dflash; piecewise graphs only on the first model runner; not
with data parallelism. Released vLLM has the key and not the method tidar, the publisher's fork (v0.16) has the method
and not the key: a vLLM with both is needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autotune.export import tidar_vllm
from autotune.export.evidence import provenance, write_files
from autotune.export.policy import Chosen, Policy, Target, refusal, refuse_cpu
from hardware.files import UserError

NAME = "vllm-schedule"


def write(policy: Policy, out: Path) -> list[Path]:
    """Write speculative-config.json, environment, sampling.json and their provenance."""
    chosen = policy.chosen()
    for each in chosen:
        _check(each)
    contexts = list(dict.fromkeys(c.context for c in chosen))
    if len(contexts) > 1:
        why = (
            f"entries go by batch alone, and there are contexts {', '.join(map(str, contexts))}: choose with --context"
        )
        raise refusal(NAME, chosen[0], "context", chosen[0].context, why)
    temperature = _common(chosen, "temperature")
    drafting = [c for c in chosen if c.decoding.drafts]
    files = {"sampling.json": json.dumps({"temperature": temperature}, indent=2) + "\n"}
    if drafting:
        _common(drafting, "draft_temperature")
        config = speculative_config(chosen, drafting[0])
        files["speculative-config.json"] = json.dumps(config, indent=2) + "\n"
        files["environment"] = tidar_vllm.environment_file(drafting[0])
        says = [
            "needs a vLLM with the method tidar (the publisher's fork) and num_speculative_tokens_per_batch_size (a "
            "release): none has both yet",
            "set -a; . ./environment; set +a",
            f'vllm serve MODEL {tidar_vllm.SAMPLING} --speculative-config "$(cat speculative-config.json)"',
        ]
    else:
        says = [
            f"{'; '.join(dict.fromkeys(c.why_single for c in chosen))}: there is nothing to set",
            f"vllm serve MODEL {tidar_vllm.SAMPLING}    # without --speculative-config",
        ]
    files[f"{NAME}.provenance.yaml"] = provenance(NAME, policy, says=says, settings=chosen)
    return write_files(out, files, absent=("speculative-config.json", "environment"))


def speculative_config(chosen: list[Chosen], drafting: Chosen) -> dict[str, Any]:
    """The value of --speculative-config: a range of batches per tuned one, up to it; K = 0 where drafts do not pay.

    drafting: any of those that draft, for what they have in common.
    """
    schedule, first = [], 1
    for each in chosen:
        schedule.append([first, each.batch, each.decoding.draft_tokens if each.decoding.drafts else 0])
        first = each.batch + 1
    return tidar_vllm.speculative_config(drafting) | {
        "num_speculative_tokens": max(k for _, _, k in schedule),
        "num_speculative_tokens_per_batch_size": schedule,
    }


def _common(chosen: list[Chosen], setting: str) -> float:
    """A setting that vLLM takes once for all batches; UserError where they differ."""
    values = {c.study.name: getattr(c.decoding, setting) for c in chosen}
    if len(set(values.values())) > 1:
        said = ", ".join(f"{value} ({name})" for name, value in values.items())
        raise UserError(f"{NAME} cannot represent {setting} by batch, but it is {said}")
    return float(next(iter(values.values())))


def _check(chosen: Chosen) -> None:
    decoding = chosen.decoding
    refuse_cpu(NAME, chosen)
    if decoding.sampler not in ("autoregressive", "two_forward"):
        why = "an entry is a number of drafts, which two_forward or autoregressive decoding take"
        raise refusal(NAME, chosen, "sampler", decoding.sampler, why)
    if decoding.anchor_draft:
        raise refusal(NAME, chosen, "anchor_draft", True, "the drafter drops the draft at the anchor's next position")
    if decoding.mixing_weight < 1:
        raise refusal(NAME, chosen, "mixing_weight", decoding.mixing_weight, "an entry has no weight")


TARGET = Target(
    name=NAME,
    engine="vLLM",
    file="a folder: speculative-config.json, environment, sampling.json, provenance",
    loads="needs a fork",
    write=write,
    does="drafts per batch size, 0 where drafts do not pay (releases read it for eagle and dflash, not for tidar)",
    out="vllm-schedule",
)
