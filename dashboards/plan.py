"""How much a demo measures, and the commands that repeat each part of it by themselves."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dashboards.choice import Choice, predict_command
from runtime.config import require

ARTEFACTS = {
    "hardware.yaml": "the profile of this machine",
    "predictions.json": "the predictions for the full-size model",
    "calibration.jsonl": "the timed forwards that the engine was fitted to",
    "engine.yaml": "the fitted engine",
    "held-out.jsonl": "the timed forwards that nothing was fitted to",
    "generations.jsonl": "whole generations, autoregressive and two_forward in alternating rounds",
    "study.db": "every trial of the tuning (ridgepoint study show reads it)",
    "deployment.yaml": "the tuned settings, which runtime.generate follows",
    "generated.json": "what was generated with them",
    "report.html": "this report",
}


@dataclass(frozen=True)
class Grid:
    """Forwards to time: every batch with every context, and in each all slot counts (1: a decode)."""

    batch: tuple[int, ...]
    slots: tuple[int, ...]
    context: tuple[int, ...]

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Pairs of batch and context, each of which needs a cache of its own."""
        return [(batch, context) for batch in self.batch for context in self.context]


@dataclass(frozen=True)
class Plan:
    """How much to measure. No point of `held_out` may be one of `fitted`, nor need more tokens per forward."""

    fitted: Grid = Grid((1, 8), (1, 5, 17), (64, 384))
    held_out: Grid = Grid((1, 4), (1, 9, 13), (160, 640))
    repeats: int = 10
    batches: tuple[int, ...] = (1, 8)  # of the generations
    prompts: int = 8
    new_tokens: int = 64
    rounds: int = 6
    answer_tokens: int = 150  # of the tuned run, which shall come to its answers
    tuning_seconds: float = 75.0
    tuning_trials: int = 60
    tuning_prompts: int = 5
    tuning_repeats: int = 2
    tuning_rounds: int = 8
    quick_probe: bool = True

    def __post_init__(self) -> None:
        require(self.tuning_seconds > 0, f"seconds > 0 must hold, but got {self.tuning_seconds:g}")


QUICK = Plan(
    fitted=Grid((1, 4), (1, 5, 17), (64, 256)),
    held_out=Grid((1, 2), (1, 9), (160,)),
    repeats=5,
    batches=(1, 4),
    prompts=4,
    new_tokens=32,
    rounds=6,
    tuning_seconds=10.0,
    tuning_prompts=3,
    tuning_repeats=1,
    tuning_rounds=6,
)


def commands(model: str, plan: Plan, choice: Choice, prompt: str, threads: int) -> tuple[tuple[str, str], ...]:
    """What repeats each part by itself, into the folder "repeat"."""
    here = {"hardware": "repeat/hardware.yaml", "engine": "repeat/engine.yaml"}
    tuning = {
        "seconds": plan.tuning_seconds,
        "trials": plan.tuning_trials,
        "prompts": plan.tuning_prompts,
        "new-tokens": plan.new_tokens,
        "repeats": plan.tuning_repeats,
        "rounds": plan.tuning_rounds,
    }
    generations = {
        "batch": plan.batches,
        "sampler": "two_forward",
        "new-tokens": plan.new_tokens,
        "prompts": plan.prompts,
        "repeats": plan.rounds,
        "threads": threads,
    }
    probe = _line("hardware probe", {"out": here["hardware"]}) + " --quick" * plan.quick_probe
    lines = [
        ("Probe this machine:", probe),
        *((f"Predict the full-size model on {name}:", predict_command(choice, name)) for name in choice.devices),
        ("Time the forwards to fit to:", _bench(model, plan.fitted, plan, threads, "repeat/calibration.jsonl")),
        (
            "Fit the engine:",
            _line(
                "calibrate",
                {"measurements": "repeat/calibration.jsonl", "hardware": here["hardware"], "out": here["engine"]},
            ),
        ),
        ("Time forwards to check it on:", _bench(model, plan.held_out, plan, threads, "repeat/held-out.jsonl")),
        (
            "Compare them with predictions:",
            _line("validate", {"measurements": "repeat/held-out.jsonl", **here, "expert-coverage": "recorded"}),
        ),
        ("Generate with both samplers, alternating:", _line("bench", {"model": model, **generations})),
        ("Tune:", _line("tune", {"model": model, "batch": 1, **tuning, **here, "out": "repeat/tune"})),
        ("Export:", _line("export", {"format": "native", "study": "repeat/tune", "out": "repeat/deployment.yaml"})),
        (
            "Follow the deployment:",
            _line(
                "generate",
                {
                    "model": model,
                    "deployment": "repeat/deployment.yaml",
                    "prompt": prompt,
                    "max-new-tokens": plan.answer_tokens,
                },
            ),
        ),
        ("Explore other devices, batches and contexts in the browser:", "ridgepoint dashboard"),
    ]
    return tuple(lines)


def _line(name: str, options: Mapping[str, Any]) -> str:
    words = ["ridgepoint", *name.split()]
    for option, value in options.items():
        words += [f"--{option}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def _bench(model: str, grid: Grid, plan: Plan, threads: int, out: str) -> str:
    axes = {"batch": grid.batch, "slots": grid.slots, "context": grid.context}
    return _line("bench", {"model": model, **axes, "repeats": plan.repeats, "threads": threads, "out": out})
