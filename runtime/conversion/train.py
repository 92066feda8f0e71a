"""Runs a recipe: pretraining, then conversion to block diffusion. Resumable at any kill; losses are kept as a curve."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from hardware.files import UserError, write_atomic
from runtime.config import require
from runtime.conversion.data import Batch, encoding_of, training_batches
from runtime.conversion.held_out import Texts, evaluate_held_out
from runtime.conversion.objective import block_starts, conversion_loss, label_counts, next_token_loss
from runtime.conversion.recipe import Recipe, Stage
from runtime.conversion.run import Entry, Run, open_run, save_run, save_stage
from runtime.conversion.token_file import TokenFile
from runtime.model.moe import Router
from runtime.model.zaya import Zaya
from runtime.tokenizer import ByteTokenizer, load_tokenizer

LOG_EVERY, SAVE_EVERY = 10, 100


@dataclass(frozen=True)
class _Means:
    """The losses of one step; None where the batch had no label for it."""

    next_token: Tensor | None
    mask: Tensor | None


def train(
    recipe: Recipe, out: Path, *, start_from: str | None = None, threads: int | None = None, device: str = "cpu"
) -> Path:
    """Run all stages of a recipe into `out` and return the folder of the final checkpoint.

    A folder that already holds a run of the same recipe is resumed from its last save; of another recipe, refused.
    start_from: a checkpoint to begin from instead of random weights; its tokenizer files go with every stage's
    checkpoint. `out` gets losses.json, and evaluations.json where the recipe evaluates. UserError, before anything
    is loaded, where the memory is not there.
    """
    if threads:
        torch.set_num_threads(threads)
    run = open_run(recipe, out, start_from, device)
    sources = _sources(run, recipe, out)  # all of them now, so that a later stage's data are not found missing then
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        for index, stage in enumerate(recipe.stages):
            if index < run.stage:
                continue
            run.model.config = recipe.stage_config(run.base, index)
            task = progress.add_task(stage.name, total=stage.total_steps, completed=run.step)
            texts, batches = sources[index]
            found: list[_Means] = []
            shown = ""
            while run.step < stage.total_steps:
                found.append(_step(run, recipe, stage, next(batches)))
                run.step += 1
                progress.advance(task)
                last = run.step == stage.total_steps
                if run.step % LOG_EVERY == 0 or last:
                    shown = _log(run, stage, found) or shown
                    found = []
                if recipe.evaluate_every and (run.step % recipe.evaluate_every == 0 or last):
                    line = f"{stage.name}, step {run.step}, held out: {_evaluate(run, stage, out, texts)}"
                    progress.console.print(line, highlight=False, soft_wrap=True)  # stays above the bar
                progress.update(task, description=f"{stage.name}: {shown}")
                if run.step % SAVE_EVERY == 0 or last:
                    save_run(run, recipe, out)
            save_stage(run, out, out / stage.name)
            run.stage, run.step = index + 1, 0
            save_run(run, recipe, out)
    return out / recipe.stages[-1].name


def _sources(run: Run, recipe: Recipe, out: Path) -> dict[int, tuple[Texts | None, Iterator[Batch]]]:
    """What the stages from here on train on, by index: the vocabulary of the built-in text, if used, and batches."""
    tokenizer = load_tokenizer(out) if out.is_dir() else ByteTokenizer()
    sources: dict[int, tuple[Texts | None, Iterator[Batch]]] = {}
    for index, stage in enumerate(recipe.stages):
        if index < run.stage:
            continue
        seed, length = recipe.seed + index, stage.length + 1
        step = run.step if index == run.stage else 0
        if stage.data is not None:
            file, vocabulary = TokenFile(stage.data), run.base.vocab_size
            require(
                stage.loss_on == "all" or file.has_judged,
                f"stage {stage.name!r} takes its loss on solutions: {file.path} must be .safetensors with `judged`",
            )
            if recipe.evaluate_every:
                file.batches(0, 1, length, vocabulary=vocabulary, split="test")  # is there enough?
            batches = file.batches(seed, stage.batch, length, vocabulary=vocabulary, start_step=step)
            sources[index] = None, batches
            continue
        encoding = encoding_of(tokenizer, run.base)
        sources[index] = (
            (tokenizer, encoding),
            training_batches(
                seed,
                stage.batch,
                length,
                task_share=stage.task_share,
                weights=stage.family_weights,
                encoding=encoding,
                start_step=step,
            ),
        )
    return sources


def _step(run: Run, recipe: Recipe, stage: Stage, part: Batch) -> _Means:
    """One optimizer step; what is random in it depends on (seed, stage, step) alone, so a resumed run repeats it.

    A batch without a label leaves everything as it was.
    """
    rng = np.random.default_rng([recipe.seed, run.stage, run.step])
    model, device = run.model, run.device
    require(
        stage.objective == "next_token" or not bool((part.tokens == model.config.mask_token_id).any()),
        f"the training data of stage {stage.name!r} hold mask_token_id {model.config.mask_token_id}: name an unused id",
    )
    tokens = torch.from_numpy(part.tokens).to(device)
    judged = torch.from_numpy(part.solutions).to(device) if stage.loss_on == "solutions" else None
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    starts = revealed = None
    if stage.objective == "conversion":
        starts = torch.from_numpy(block_starts(rng, batch, length, stage.max_block)).to(device)
        if stage.partial_share:
            share = rng.random((batch, 1)) * (rng.random((batch, 1)) < stage.partial_share)
            revealed = torch.from_numpy(rng.random((batch, length)) < share).to(device)
    counts = label_counts(model.config, tokens, judged, revealed)
    if not counts[0] and not (counts[1] and starts is not None):
        return _Means(None, None)
    for group in run.optimizer.param_groups:
        group["lr"] = stage.rate(run.step)
        group["weight_decay"] = stage.weight_decay if group["decays"] else 0.0
    next_token, mask = torch.zeros((), device=device), torch.zeros((), device=device)
    routes: list[list[Tensor]] = []  # by micro-batch, then layer
    size = batch // stage.micro_batches
    for rows in (slice(begin, begin + size) for begin in range(0, batch, size)):
        routes.append([])
        own = None if judged is None else judged[rows]
        with _precision(stage, device):
            if starts is None:
                losses = next_token_loss(model, tokens[rows], judged=own, counts=counts, routes=routes[-1])
            else:
                losses = conversion_loss(
                    model,
                    tokens[rows],
                    starts[rows],
                    alpha=stage.alpha,
                    revealed=None if revealed is None else revealed[rows],
                    judged=own,
                    counts=counts,
                    routes=routes[-1],
                )
        losses.total.backward()
        next_token = next_token + losses.next_token
        mask = mask if losses.mask is None else mask + losses.mask
    torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    _balance(model, [torch.cat(layer) for layer in zip(*routes, strict=True)], stage)
    return _Means(next_token if counts[0] else None, mask if counts[1] and starts is not None else None)


def _precision(stage: Stage, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 where the stage says so; weights, residual stream, norms and losses stay float32."""
    if stage.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


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


def _log(run: Run, stage: Stage, found: list[_Means]) -> str:
    """Note the mean losses of these steps; of steps that had labels, and nothing where none had."""
    entry: Entry = {"stage": stage.name, "step": run.step, "rate": stage.rate(run.step - 1)}
    losses: dict[str, float] = {}
    for name in ("next_token", "mask"):
        values = [float(value) for means in found if (value := getattr(means, name)) is not None]
        if values:
            losses[name] = sum(values) / len(values)
    if not all(map(np.isfinite, losses.values())):
        raise UserError(f"the loss is not finite at step {run.step} of stage {stage.name}; lower the learning rate")
    if "next_token" in losses:
        run.losses.append({**entry, **losses})
    return _shown(losses)


def _evaluate(run: Run, stage: Stage, out: Path, texts: Texts | None) -> str:
    found = evaluate_held_out(run.model, stage, texts)
    run.evaluations.append({"stage": stage.name, "step": run.step, **found})
    write_atomic(out / "evaluations.json", json.dumps(run.evaluations))
    return _shown(found)


def _shown(values: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.3f}" for key, value in values.items())
