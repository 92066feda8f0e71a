"""What the commands that run a model share: option types, loading, the progress bar and the JSON document."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hardware.files import UserError, known
from runtime.config import DTYPE_BYTES, ENGINES, SAMPLER_NAMES, SETTING_OF, DecodingConfig
from runtime.device import check_device, use_device

if TYPE_CHECKING:
    from runtime.model.zaya import Zaya

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Model = Annotated[str, typer.Option(help="A bundled checkpoint's name, or a checkpoint folder.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N (ROCm too).")]
Type = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
EngineName = Annotated[
    str, typer.Option("--engine", help=f"auto (the fastest that can run here), {', '.join(ENGINES)}.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads (default: torch's own choice).")]
# The settings of a `DecodingConfig`, for `decoding_of`; None: not given.
SamplerName = Annotated[str | None, typer.Option("--sampler", help=f"{', '.join(SAMPLER_NAMES)}.")]
DraftTokens = Annotated[int | None, typer.Option(help="Draft tokens K of a step, the block of denoising (default 16).")]
Mixing = Annotated[float | None, typer.Option(help="Share w of autoregressive logits; 1 (default) is lossless.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature; 0 (default) is greedy.")]
DraftTemperature = Annotated[float | None, typer.Option(help="Temperature of the drafts; 0 (default) is greedy.")]
Anchor = Annotated[
    bool | None, typer.Option("--anchor-draft/--mask-draft", help="two_forward: first draft from the anchor's row.")
]
Levels = Annotated[
    str | None, typer.Option(help="single_forward: acceptance counts to draft ahead for, as 0,4,7,11 (default: all).")
]
Steps = Annotated[int | None, typer.Option(help="denoising: the most forwards that fill a block (default 1).")]
Threshold = Annotated[
    float | None, typer.Option(help="denoising: also decide every token of this probability (default: none).")
]
Verify = Annotated[
    bool | None, typer.Option("--verify/--no-verify", help="denoising: verify the block, which makes it lossless.")
]


def load(model: str, device: str, dtype: str, threads: int | None, engine: str = "auto") -> Zaya:
    """The model on its device; the first of bad names and values is refused before torch loads.

    Where auto does without lean because it cannot be compiled, a line on stderr says why.
    """
    if dtype not in DTYPE_BYTES:
        raise known("dtype", dtype, DTYPE_BYTES)
    if engine not in ("auto", *ENGINES):
        raise known("engine", engine, ("auto", *ENGINES))
    check_device(device, threads)
    from runtime.checkpoint import find_checkpoint, load_model

    find_checkpoint(model)  # its errors come first
    use_device(device, threads)
    loaded = load_model(model, device=device, dtype=dtype, engine=engine)  # type: ignore[arg-type]
    if engine == "auto":
        from runtime.engines import unbuilt

        obstacle = unbuilt(loaded)
        if obstacle is not None:
            print(f"ridgepoint: auto took the engine {loaded.kernels.engine}: {obstacle}", file=sys.stderr)
    return loaded


def decoding_of(
    *,
    sampler: str | None = None,
    levels: str | None = None,
    steps: int | None = None,
    threshold: float | None = None,
    **settings: Any,
) -> DecodingConfig:
    """The given options over the defaults. Without --sampler it is the one whose setting is given, else two_forward
    where anything of drafts is given, else autoregressive."""
    given = settings | {
        "proposal_levels": None if levels is None else tuple(integers("levels", levels)),
        "denoising_steps": steps,
        "confidence_threshold": threshold,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if sampler is None:
        owners = [SETTING_OF[name] for name in given if name in SETTING_OF]
        sampler = (owners or ["two_forward" if given.keys() - {"temperature"} else "autoregressive"])[0]
    return DecodingConfig(sampler, **given)  # type: ignore[arg-type]


def integers(name: str, text: str) -> list[int]:
    """The numbers of an option like 1,4,16."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--{name} must be whole numbers with commas between them, but is {text!r}") from None


def command_line() -> str:
    """The command as it was typed, for records."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr; yields a call that takes what comes next and the share done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(title), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda label, done: bar.update(task, description=label, completed=done)


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, indent=2))
