"""Commands that make and judge models: `convert`, `eval`. Torch loads inside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hardware.files import plain
from runtime.config import require
from runtime.options import Device, Json, Model, Threads, command_line, load, print_json, progress_bar


def register(app: typer.Typer) -> None:
    """Add this package's commands to the root command."""
    app.command()(convert)
    app.command("eval")(evaluate)


def convert(
    recipe: Annotated[str, typer.Option(help="A bundled recipe's name, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; a run of the same recipe in it is resumed.")],
    start: Annotated[
        str | None, typer.Option("--from", help="A checkpoint to start from (default: random weights).")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a recipe's stages: pretraining, and the conversion to block diffusion."""
    from runtime.conversion.recipe import load_recipe

    loaded = load_recipe(recipe)
    require(threads is None or threads >= 1, f"threads >= 1 must hold, but got {threads}")
    from runtime.conversion.train import train

    folder = train(loaded, out, start_from=start, threads=threads)
    losses = json.loads((out / "losses.json").read_text(encoding="utf-8"))
    if as_json:
        return print_json({"checkpoint": str(folder), "losses": losses})
    last = losses[-1]
    shown = ", ".join(f"{key} loss {last[key]:.3f}" for key in ("next_token", "mask") if key in last)
    print(f"{folder}: {shown} (curve in {out / 'losses.json'})")


def evaluate(
    model: Model = "zaya-nano",
    before: Annotated[str | None, typer.Option(help="The checkpoint ahead of the conversion, for its losses.")] = None,
    problems: Annotated[int, typer.Option(help="Held-out problems per family.")] = 40,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer to a task.")] = 150,
    batch: Annotated[int, typer.Option(help="Problems decoded together.")] = 16,
    seed: Annotated[int, typer.Option(help="Of problems and sampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the whole evaluation.")] = None,
    write_card: Annotated[Path | None, typer.Option("--card", help="Markdown file for the model card.")] = None,
    recipe: Annotated[str, typer.Option(help="The recipe of the model, for the card.")] = "zaya-nano",
    losses: Annotated[
        Path | None, typer.Option(help="The run's losses.json, for the card (default: beside the weights).")
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure losses, acceptance lengths and right answers per task family, and write the model card."""
    require(batch >= 1, f"batch >= 1 must hold, but got {batch}")
    loaded = load(model, device, "float32", threads)
    earlier = load(before, device, "float32", threads) if before else None
    from runtime.checkpoint import find_checkpoint
    from runtime.conversion.card import card, read_losses, table
    from runtime.conversion.evaluate import evaluate as run
    from runtime.conversion.evaluate import write_evaluation
    from runtime.conversion.recipe import load_recipe

    chosen = load_recipe(recipe)
    curve = read_losses(losses or find_checkpoint(model) / "losses.json") if write_card else []
    with progress_bar("eval") as progress:
        found = run(
            loaded,
            name=Path(model).name,
            command=command_line(),
            before=earlier,
            problems=problems,
            max_new_tokens=max_new_tokens,
            batch=batch,
            seed=seed,
            progress=progress,
        )
    if out is not None:
        write_evaluation(found, out)
    if write_card is not None:
        from hardware.files import write_atomic

        write_atomic(write_card, card(found, chosen, curve, sum(p.numel() for p in loaded.parameters())))
    if as_json:
        return print_json(plain(found))
    print(table(found))
