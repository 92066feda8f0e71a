"""A training recipe: the model, and stages run one after the other. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

from hardware.files import build, known, read_yaml
from runtime.config import ModelConfig, replace, require
from runtime.conversion.tasks import FAMILIES


@dataclass(frozen=True)
class Stage:
    """One stage. `length` is clean tokens per sequence; learning rate: warm-up, then linear to the final one."""

    name: str
    objective: Literal["next_token", "conversion"]
    batch: int  # sequences per optimizer step
    length: int
    learning_rate: float
    final_learning_rate: float
    steps: int | None = None  # how long: in optimizer steps, or
    tokens: int | None = None  # in clean tokens, rounded up to whole steps
    warmup_steps: int = 100
    micro_batches: int = 1  # a batch is run in so many equal parts, whose gradients add up to that of the whole
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: of the matrix products; weights stay float32
    data: str | None = None  # a file of tokens, relative to the recipe's file (default: the built-in tasks and source)
    max_position_embeddings: int | None = None  # the context of this stage's model and of later ones
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
        require(
            (self.steps is None) != (self.tokens is None),
            f"a stage has either steps or tokens, but stage {self.name!r} got {self.steps} and {self.tokens}",
        )
        for key in ("steps", "tokens", "batch", "micro_batches", "max_block", "max_position_embeddings"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"{key} >= 1 must hold, but got {value}")
        # Position 0 is never masked: a sequence of one token has nothing to draft.
        require(self.length >= 2, f"length >= 2 must hold, but got {self.length}")
        require(
            self.batch % self.micro_batches == 0,
            f"batch must be a multiple of micro_batches, but got {self.batch} and {self.micro_batches}",
        )
        for key in ("alpha", "warmup_steps", "weight_decay", "balance_rate"):
            require(getattr(self, key) >= 0, f"{key} >= 0 must hold, but got {getattr(self, key)}")
        require(self.clip > 0, f"clip > 0 must hold, but got {self.clip}")
        for key in ("task_share", "partial_share", "skip_share"):
            require(0 <= getattr(self, key) <= 1, f"0 <= {key} <= 1 must hold, but got {getattr(self, key)}")
        for family, weight in self.task_weights.items():
            if family not in FAMILIES:
                raise known("task family", family, FAMILIES)
            require(weight > 0, f"task_weights > 0 must hold, but got {weight} for {family}")
        require(
            self.loss_on == "all" or self.data is not None or self.task_share > 0,
            "loss_on solutions needs tasks: task_share > 0 must hold",
        )
        require(
            0 < self.final_learning_rate <= self.learning_rate,
            "0 < final_learning_rate <= learning_rate must hold, "
            f"but got {self.final_learning_rate} and {self.learning_rate}",
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps, whichever way the stage's length is given."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // self.step_tokens)

    @property
    def step_tokens(self) -> int:
        """Clean tokens per optimizer step."""
        return self.batch * self.length

    @property
    def family_weights(self) -> dict[str, float]:
        """The relative weight of every task family."""
        return dict.fromkeys(FAMILIES, 1.0) | self.task_weights

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.learning_rate + (self.final_learning_rate - self.learning_rate) * done


@dataclass(frozen=True)
class Recipe:
    """Everything that makes the weights: with the seed, the same machine and one thread count, the same losses.

    model: None for a recipe that converts whatever checkpoint it starts from.
    mask_token_id: an id that the checkpoint's data never use, for a checkpoint that has no mask token yet.
    """

    name: str
    seed: int
    stages: tuple[Stage, ...]
    model: ModelConfig | None = None
    mask_token_id: int | None = None
    evaluate_every: int = 0  # steps between evaluations on held-out data, the last step of a stage included; 0: none

    def __post_init__(self) -> None:
        require(len(self.stages) >= 1, "stages must have at least one entry")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), f"stages must have different names (each has a folder), but got {names}")
        for name in names:
            named = Path(name).name == name and name not in ("", "..")
            require(named, f"a stage's name must be a folder's, but is {name!r}")
        require(self.evaluate_every >= 0, f"evaluate_every >= 0 must hold, but got {self.evaluate_every}")
        require(
            self.model is None or self.mask_token_id is None,
            "mask_token_id belongs into the model where the recipe has one",
        )
        if self.model is not None:
            self.check(self.model)

    def only(self, names: Sequence[str]) -> Recipe:
        """The recipe with these of its stages, in its own order."""
        for name in names:
            if name not in [stage.name for stage in self.stages]:
                raise known("stage", name, [stage.name for stage in self.stages])
        kept: Recipe = replace(self, stages=tuple(stage for stage in self.stages if stage.name in names))
        return kept

    def check(self, config: ModelConfig) -> None:
        """Raise UserError where a model of this configuration cannot go through the stages."""
        for index, stage in enumerate(self.stages):
            require(
                stage.objective == "next_token" or config.mask_token_id is not None,
                f"stage {stage.name!r} converts, so the model must have a mask_token_id",
            )
            context = self.stage_config(config, index).max_position_embeddings
            require(
                stage.length <= context,
                f"length <= max_position_embeddings must hold in stage {stage.name!r}, "
                f"but got {stage.length} and {context}",
            )

    def stage_config(self, config: ModelConfig, index: int) -> ModelConfig:
        """The configuration during a stage: that of the model with the last context given up to it."""
        contexts = [s.max_position_embeddings for s in self.stages[: index + 1] if s.max_position_embeddings]
        found: ModelConfig = replace(config, max_position_embeddings=contexts[-1]) if contexts else config
        return found

    def config_from(self, start: ModelConfig, where: str) -> ModelConfig:
        """The model that a checkpoint `where` of configuration `start` becomes, at the first stage.

        UserError where that is another model than the recipe's, or where no usable mask token is named.
        """
        wanted = self.model.mask_token_id if self.model is not None else self.mask_token_id
        if wanted is None or wanted == start.mask_token_id:
            config = start
        else:
            require(
                start.mask_token_id is None,
                f"{where} was converted with mask_token_id {start.mask_token_id}, but the recipe says {wanted}",
            )
            taken = {start.pad_token_id, start.bos_token_id, *start.stop_token_ids}
            require(
                wanted not in taken, f"mask_token_id must be an id of its own, but {wanted} is a special of {where}"
            )
            config = replace(start, mask_token_id=wanted)
        same = self.model is None or replace(config, max_position_embeddings=self.model.max_position_embeddings)
        require(
            self.model is None or same == self.model,  # the context may differ: stages extend it
            f"{where}: its config.json is not the recipe's model (leave `model` out to convert any checkpoint)",
        )
        converts = any(stage.objective == "conversion" for stage in self.stages)
        require(
            config.mask_token_id is not None or not converts,
            f"{where} has no mask_token_id: the recipe must name an unused id of its {config.vocab_size} as "
            "mask_token_id",
        )
        self.check(config)
        return config


def load_recipe(name_or_path: str) -> Recipe:
    """A bundled recipe by name, or any YAML file by path. Raises UserError listing the known names."""
    if name_or_path.endswith((".yaml", ".yml")):
        return _read(Path(name_or_path), name_or_path)
    folder = files("runtime.conversion") / "recipes"
    names = sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name_or_path not in names:
        raise known("recipe", name_or_path, names)
    with as_file(folder / f"{name_or_path}.yaml") as path:
        return _read(path, name_or_path)


def _read(path: Path, where: str) -> Recipe:
    recipe = build(Recipe, read_yaml(path), where)
    # A relative path means the same wherever the command is typed.
    stages = (s if s.data is None else replace(s, data=str((path.parent / s.data).resolve())) for s in recipe.stages)
    loaded: Recipe = replace(recipe, stages=tuple(stages))
    return loaded
