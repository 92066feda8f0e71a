"""A training run on disk: begun from a recipe or a checkpoint, saved, and resumed at its last save after any kill."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hardware.files import UserError, build, plain, read_json, write_atomic
from runtime.checkpoint import (
    empty_model,
    find_checkpoint,
    load_model,
    load_tensors,
    random_model,
    save_model,
    save_tensors,
)
from runtime.config import ModelConfig, model_config_from_json, require
from runtime.conversion.plan import plan
from runtime.conversion.recipe import Recipe
from runtime.model.zaya import Zaya

_STAGE = 10**9  # positions of one stage: more than it can have steps
# What goes with a checkpoint's weights, where it is there, and is the same after training.
COMPANIONS = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json "
    "merges.txt chat_template.jinja chat_template.json generation_config.json"
).split()
Entry = dict[str, float | int | str]


@dataclass
class Run:
    """Where a run is: `step` of `stage`, both from 0, and the curves up to there."""

    model: Zaya
    optimizer: torch.optim.AdamW
    base: ModelConfig  # the model's configuration ahead of the first stage
    start: str | None  # the folder of the checkpoint it began from
    stage: int = 0
    step: int = 0
    losses: list[Entry] = field(default_factory=list)
    evaluations: list[Entry] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.model.embed_tokens.weight.device


def open_run(recipe: Recipe, out: Path, start_from: str | None, device: str) -> Run:
    """The run that the folder holds, at its last save, or a new one."""
    start = None if start_from is None else find_checkpoint(start_from)
    if (out / "progress.json").is_file():
        return _resume(recipe, out, start, device)
    config = initial_config(recipe, start_from)
    plan(recipe, config, device=device).check()
    if start is None:
        model = random_model(config, seed=recipe.seed, device=device)
    else:
        model = load_model(str(start), device=device)
        _copy_companions(start, out)  # a run goes on without the checkpoint that it began from
    model.train().requires_grad_(True)
    return Run(model, _optimizer(model), config, None if start is None else str(start.resolve()))


def initial_config(recipe: Recipe, start_from: str | None) -> ModelConfig:
    """The model ahead of the first stage: the recipe's, or what it makes of the checkpoint's."""
    if start_from is not None:
        return recipe.config_from(model_config_from_json(find_checkpoint(start_from) / "config.json"), start_from)
    if recipe.model is None:
        raise UserError(f"recipe {recipe.name} has no model of its own: give a checkpoint to start from (--from)")
    return recipe.model


def save_run(run: Run, recipe: Recipe, out: Path) -> None:
    """Write the curves, the state and what the run is, in this order, each as a whole or not at all."""
    tensors = {f"model.{k}": v for k, v in run.model.state_dict().items() if k != "lm_head.weight"}
    if not run.base.tie_word_embeddings:
        tensors["model.lm_head.weight"] = run.model.lm_head.weight.detach()
    for i, parameter in enumerate(run.model.parameters()):
        for key, value in run.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{i}.{key}"] = torch.as_tensor(value)
    tensors["position"] = torch.tensor(run.stage * _STAGE + run.step)
    write_atomic(out / "losses.json", json.dumps(run.losses))
    save_tensors({name: tensor.cpu() for name, tensor in tensors.items()}, out / "state.safetensors")
    progress = {"recipe": plain(recipe), "model": plain(run.base), "start": run.start}
    progress |= {"stage": run.stage, "step": run.step}
    write_atomic(out / "progress.json", json.dumps(progress, indent=1))


def save_stage(run: Run, out: Path, folder: Path) -> None:
    """Write a stage's checkpoint, with what came beside the weights of the one it started from."""
    save_model(run.model, folder)
    _copy_companions(out, folder)


def _copy_companions(source: Path, target: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            write_atomic(target / name, (source / name).read_bytes())


def _resume(recipe: Recipe, out: Path, start: Path | None, device: str) -> Run:
    progress = read_json(out / "progress.json")
    require(_recipe_of(progress) == recipe, f"{out} holds a run of another recipe; choose another folder")
    origin = progress.get("start")
    require(
        start is None or origin == str(start.resolve()),
        f"{out} holds a run that started from {origin or 'random weights'}; choose another folder",
    )
    config = build(ModelConfig, progress["model"], str(out / "progress.json")) if "model" in progress else recipe.model
    if config is None:
        raise UserError(f"{out / 'progress.json'} does not name the model")
    plan(recipe, config, device=device).check()
    try:
        tensors = load_tensors(out / "state.safetensors")
        require("position" in tensors, f"{out / 'state.safetensors'} is no saved state of a training run")
    except UserError as error:
        raise UserError(f"{error}; restore that file, or remove {out} to begin again") from error
    model = empty_model(config, device=device).train().requires_grad_(True)
    run = Run(model, _optimizer(model), config, origin)
    # This file alone says how far the run came: after a kill between two writes the others may be one save apart.
    run.stage, run.step = divmod(int(tensors.pop("position")), _STAGE)
    run.losses = _entries(recipe, run, out / "losses.json")
    if (out / "evaluations.json").is_file():
        run.evaluations = _entries(recipe, run, out / "evaluations.json")
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            require(f"model.{name}" in tensors, f"{out / 'state.safetensors'} lacks {name}: it is of another model")
            value.copy_(tensors[f"model.{name}"])
        for i, parameter in enumerate(model.parameters()):
            if f"optimizer.{i}.exp_avg" in tensors:
                moments = {key: tensors[f"optimizer.{i}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                run.optimizer.state[parameter] = {key: value.to(run.device) for key, value in moments.items()}
    return run


def _recipe_of(progress: dict[str, Any]) -> Recipe | None:
    """The recipe of a saved run, keys that it does not have yet at their defaults; None where it is none any more."""
    try:
        return build(Recipe, progress.get("recipe", {}), "progress.json")
    except UserError:
        return None


def _entries(recipe: Recipe, run: Run, path: Path) -> list[Entry]:
    """The entries of a curve up to where the run is."""
    place = {stage.name: index for index, stage in enumerate(recipe.stages)}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [e for e in entries if (place[e["stage"]], e["step"]) <= (run.stage, run.step)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot read {path}: {error!r}; restore it, or remove {path.parent} to begin again") from error


def _optimizer(model: Zaya) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices, "decays": True}, {"params": vectors, "decays": False}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
