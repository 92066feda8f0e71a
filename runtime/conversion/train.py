"""Runs a recipe: pretraining, then conversion to block diffusion. Resumable at any kill; losses are kept as a curve."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from hardware.files import UserError, plain, read_json, write_atomic
from runtime.checkpoint import load_model, load_tensors, random_model, save_model, save_tensors
from runtime.config import require
from runtime.conversion.data import Batch, training_batches
from runtime.conversion.objective import Losses, block_starts, conversion_loss, next_token_loss
from runtime.conversion.recipe import Recipe, Stage
from runtime.model.moe import Router
from runtime.model.zaya import Zaya

LOG_EVERY, SAVE_EVERY = 10, 100
_STAGE = 10**9  # positions of one stage: more than it can have steps


@dataclass
class _Run:
    model: Zaya
    optimizer: torch.optim.AdamW
    stage: int
    step: int
    losses: list[dict[str, float | int | str]]


def train(recipe: Recipe, out: Path, *, start_from: str | None = None, threads: int | None = None) -> Path:
    """Run all stages of a recipe into `out` and return the folder of the final checkpoint.

    A folder that already holds a run of the same recipe is resumed from its last save; of another recipe, refused.
    start_from: a checkpoint to begin from instead of random weights; its configuration must be the recipe's.
    """
    if threads:
        torch.set_num_threads(threads)
    run = _open(recipe, out, start_from)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        for index, stage in enumerate(recipe.stages):
            if index < run.stage:
                continue
            task = progress.add_task(stage.name, total=stage.steps, completed=run.step)
            batches = training_batches(
                recipe.seed + index,
                stage.batch,
                stage.length + 1,
                task_share=stage.task_share,
                weights=stage.family_weights,
                start_step=run.step,
            )
            sums: list[Losses] = []
            while run.step < stage.steps:
                sums.append(_step(run, recipe, stage, next(batches)))
                run.step += 1
                progress.advance(task)
                if run.step % LOG_EVERY == 0 or run.step == stage.steps:
                    entry = _log(run, stage, sums)
                    shown = ", ".join(f"{k} {v:.3f}" for k, v in entry.items() if isinstance(v, float) and k != "rate")
                    progress.update(task, description=f"{stage.name}: {shown}")
                    sums = []
                if run.step % SAVE_EVERY == 0 or run.step == stage.steps:
                    _save(run, recipe, out)
            save_model(run.model, out / stage.name)
            run.stage, run.step = index + 1, 0
            _save(run, recipe, out)
    return out / recipe.stages[-1].name


def _step(run: _Run, recipe: Recipe, stage: Stage, part: Batch) -> Losses:
    """One optimizer step; what is random in it depends on (seed, stage, step) alone, so a resumed run repeats it."""
    rng = np.random.default_rng([recipe.seed, run.stage, run.step])
    tokens = torch.from_numpy(part.tokens)
    judged = torch.from_numpy(part.solutions) if stage.loss_on == "solutions" else None
    for group in run.optimizer.param_groups:
        group["lr"] = stage.rate(run.step)
        group["weight_decay"] = stage.weight_decay if group["decays"] else 0.0
    routes: list[Tensor] = []
    if stage.objective == "next_token":
        losses = next_token_loss(run.model, tokens, judged=judged, routes=routes)
    else:
        batch, length = tokens.shape[0], tokens.shape[1] - 1
        starts = torch.from_numpy(block_starts(rng, batch, length, stage.max_block))
        revealed = None
        if stage.partial_share:
            share = rng.random((batch, 1)) * (rng.random((batch, 1)) < stage.partial_share)
            revealed = torch.from_numpy(rng.random((batch, length)) < share)
        losses = conversion_loss(
            run.model, tokens, starts, alpha=stage.alpha, revealed=revealed, judged=judged, routes=routes
        )
    losses.total.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), stage.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    _balance(run.model, routes, stage)
    return Losses(losses.total.detach(), losses.next_token, losses.mask)


@torch.no_grad()
def _balance(model: Zaya, routes: list[Tensor], stage: Stage) -> None:
    """Move each balancing bias one small step towards equal load (loss-free balancing, arXiv 2408.15664)."""
    routers = [m for m in model.modules() if isinstance(m, Router)]
    for router, chosen in zip(routers, routes, strict=True):
        load = torch.bincount(chosen, minlength=router.num_experts + 1).float() / chosen.numel()
        target = torch.full_like(load, (1 - stage.skip_share) / router.num_experts)
        target[-1] = stage.skip_share
        router.balancing_biases += stage.balance_rate * torch.sign(target - load)
        # Only differences count. The skip expert's bias stays -1: transformers sets it so when it loads a model.
        router.balancing_biases -= router.balancing_biases[-1] + 1


def _log(run: _Run, stage: Stage, sums: list[Losses]) -> dict[str, float | int | str]:
    entry: dict[str, float | int | str] = {"stage": stage.name, "step": run.step, "rate": stage.rate(run.step - 1)}
    entry["next_token"] = sum(float(x.next_token) for x in sums) / len(sums)
    if sums[0].mask is not None:
        entry["mask"] = sum(float(x.mask) for x in sums if x.mask is not None) / len(sums)
    if not np.isfinite(entry["next_token"]):
        raise UserError(f"the loss is not finite at step {run.step} of stage {stage.name}; lower the learning rate")
    run.losses.append(entry)
    return entry


def _optimizer(model: Zaya) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices, "decays": True}, {"params": vectors, "decays": False}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)


def _open(recipe: Recipe, out: Path, start_from: str | None) -> _Run:
    model = random_model(recipe.model, seed=recipe.seed) if start_from is None else load_model(start_from)
    require(model.config == recipe.model, f"{start_from}: its config.json is not the recipe's model")
    model.train().requires_grad_(True)
    run = _Run(model, _optimizer(model), 0, 0, [])
    if not (out / "progress.json").is_file():
        return run
    progress = read_json(out / "progress.json")
    require(progress.get("recipe") == plain(recipe), f"{out} holds a run of another recipe; choose another folder")
    tensors = load_tensors(out / "state.safetensors")
    require("position" in tensors, f"{out / 'state.safetensors'} is no saved state of a training run")
    # This file alone says how far the run came: after a kill between two writes the others may be one save apart.
    run.stage, run.step = divmod(int(tensors.pop("position")), _STAGE)
    try:
        place = {stage.name: index * _STAGE for index, stage in enumerate(recipe.stages)}
        entries = json.loads((out / "losses.json").read_text(encoding="utf-8"))
        run.losses = [e for e in entries if place[e["stage"]] + e["step"] <= _position(run)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot read {out / 'losses.json'}: {error!r}") from error
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(tensors.get(f"model.{name}", value))  # a tied head is stored once
        for i, parameter in enumerate(model.parameters()):
            if f"optimizer.{i}.exp_avg" in tensors:
                run.optimizer.state[parameter] = {
                    key: tensors[f"optimizer.{i}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
                }
    return run


def _position(run: _Run) -> int:
    return run.stage * _STAGE + run.step


def _save(run: _Run, recipe: Recipe, out: Path) -> None:
    tensors = {f"model.{k}": v for k, v in run.model.state_dict().items() if k != "lm_head.weight"}
    if not recipe.model.tie_word_embeddings:
        tensors["model.lm_head.weight"] = run.model.lm_head.weight.detach()
    for i, parameter in enumerate(run.model.parameters()):
        for key, value in run.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{i}.{key}"] = torch.as_tensor(value)
    tensors["position"] = torch.tensor(_position(run))
    write_atomic(out / "losses.json", json.dumps(run.losses))
    save_tensors(tensors, out / "state.safetensors")
    progress = {"recipe": plain(recipe), "stage": run.stage, "step": run.step}
    write_atomic(out / "progress.json", json.dumps(progress, indent=1))
