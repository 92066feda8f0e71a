"""Commands about the Triton kernels: `kernels list`, `kernels compile`, `kernels check`. Torch and triton load late."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from hardware.files import known
from runtime.config import DTYPE_BYTES, ModelConfig, model_config_from_json, require
from runtime.kernels.check import prepare, report, require_triton
from runtime.kernels.problem import problem_of
from runtime.kernels.registry import KERNELS, kernel
from runtime.kernels.target import TARGETS, target
from runtime.options import Json, integers, print_json, progress_bar

if TYPE_CHECKING:
    from runtime.kernels.compiler import Compiled

FEW = 3  # tilings of a problem that are compiled when not all are
Names = Annotated[list[str] | None, typer.Option("--kernel", help="Only this kernel, may be repeated (default: all).")]
All = Annotated[bool, typer.Option("--all-tilings", help="Every tiling, not the first ones only.")]


def register(app: typer.Typer) -> None:
    """Add this package's commands to the root command."""
    group = typer.Typer(no_args_is_help=True, help="The Triton kernels: list them, compile them, hold them to torch.")
    group.command("list")(list_kernels)
    group.command("compile")(compile_kernels)
    group.command("check")(check_kernels)
    app.add_typer(group, name="kernels")


def list_kernels(as_json: Json = False) -> None:
    """Name the kernels, the operators that predictions and measurements know them by, and the targets."""
    rows = [{"kernel": k.name, "operator": k.operator, "does": k.does} for k in KERNELS.values()]
    if as_json:
        return print_json({"kernels": rows, "targets": list(TARGETS)})
    for row in rows:
        print(f"{row['kernel']:14} {row['operator']:15} {row['does']}")
    print(f"targets: {', '.join(TARGETS)}")


def compile_kernels(
    targets: Annotated[
        list[str] | None, typer.Option("--target", help=f"{', '.join(TARGETS)}; may be repeated (default: all).")
    ] = None,
    kernels: Names = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    tokens: Annotated[str, typer.Option(help="Tokens of a forward; multiples of 17 are 17 a sequence.")] = "1,16,272",
    context: Annotated[int, typer.Option(help="Cached tokens per sequence.")] = 1024,
    model: Annotated[str, typer.Option(help="zaya1-8b, a bundled checkpoint, or a checkpoint folder.")] = "zaya1-8b",
    all_tilings: All = False,
    as_json: Json = False,
) -> None:
    """Compile kernels for GPUs that need not be here: registers, spills, shared memory and matrix instructions."""
    wanted = [kernel(name) for name in kernels or KERNELS]
    places = [target(name) for name in targets or TARGETS]
    if dtype not in DTYPE_BYTES:
        raise known("dtype", dtype, DTYPE_BYTES)
    counts = integers("tokens", tokens)
    require(all(count >= 1 for count in counts), f"tokens >= 1 must hold, but got {min(counts)}")
    config = _config(model)
    require_triton()
    from runtime.kernels.compiler import compile_all, jobs, triton_version

    problems = [problem_of(count, config, context) for count in counts]
    with progress_bar("compile") as progress:
        found = compile_all(jobs(wanted, places, problems, dtype, None if all_tilings else FEW), progress)
    if as_json:
        return print_json({"triton": triton_version(), "results": [result.plain() for result in found]})
    print(
        f"triton {triton_version()}, {model}, {dtype}; registers and spilled bytes of a thread, shared bytes of a block"
    )
    for line in _columns([HEADER, *(row(result) for result in found)]):
        print(line)
    print(f"{sum(result.usable for result in found)} of {len(found)} usable")


def check_kernels(
    kernels: Names = None,
    device: Annotated[str, typer.Option(help="cpu (Triton's interpreter), cuda or cuda:N (ROCm too).")] = "cpu",
    all_tilings: All = False,
    seconds: Annotated[float | None, typer.Option(help="Start no further case after so long.")] = None,
    as_json: Json = False,
) -> None:
    """Compare kernels with their plain torch references, on odd sizes; exits with 1 where one differs."""
    wanted = [kernel(name).name for name in kernels or KERNELS]
    prepare(device)
    with progress_bar("check") as progress:
        passed = report(wanted, device, "all" if all_tilings else "default", as_json, seconds, progress)
    if not passed:
        raise typer.Exit(1)


HEADER = ("kernel", "target", "tokens", "tiling", "registers", "spilled", "shared", "matrix instructions", "outcome")


def row(result: Compiled) -> tuple[str, ...]:
    """A result as text, in the columns of `HEADER`; figures of several launches are joined by +."""
    job, programs = result.job, result.programs
    matrix: dict[str, int] = {}
    for program in programs:
        for name, count in program.matrix_instructions.items():
            matrix[name] = matrix.get(name, 0) + count
    return (
        job.kernel,
        job.target,
        str(job.problem.tokens),
        " ".join(f"{name}={value}" for name, value in job.tiling.items()),
        "+".join(str(program.registers) for program in programs),
        "+".join(str(program.spilled_bytes) for program in programs),
        "+".join(str(program.shared_bytes) for program in programs),
        ", ".join(f"{count} {name}" for name, count in matrix.items()) or "-",
        result.outcome,
    )


def _columns(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for cells in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _config(model: str) -> ModelConfig:
    if model == "zaya1-8b":
        return ModelConfig()
    from runtime.checkpoint import find_checkpoint

    return model_config_from_json(find_checkpoint(model) / "config.json")
