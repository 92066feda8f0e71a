"""What a recipe will take, before it starts: tokens, steps, arithmetic, and the memory that it needs at least."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from hardware.files import UserError
from hardware.fingerprint import memory_bytes
from runtime.config import ModelConfig
from runtime.conversion.recipe import Recipe, Stage
from runtime.model.zaya import Zaya

_WEIGHT, _GRADIENT, _MOMENTS = 4, 4, 8  # bytes per parameter: float32, and Adam's two moments
_SAVED = 12  # bytes per parameter of a saved state (weights and moments), which is copied before it is written


@dataclass(frozen=True)
class StagePlan:
    """One stage. `flops` counts forward and backward; `activation_bytes` is a lower bound for one micro-batch."""

    name: str
    tokens: int
    steps: int
    flops: float
    activation_bytes: int


@dataclass(frozen=True)
class Plan:
    """The whole recipe on one device. Bytes are what is held at least, not what a run has been measured to hold."""

    parameters: int
    active_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    save_bytes: int  # of main memory, while a state is saved
    stages: tuple[StagePlan, ...]
    device: str
    available_bytes: int
    available_main_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Of the device's memory, at least: in a step, or on a CPU while saving, when there are no gradients."""
        kept = self.weight_bytes + self.optimizer_bytes
        step = kept + self.gradient_bytes + max(stage.activation_bytes for stage in self.stages)
        return max(step, kept + self.save_bytes) if self.device == "cpu" else step

    @property
    def fits(self) -> bool:
        """Whether the least that is needed is free now. More may be needed than that."""
        return self.needed_bytes <= self.available_bytes and self.save_bytes <= self.available_main_bytes

    def check(self) -> None:
        """Raise UserError, in one line, where the memory is not there."""
        if self.fits:
            return
        free = f"{self.available_bytes / 1e9:.3g} GB are free"
        if self.device != "cpu":
            free += f" (and {self.save_bytes / 1e9:.3g} of {self.available_main_bytes / 1e9:.3g} GB of main memory)"
        raise UserError(
            f"training {self.parameters / 1e9:.3g} G parameters needs at least {self.needed_bytes / 1e9:.3g} GB on "
            f"{self.device}, where {free}; `convert --dry-run` shows the parts"
        )


def plan(recipe: Recipe, config: ModelConfig, *, device: str = "cpu") -> Plan:
    """What `recipe` takes with a model of this configuration on one device."""
    with torch.device("meta"):
        model = Zaya(config)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    total = sum(p.numel() for p in model.parameters())
    looked_up = 0 if config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    active = total - experts + experts // config.num_experts - looked_up
    main = _free_main_bytes()
    return Plan(
        total,
        active,
        _WEIGHT * total,
        _GRADIENT * total,
        _MOMENTS * total,
        _SAVED * total,
        tuple(_stage(stage, config, active) for stage in recipe.stages),
        device,
        main if device == "cpu" else _free_device_bytes(device),
        main,
    )


def _stage(stage: Stage, config: ModelConfig, active: int) -> StagePlan:
    """A conversion runs two slots per token, the clean one and its mask, and both go through the LM head."""
    halves = 2 if stage.objective == "conversion" else 1
    tokens, rows = stage.total_steps * stage.step_tokens, stage.batch // stage.micro_batches
    slots = halves * stage.length
    # Float32 log-probabilities of every slot, kept for the backward, and the logits of one half beside them.
    logits = 4 * rows * (slots + stage.length) * config.vocab_size
    mask = 4 * slots * slots * (rows if halves == 2 else 1)  # the additive attention mask; rows differ in their blocks
    flops = tokens * training_flops_per_token(config, active, stage.length, halves)
    return StagePlan(stage.name, tokens, stage.total_steps, flops, logits + mask)


def training_flops_per_token(config: ModelConfig, active: int, length: int, halves: int) -> float:
    """FLOPs of forward and backward per clean token, in rows of `length`; a multiply-add is two.

    6 * active parameters per slot (2 forward, 4 backward: Kaplan et al., arXiv 2001.08361, section 2.1), where active
    counts one expert, the LM head, and no embedding lookup; and 12 * query size per visible key and layer, with
    (length + 1) / 2 keys visible on average, in a sliding layer at most the window. Ignored: the keys inside a
    mask block, norms and convolution folding, and that implementations compute masked scores too.
    """
    keys = 0.0
    for kind in config.layer_types:
        causal = (length + 1) / 2
        keys += causal if kind == "hybrid" else min(causal, config.sliding_window or causal)
    return halves * (6.0 * active + 12.0 * config.query_size * keys)


def _free_device_bytes(device: str) -> int:
    try:
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    except (RuntimeError, AssertionError, ValueError) as error:  # no such device
        raise UserError(f"cannot train on {device}: {str(error).splitlines()[0]}") from error


def _free_main_bytes() -> int:
    """What the system says can be had without swapping, or all of the memory where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return memory_bytes()
