"""Commands that make and judge models: `convert`, `eval`. Torch loads inside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hardware.files import plain
from runtime.config import require
from runtime.device import check_device, use_device
from runtime.options import (
    Device,
    EngineName,
    Json,
    Model,
    Threads,
    command_line,
    integers,
    load,
    print_json,
    progress_bar,
)

if TYPE_CHECKING:
    from runtime.conversion.recipe import Recipe


def register(app: typer.Typer) -> None:
    """Add this package's commands to the root command."""
    app.command()(convert)
    app.command("eval")(evaluate)


def convert(
    recipe: Annotated[str, typer.Option(help="A bundled recipe's name, or a YAML file.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; a run of the same recipe in it is resumed.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="A checkpoint to start from (default: random weights).")
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="Only these stages of the recipe, as convert,sft (default: all).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take: tokens, steps, FLOPs, memory.")
    ] = False,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a recipe's stages: pretraining, and the conversion of a checkpoint to block diffusion."""
    from runtime.conversion.recipe import load_recipe

    loaded = load_recipe(recipe)
    loaded = loaded if stages is None else loaded.only(stages.split(","))
    check_device(device, threads)
    require(dry_run or out is not None, "--out must name a folder for the run (or ask for a --dry-run)")
    use_device(device, threads)
    if dry_run:
        return _dry_run(loaded, start, device, as_json)
    from runtime.conversion.train import train

    assert out is not None
    folder = train(loaded, out, start_from=start, threads=threads, device=device)
    losses = json.loads((out / "losses.json").read_text(encoding="utf-8"))
    evaluations = json.loads((out / "evaluations.json").read_text("utf-8")) if loaded.evaluate_every else []
    if as_json:
        return print_json({"checkpoint": str(folder), "losses": losses, "evaluations": evaluations})
    last = losses[-1] if losses else {}
    shown = ", ".join(f"{key} loss {last[key]:.3f}" for key in ("next_token", "mask") if key in last)
    print(f"{folder}: {shown} (curve in {out / 'losses.json'})")


def _dry_run(recipe: Recipe, start: str | None, device: str, as_json: bool) -> None:
    from runtime.conversion.plan import plan
    from runtime.conversion.run import initial_config

    found = plan(recipe, initial_config(recipe, start), device=device)
    if as_json:
        return print_json(plain(found) | {"needed_bytes": found.needed_bytes, "fits": found.fits})
    print(
        f"{recipe.name}: {found.parameters / 1e6:,.2f} M parameters, {found.active_parameters / 1e6:,.2f} M of them "
        "multiplied per slot"
    )
    print(f"{'stage':<16} {'tokens':>10} {'steps':>10} {'FLOPs':>10}  least for a micro-batch")
    for stage in found.stages:
        working = f"{stage.activation_bytes / 1e9:,.2f} GB"
        print(f"{stage.name:<16} {stage.tokens:>10.3g} {stage.steps:>10,} {stage.flops:>10.3g}  {working}")
    print(
        f"memory: weights {found.weight_bytes / 1e9:,.2f} GB, gradients {found.gradient_bytes / 1e9:,.2f} GB, moments "
        f"{found.optimizer_bytes / 1e9:,.2f} GB; while saving {found.save_bytes / 1e9:,.2f} GB of main memory"
    )
    print(
        f"needs at least {found.needed_bytes / 1e9:,.2f} GB on {device}, where {found.available_bytes / 1e9:,.2f} GB "
        f"are free: {'fits, if the rest of the activations does' if found.fits else 'does not fit'}"
    )


def evaluate(
    model: Model = "zaya-nano",
    before: Annotated[str | None, typer.Option(help="The checkpoint ahead of the conversion, for its losses.")] = None,
    problems: Annotated[int, typer.Option(help="Held-out problems per family, decoded greedily.")] = 40,
    sampled_problems: Annotated[int, typer.Option(help="Problems per family in the samplers' table.")] = 5,
    samples: Annotated[int, typer.Option(help="Samples of each of those problems.")] = 16,
    pass_at: Annotated[str, typer.Option(help="The k of pass@k, none above the samples.")] = "1,16",
    settings: Annotated[
        str | None,
        typer.Option(
            help="Rows of the samplers' table, as two_forward,denoising/S=4 "
            "(default: all); autoregressive is always there."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds in which the rows are timed.")] = 6,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer to a task.")] = 150,
    batch: Annotated[int, typer.Option(help="Problems decoded together; speeds are of one at a time.")] = 64,
    seed: Annotated[int, typer.Option(help="Of problems and sampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the whole evaluation.")] = None,
    write_card: Annotated[Path | None, typer.Option("--card", help="Markdown file for the model card.")] = None,
    recipe: Annotated[str, typer.Option(help="The recipe of the model, for the card.")] = "zaya-nano",
    losses: Annotated[
        Path | None, typer.Option(help="The run's losses.json, for the card (default: beside the weights).")
    ] = None,
    device: Device = "cpu",
    engine: EngineName = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare the samplers' speed and quality, measure losses and acceptance per task family, write the model card."""
    require(batch >= 1, f"batch >= 1 must hold, but got {batch}")
    ks = integers("pass-at", pass_at)
    loaded = load(model, device, "float32", threads, engine)
    earlier = load(before, device, "float32", threads, "eager") if before else None  # losses need no cache
    from runtime.checkpoint import find_checkpoint
    from runtime.conversion.card import card, read_losses
    from runtime.conversion.evaluate import evaluate as run
    from runtime.conversion.evaluate import write_evaluation
    from runtime.conversion.recipe import load_recipe
    from runtime.conversion.tables import tables

    chosen = load_recipe(recipe)
    curve = read_losses(losses or find_checkpoint(model) / "losses.json") if write_card else []
    with progress_bar("eval") as progress:
        found = run(
            loaded,
            name=Path(model).name,
            command=command_line(),
            before=earlier,
            problems=problems,
            sampled_problems=sampled_problems,
            samples=samples,
            ks=ks,
            settings=settings.split(",") if settings is not None else None,
            max_new_tokens=max_new_tokens,
            batch=batch,
            rounds=rounds,
            seed=seed,
            progress=progress,
        )
    if out is not None:
        write_evaluation(found, out)
    if write_card is not None:
        from hardware.files import write_atomic

        parameters = sum(p.numel() for p in loaded.parameters())
        write_atomic(write_card, card(found, loaded.config, chosen, curve, parameters))
    if as_json:
        return print_json(plain(found))
    print(tables(found))
