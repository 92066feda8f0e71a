"""The TiDAR method of the publisher's vLLM fork (Zyphra/vllm): its speculative config, sampling, and environment.

What the fork reads, by its sources and notes (v0.16, branch jinzhao/tidar_SF): `--speculative-config` with method
`tidar`, `num_speculative_tokens` and `tidar_diff_temperature`; `VLLM_TIDAR_TWO_FORWARD` (1: two forwards, else one) and
`VLLM_TIDAR_PROPOSAL_ACC_LEVELS`; logits are mixed where `TIDAR_MIX_DRAFT_TARGET_V1` is 1, with
`TIDAR_MIX_LOGIT_TARGET_WEIGHT` as w (the weight alone does nothing), and only for requests that sample. The target's
temperature is the request's; `tidar_ar_temperature` is that of the log-probabilities it returns. A single forward needs
the attention backend FLEX_ATTENTION: without it drafts are silently never accepted. After n accepted drafts it goes
on from the level nearest to n, which may be one above it (`select_proposal_index`); ours from the nearest below.
"""

from __future__ import annotations

import json
from pathlib import Path

from autotune.export.evidence import provenance, write_files
from autotune.export.policy import Chosen, Policy, Target, refusal, refuse_cpu

NAME = "tidar-vllm"
# A model's own generation config may cut the distribution (top_k, top_p), which nothing here was tuned with.
SAMPLING = '--generation-config vllm --override-generation-config "$(cat sampling.json)"'


def write(policy: Policy, out: Path) -> list[Path]:
    """Write speculative-config.json, environment, sampling.json and their provenance."""
    chosen = policy.one("vLLM")
    _check(chosen)
    decoding = chosen.decoding
    files = {"sampling.json": json.dumps({"temperature": decoding.temperature}, indent=2) + "\n"}
    if decoding.drafts:
        files["speculative-config.json"] = json.dumps(speculative_config(chosen), indent=2) + "\n"
        files["environment"] = environment_file(chosen)
        says = [
            "needs the publisher's fork of vLLM: no release knows the method tidar",
            "set -a; . ./environment; set +a",
            f'vllm serve MODEL {SAMPLING} --speculative-config "$(cat speculative-config.json)"'
            + (" --attention-backend FLEX_ATTENTION" if decoding.sampler == "single_forward" else ""),
        ]
        if len(decoding.levels) < decoding.draft_tokens + 1 and decoding.sampler == "single_forward":
            says.append("between two levels the fork takes the nearest, ours the one below: acceptance may differ")
    else:
        says = [
            f"{chosen.why_single}: there is nothing to set",
            f"vllm serve MODEL {SAMPLING}    # without --speculative-config",
        ]
    files[f"{NAME}.provenance.yaml"] = provenance(NAME, policy, says=says, settings=[chosen])
    return write_files(out, files, absent=("speculative-config.json", "environment"))


def speculative_config(chosen: Chosen) -> dict[str, str | int | float]:
    """The value of --speculative-config for a setting that drafts."""
    decoding = chosen.decoding
    found: dict[str, str | int | float] = {
        "method": "tidar",
        "num_speculative_tokens": decoding.draft_tokens,
        "tidar_diff_temperature": decoding.draft_temperature,
    }
    if decoding.temperature > 0:  # the fork wants it positive
        found["tidar_ar_temperature"] = decoding.temperature
    return found


def environment(chosen: Chosen) -> dict[str, str]:
    """Every variable that decides between settings, also where it has its default: a shell may hold another value."""
    decoding = chosen.decoding
    single = decoding.sampler == "single_forward"
    found = {"VLLM_TIDAR_TWO_FORWARD": "0" if single else "1", "VLLM_TIDAR_NO_BONUS": "0"}
    if single:
        found["VLLM_TIDAR_PROPOSAL_ACC_LEVELS"] = ",".join(map(str, decoding.levels))
        found["VLLM_ATTENTION_BACKEND"] = "FLEX_ATTENTION"
    mixed = decoding.mixing_weight < 1
    return found | {
        "TIDAR_MIX_DRAFT_TARGET_V1": "1" if mixed else "0",
        "TIDAR_MIX_LOGIT_TARGET_WEIGHT": repr(float(decoding.mixing_weight)),
    }


def environment_file(chosen: Chosen) -> str:
    """The variables, a line each, as a shell sources them."""
    return "".join(f"{name}={value}\n" for name, value in environment(chosen).items())


def _check(chosen: Chosen) -> None:
    decoding = chosen.decoding
    refuse_cpu(NAME, chosen)
    if decoding.sampler == "denoising":
        raise refusal(NAME, chosen, "sampler", "denoising", "the fork drafts in one step; it has no denoising")
    if decoding.anchor_draft:
        raise refusal(NAME, chosen, "anchor_draft", True, "the fork drops the draft at the anchor's next position")
    if decoding.mixing_weight < 1 and decoding.temperature == 0:
        why = "the fork mixes logits for requests that sample only, and would silently not at temperature 0"
        raise refusal(NAME, chosen, "mixing_weight", decoding.mixing_weight, why)


TARGET = Target(
    name=NAME,
    engine="vLLM (Zyphra's fork)",
    file="a folder: speculative-config.json, environment, sampling.json, provenance",
    loads="needs a fork",
    write=write,
    does="the TiDAR speculative config and environment: drafts, levels, forwards, mixing, temperatures",
    out="tidar-vllm",
)
