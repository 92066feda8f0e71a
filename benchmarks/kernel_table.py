"""Write the compile tables: docs/kernels/<target>.md in full, and their summary into docs/kernels.md.

    python -m benchmarks.kernel_table

Every kernel with every tiling, at the sizes of ZAYA1-8B in bfloat16, for every target; needs triton, no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from runtime.config import ModelConfig
from runtime.kernels.cli import row
from runtime.kernels.compiler import Compiled, compile_all, jobs, triton_version
from runtime.kernels.problem import VERIFIED_SLOTS, Problem, problem_of
from runtime.kernels.registry import KERNELS, Kernel
from runtime.kernels.target import TARGETS
from runtime.options import progress_bar

TOKENS = (1, 16, 272, 2176)
LEVELS = (0, 4, 7, 11)
MASKED = ("attention",)  # kernels whose code differs where slots see more than those before them
DTYPE = "bfloat16"
COLUMNS = ("tiling", "registers", "spilled", "shared", "matrix instructions", "outcome")
DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- summary: written by benchmarks/kernel_table.py -->\n", "<!-- end of summary -->\n"


def problems(kernel: Kernel, config: ModelConfig) -> list[Problem]:
    """What a kernel is compiled for."""
    found = [problem_of(tokens, config) for tokens in TOKENS]
    if kernel.name in MASKED:
        found.append(Problem(config, 16, VERIFIED_SLOTS, kind="draft"))
        found.append(Problem(config, 4, VERIFIED_SLOTS * (1 + len(LEVELS)), kind="single", levels=LEVELS))
    return found


def label(problem: Problem) -> str:
    """Tokens, and the kind where it is not the usual one."""
    return str(problem.tokens) if problem.kind == "causal" else f"{problem.tokens} ({problem.kind})"


def tables(results: Sequence[Compiled]) -> Iterable[tuple[str, list[str], list[tuple[str, ...]]]]:
    """Of one target: kernel, token counts, and their rows in the order of `COLUMNS`. Counts with equal rows share."""
    found: dict[str, dict[str, list[tuple[str, ...]]]] = {}
    for result in results:
        kernel, _, _, *cells = row(result)
        found.setdefault(kernel, {}).setdefault(label(result.job.problem), []).append(tuple(cells))
    for kernel, by_tokens in found.items():
        shared: dict[tuple[tuple[str, ...], ...], list[str]] = {}
        for tokens, rows in by_tokens.items():
            shared.setdefault(tuple(rows), []).append(tokens)
        for rows_, counts in shared.items():
            yield kernel, counts, list(rows_)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    written = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in written)


def page(target: str, results: Sequence[Compiled]) -> str:
    """The complete table of one target."""
    text = (
        f"# Every tiling on {target}\n\n"
        f"Written by `python -m benchmarks.kernel_table` with triton {triton_version()}: ZAYA1-8B's sizes, {DTYPE}, "
        "1,024 cached tokens. 272 and 2176 tokens\nare sequences of 17, those of single_forward have 85. Registers and "
        "spilled bytes are those of a thread, shared memory\nof a block; where a kernel is several launches, each has "
        "its figure. The first row is the default.\n"
    )
    for kernel, counts, rows in tables(results):
        text += f"\n## {kernel}, tokens {', '.join(counts)}\n\n{markdown(COLUMNS, rows)}"
    return text


def summary(results: Sequence[Compiled]) -> str:
    """Usable tilings of all, and the registers of the default, by kernel, token count and target."""
    cells: dict[tuple[str, str], dict[str, list[Compiled]]] = {}
    for result in results:
        by_target = cells.setdefault((result.job.kernel, label(result.job.problem)), {})
        by_target.setdefault(result.job.target, []).append(result)
    rows = [
        (*cell, *(f"{sum(r.usable for r in found[t])} of {len(found[t])}, {row(found[t][0])[4]}" for t in TARGETS))
        for cell, found in cells.items()
    ]
    return f"Triton {triton_version()}.\n\n" + markdown(("kernel", "tokens", *TARGETS), rows)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1: a default is not usable somewhere."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_table", description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of kernels.md (default: docs)")
    options = parser.parse_args(arguments)
    config = ModelConfig()
    wanted = [j for k in KERNELS.values() for j in jobs([k], TARGETS.values(), problems(k, config), DTYPE)]
    with progress_bar("compile") as progress:
        results = compile_all(wanted, progress)
    (options.out / "kernels").mkdir(exist_ok=True)
    for target in TARGETS:
        text = page(target, [result for result in results if result.job.target == target])
        (options.out / "kernels" / f"{target}.md").write_text(text, encoding="utf-8")
    overview = options.out / "kernels.md"
    before, rest = overview.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    overview.write_text(f"{before}{BEGIN}\n{summary(results)}\n{END}{after}", encoding="utf-8")
    defaults = {(r.job.kernel, r.job.target, label(r.job.problem)): r for r in reversed(results)}
    unusable = [cell for cell, result in defaults.items() if not result.usable]
    for kernel, target, tokens in unusable:
        print(f"the default of {kernel} on {target}, tokens {tokens}: {defaults[kernel, target, tokens].outcome}")
    print(f"{sum(result.usable for result in results)} of {len(results)} tilings usable")
    return 1 if unusable else 0


if __name__ == "__main__":
    sys.exit(main())
