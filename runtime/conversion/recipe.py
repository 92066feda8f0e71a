"""A training recipe: the model, and stages run one after the other. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

from hardware.files import build, known, read_yaml
from runtime.config import ModelConfig, require
from runtime.conversion.tasks import FAMILIES


@dataclass(frozen=True)
class Stage:
    """One stage. `length` is clean tokens per sequence; learning rate: warm-up, then linear to the final one."""

    name: str
    objective: Literal["next_token", "conversion"]
    steps: int
    batch: int
    length: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int = 100
    task_share: float = 0.7  # share of sequences made of verifiable tasks; the rest is Python source
    task_weights: dict[str, float] = field(default_factory=dict)  # by family, 1 where none is given
    loss_on: Literal["all", "solutions"] = "all"  # solutions: fine-tuning, prompts and source carry no loss
    alpha: float = 1.0  # weight of the next-token loss beside the mask loss
    max_block: int = 17  # block lengths are uniform in 1..max_block
    partial_share: float = 0.0  # share of sequences whose masks are partly revealed, at a uniform rate
    weight_decay: float = 0.1
    clip: float = 1.0
    balance_rate: float = 0.002  # step of the balancing biases towards equal expert load
    skip_share: float = 0.05  # the load that the balancing biases aim at for the skip expert

    def __post_init__(self) -> None:
        for key in ("steps", "batch", "max_block"):
            require(getattr(self, key) >= 1, f"{key} >= 1 must hold, but got {getattr(self, key)}")
        # Position 0 is never masked: a sequence of one token has nothing to draft.
        require(self.length >= 2, f"length >= 2 must hold, but got {self.length}")
        for key in ("task_share", "partial_share", "skip_share"):
            require(0 <= getattr(self, key) <= 1, f"0 <= {key} <= 1 must hold, but got {getattr(self, key)}")
        for family, weight in self.task_weights.items():
            if family not in FAMILIES:
                raise known("task family", family, FAMILIES)
            require(weight > 0, f"task_weights > 0 must hold, but got {weight} for {family}")
        require(self.loss_on == "all" or self.task_share > 0, "loss_on solutions needs tasks: task_share > 0 must hold")
        require(
            0 < self.final_learning_rate <= self.learning_rate,
            "0 < final_learning_rate <= learning_rate must hold, "
            f"but got {self.final_learning_rate} and {self.learning_rate}",
        )

    @property
    def family_weights(self) -> dict[str, float]:
        """The relative weight of every task family."""
        return dict.fromkeys(FAMILIES, 1.0) | self.task_weights

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate + (self.final_learning_rate - self.learning_rate) * done


@dataclass(frozen=True)
class Recipe:
    """Everything that makes the weights: with the seed, the same machine and one thread count, the same losses."""

    name: str
    seed: int
    model: ModelConfig
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        require(len(self.stages) >= 1, "stages must have at least one entry")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), f"stages must have different names (each has a folder), but got {names}")
        for stage in self.stages:
            require(
                stage.objective == "next_token" or self.model.mask_token_id is not None,
                f"stage {stage.name!r} converts, so the model must have a mask_token_id",
            )


def load_recipe(name_or_path: str) -> Recipe:
    """A bundled recipe by name, or any YAML file by path. Raises UserError listing the known names."""
    if name_or_path.endswith((".yaml", ".yml")):
        return build(Recipe, read_yaml(name_or_path), name_or_path)
    folder = files("runtime.conversion") / "recipes"
    names = sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name_or_path not in names:
        raise known("recipe", name_or_path, names)
    with as_file(folder / f"{name_or_path}.yaml") as path:
        return build(Recipe, read_yaml(path), name_or_path)
