"""Gemma's diffusion sampler in SGLang: the YAML of `--dllm-algorithm-config` for the algorithm Gemma4Renoise.

By its sources (python/sglang/srt/dllm/algorithm/gemma4_renoise.py; the same names are in transformers' generation
config of DiffusionGemma): a block of `block_size` is predicted anew in up to `max_denoising_steps` forwards, and is
done early where the *mean entropy* of its positions is below `stopping_config.confidence_threshold` and nothing changed
for `stability_threshold` forwards; it then takes the most likely tokens. Ours asks every position for a *probability*:
`confidence.mean_entropy_bound` is what makes the early end certain of it. Entropies are of logits divided by a
temperature that must fall from t_max to t_min: it is held at 1 and a millionth, which flattens, so that what exceeds
the threshold there exceeds it at temperature 1 too. Which tokens are kept between forwards is the sampler's own affair
(`sampler_config.entropy_bound`), for which masks have no counterpart: it stays at its default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from autotune.export.confidence import mean_entropy_bound
from autotune.export.evidence import provenance, write_files
from autotune.export.filling import filling_of
from autotune.export.policy import Chosen, Policy, Target, refusal, refuse_cpu

NAME = "diffusion-gemma"
T_MIN, T_MAX = 1.0, 1.000001


def write(policy: Policy, out: Path) -> list[Path]:
    """Write gemma4-renoise.yaml and its provenance."""
    chosen = policy.one("Gemma4Renoise")
    refuse_cpu(NAME, chosen)
    config = algorithm_config(chosen)
    says = [
        "needs an SGLang in which Gemma4Renoise takes this model: a release refuses all but DiffusionGemma",
        "the sampler's own entropy_bound was not tuned and keeps its default",
        "python -m sglang.launch_server --model-path MODEL --dllm-algorithm Gemma4Renoise "
        "--dllm-algorithm-config gemma4-renoise.yaml",
    ]
    files = {
        "gemma4-renoise.yaml": yaml.safe_dump(config, sort_keys=False),
        f"{NAME}.provenance.yaml": provenance(NAME, policy, says=says, settings=[chosen]),
    }
    return write_files(out, files)


def algorithm_config(chosen: Chosen) -> dict[str, Any]:
    """What the algorithm reads, of what was tuned."""
    if not chosen.decoding.drafts:
        raise refusal(NAME, chosen, "sampler", chosen.decoding.sampler, "this engine knows no other way of decoding")
    filling = filling_of(NAME, chosen)
    threshold = filling.threshold
    # 0 is what the algorithm takes for never, and what a certain token asks for.
    bound = 0.0 if threshold is None else mean_entropy_bound(threshold, filling.block)
    return {
        "block_size": filling.block,
        "max_denoising_steps": filling.forwards,
        "temperature_schedule": {"t_min": T_MIN, "t_max": T_MAX},
        "stopping_config": {"confidence_threshold": bound, "stability_threshold": 0},
    }


TARGET = Target(
    name=NAME,
    engine="SGLang (Gemma4Renoise)",
    file="a folder: gemma4-renoise.yaml, provenance",
    loads="needs a fork",
    write=write,
    does="block, most steps, and the entropy below which a block is done, mapped from the probability threshold",
    out="diffusion-gemma",
)
