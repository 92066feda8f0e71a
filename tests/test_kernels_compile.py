"""Compiling kernels for GPUs that are not here: the specialisation, what is read back, and the committed table."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ridgepoint
from benchmarks.kernel_table import BEGIN, COLUMNS, DTYPE, label, problems
from hardware.files import UserError
from runtime.config import DTYPE_BYTES, ModelConfig
from runtime.kernels import compiler
from runtime.kernels.check import compile_ahead, plan
from runtime.kernels.cli import row
from runtime.kernels.compiler import USABLE, Compiled, Compilers, Job, Program, launches, specialise, triton_version
from runtime.kernels.launch import recording
from runtime.kernels.problem import ODD_PROBLEMS, full_problems, problem_of
from runtime.kernels.registry import KERNELS
from runtime.kernels.target import AMD_OPTIONS, OPTIONS, TARGETS, Target, constants

DOCS = Path(__file__).parents[1] / "docs"
FULL = ModelConfig()


def committed(target: str) -> dict[tuple[str, str], list[dict[str, str]]]:
    """The rows of a committed table by kernel and token count."""
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for section in (DOCS / "kernels" / f"{target}.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title, *lines = section.splitlines()
        kernel, counts = title.split(", tokens ")
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
        assert tuple(cells[0]) == COLUMNS
        for tokens in counts.split(", "):
            found[kernel, tokens] = [dict(zip(COLUMNS, line, strict=True)) for line in cells[2:]]
    return found


def shown(tiling: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in tiling.items())


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_the_committed_table_is_complete_and_every_default_usable(target: Target) -> None:
    """The default, which runs unless something is tuned, neither spills nor exceeds the shared memory."""
    rows = committed(target.name)
    cells = {(k.name, label(problem)): (k, problem) for k in KERNELS.values() for problem in problems(k, FULL)}
    assert rows.keys() == cells.keys()
    for cell, here in rows.items():
        kernel, problem = cells[cell]
        tilings = kernel.tilings(target, problem)
        again = "write the table again: python -m benchmarks.kernel_table"
        assert [r["tiling"] for r in here] == [shown(tiling) for tiling in tilings], again
        assert here[0]["outcome"] == USABLE
        for r in here:
            fits = all(int(count) <= target.shared_bytes for count in r["shared"].split("+") if count)
            spills = set(r["spilled"]) - set("0+") != set()
            assert (r["outcome"] == USABLE) <= (fits and not spills)


def test_the_summary_names_the_version_of_the_tables() -> None:
    text = (DOCS / "kernels.md").read_text(encoding="utf-8")
    version = re.search(r"Triton (\S+)\.\n", text.split(BEGIN)[1])
    assert version is not None
    for target in TARGETS:
        assert f"with triton {version[1]}:" in (DOCS / "kernels" / f"{target}.md").read_text(encoding="utf-8")


# One kernel per target, each of which is quick to compile.
AGAIN = [("embed", "sm_90"), ("residual_norm", "sm_100"), ("attention", "gfx942"), ("experts", "gfx950")]


@pytest.mark.parametrize(("kernel", "target"), AGAIN)
def test_compiling_again_gives_the_committed_figures(kernel: str, target: str, compilers: Compilers) -> None:
    problem = problem_of(1, FULL)
    job = Job(kernel, target, problem, DTYPE, KERNELS[kernel].tilings(TARGETS[target], problem)[0])
    ((_, result),) = compilers.compile([job])
    assert result.usable, result.outcome
    here = committed(target)[kernel, "1"][0]
    if f"with triton {triton_version()}:" in (DOCS / "kernels" / f"{target}.md").read_text(encoding="utf-8"):
        assert list(row(result)[3:]) == list(here.values())


@pytest.fixture(scope="module")
def compilers() -> Iterator[Compilers]:
    with Compilers(workers=1) as found:
        yield found


class Trap:
    """What ends or stalls the process that unpickles it, as a crash or a hang of a compiler would."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def trapped(call: Callable[..., Any], *arguments: Any) -> Job:
    return Job("embed", "sm_90", problem_of(1, FULL), DTYPE, {"BLOCK": Trap(call, *arguments)})  # type: ignore[dict-item]


def test_a_compiler_that_crashes_costs_one_tiling() -> None:
    harmless = Job("embed", "sm_90", problem_of(1, FULL), DTYPE, {})
    with Compilers(workers=1) as fresh:
        results = dict(fresh.compile([trapped(os.abort), harmless]))
    assert results[0].outcome == f"the compiler crashed (exit code {-signal.SIGABRT})"
    assert results[1].outcome.startswith("KeyError")  # an error of the wrapper or the compiler is an outcome, too
    assert not any(result.usable for result in results.values())


def test_a_compiler_that_hangs_is_ended() -> None:
    with Compilers(workers=1, seconds=0.5) as fresh:
        ((_, result),) = fresh.compile([trapped(time.sleep, 600)])
    assert result.outcome == "the compiler took more than 0.5 s"


def test_usable_tilings_keep_their_order(compilers: Compilers) -> None:
    kernel, target, problem = KERNELS["embed"], TARGETS["gfx942"], problem_of(272, FULL)
    usable = compilers.usable(kernel, target, problem, DTYPE)
    assert usable == [tiling for tiling in kernel.tilings(target, problem) if tiling in usable]
    assert usable


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        (Program("f", 255, 0, 0, 65_536, {}), USABLE),
        (Program("f", 255, 0, 8, 65_536, {}), "spills 8 B per thread"),
        (Program("f", 32, 0, 0, 65_537, {}), "needs 65537 B of shared memory, gfx942 has 65536"),
    ],
)
def test_what_spills_or_does_not_fit_is_not_usable(program: Program, outcome: str) -> None:
    fine = Program("g", 32, 0, 0, 0, {})
    assert compiler.judge([fine, program], TARGETS["gfx942"]) == outcome


class Device:
    """A driver that stands for a GPU, as far as the JIT asks it before it compiles."""

    def __init__(self, target: Target, gpu: Any) -> None:
        self.get_current_device = lambda: target.name
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: gpu


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("name", KERNELS)
def test_launches_are_specialised_as_the_jit_does(name: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled from meta tensors is what the JIT would compile, and cache, when it is given real ones."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    kernel, problem = KERNELS[name], ODD_PROBLEMS[2]
    tiling = kernel.tilings(target, problem)[0]
    with recording() as real:
        kernel.triton()(**kernel.inputs(problem, torch.bfloat16, "cpu"), tiling=tiling)
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(JITFunction, "_do_compile", lambda self, *given: asked.append(given))
    for launch, seen in zip(launches(kernel, problem, "bfloat16", tiling), real, strict=True):
        source, gpu, options = specialise(launch, target)
        monkeypatch.setattr(driver, "_active", Device(target, gpu))
        given = {**seen.arguments, **seen.constants, **constants(seen.tiling), **target.options(seen.tiling)}
        launch.function.run(**given, grid=seen.grid, warmup=True)
        _, signature, _, constexprs, jit_options, attributes, _ = asked.pop()
        assert type(source)(launch.function, signature, constexprs, attributes).hash() == source.hash()
        assert jit_options.__dict__ == options


@pytest.mark.parametrize("target", [TARGETS["gfx942"], replace(TARGETS["sm_90"], shared_bytes=101_376)])
def test_a_check_compiles_ahead_what_the_jit_will_find(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the device's own architecture only: here, for MI300X, and not for a smaller relative of H100."""
    asked: list[Job] = []
    monkeypatch.setattr("runtime.kernels.selection.device_target", lambda device: target)
    monkeypatch.setattr(
        Compilers,
        "compile",
        lambda self, jobs: ((n, asked.append(j) or Compiled(j, (), "")) for n, j in enumerate(jobs)),
    )
    count = compile_ahead([KERNELS["embed"]], "cuda", "default")
    assert count == len(asked)
    wanted = [(problem, dtype) for _, problem, dtype, _ in plan([KERNELS["embed"]], "cuda", "default")]
    assert [(job.problem, job.dtype) for job in asked] == (wanted if target.name == "gfx942" else [])


def test_what_lies_within_two_gigabytes_is_said_on_amd() -> None:
    """The embedding is 1.07 GB in bfloat16, and twice that in fp32."""
    kernel, problem = KERNELS["embed"], problem_of(16, FULL)
    for target, dtype, said in (
        ("gfx942", "bfloat16", True),
        ("gfx942", "float32", False),
        ("sm_90", "bfloat16", False),
    ):
        (launch,) = launches(kernel, problem, dtype, kernel.tilings(TARGETS[target], problem)[0])
        source, _, _ = specialise(launch, TARGETS[target])
        place = launch.function.arg_names.index("table")
        assert (["tt.pointer_range", 32] in source.attrs[(place,)]) == said
        assert ["tt.divisibility", 16] in source.attrs[(place,)]


@pytest.mark.parametrize("name", KERNELS)
def test_wrappers_start_kernels_without_reading_values(name: str) -> None:
    """With meta tensors, which have none: for every problem, dtype and target, and with few launches."""
    kernel = KERNELS[name]
    for problem in (*ODD_PROBLEMS, *full_problems(FULL)):
        for target in (TARGETS["sm_90"], TARGETS["gfx942"]):
            tiling = kernel.tilings(target, problem)[0]
            for dtype in DTYPE_BYTES:
                assert 1 <= len(launches(kernel, problem, dtype, tiling)) <= 4


@pytest.mark.parametrize("name", KERNELS)
def test_tilings_are_distinct_and_differ_by_vendor(name: str) -> None:
    for tokens in (1, 2, 17, 64, 272, 1088, 2048, 2176):
        problem, sets = problem_of(tokens, FULL), {}
        for target in TARGETS.values():
            found = KERNELS[name].tilings(target, problem)
            sets[target.backend] = {shown(tiling) for tiling in found}
            assert len(sets[target.backend]) == len(found) >= 1
            for tiling in found:
                assert tiling["num_warps"] <= target.max_warps
                assert all(isinstance(value, int) and value >= 0 for value in tiling.values())
                options = {option for option in tiling if option.islower()}
                assert options <= {*OPTIONS, *(AMD_OPTIONS if target.backend == "hip" else ())}
        assert sets["cuda"] != sets["hip"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = ridgepoint.main(["kernels", *arguments])
    return code, *capsys.readouterr()


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Compiled] = []
    compile_all = compiler.compile_all
    monkeypatch.setattr(compiler, "compile_all", lambda *given: found or found.extend(compile_all(*given)) or found)
    options = ["compile", "--target", "gfx942", "--kernel", "embed", "--tokens", "1,16", "--model", "zaya-nano"]
    code, out, _ = run(capsys, *options, "--json")
    results = json.loads(out)["results"]
    assert code == 0
    assert {(r["kernel"], r["target"], r["tokens"]) for r in results} == {("embed", "gfx942", n) for n in (1, 16)}
    assert all(r["outcome"] == USABLE and r["programs"][0]["registers"] > 0 for r in results)
    code, out, _ = run(capsys, *options)
    lines = out.splitlines()
    assert lines[0].startswith(f"triton {triton_version()}, zaya-nano, bfloat16")
    assert lines[-1] == f"{len(results)} of {len(results)} usable"
    assert len(lines) == len(results) + 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compile", "--target", "sm_61"], "unknown target 'sm_61'; known: gfx942, gfx950, sm_100, sm_90"),
        (["compile", "--kernel", "softmax"], "unknown kernel 'softmax'; known: attention, cca,"),
        (["compile", "--dtype", "int8"], "unknown dtype 'int8'; known: bfloat16, float16, float32"),
        (["compile", "--tokens", "0"], "tokens >= 1 must hold, but got 0"),
        (["check", "--kernel", "softmax"], "unknown kernel 'softmax'; known: attention, cca,"),
        (["compile", "--context", "-1"], "context >= 0 must hold, but got -1"),
        (["check", "--device", "tpu"], "unknown device 'tpu'; known: cpu, cuda, cuda:N"),
        (["check", "--device", "cuda:x"], "unknown device 'cuda:x'; known: cpu, cuda, cuda:N"),
        (["check", "--device", "cuda:-1"], "unknown device 'cuda:-1'"),
        (["check", "--device", "cuda:"], "unknown device 'cuda:'"),
        (["check", "--device", "cuda:9"], "no device cuda:9: torch sees 1 CUDA or ROCm devices here"),
        (["check", "--device", "cuda", "--seconds", "0"], "seconds > 0 must hold, but got 0.0"),
        (["check", "--device", "cuda", "--seconds", "nan"], "seconds > 0 must hold, but got nan"),
    ],
)
def test_bad_options_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    """On a machine with a GPU too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, out, err = run(capsys, *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err


@pytest.mark.parametrize("name", ["batch", "slots", "context"])
def test_a_problem_has_tokens(name: str) -> None:
    least = 0 if name == "context" else 1
    replace(ODD_PROBLEMS[0], **{name: least})
    with pytest.raises(UserError, match=f"{name} >= {least} must hold, but got {least - 1}"):
        replace(ODD_PROBLEMS[0], **{name: least - 1})


@pytest.mark.parametrize("command", ["compile", "check"])
def test_without_triton_one_line_says_so(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.kernels.check.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    code, _, err = run(capsys, command)
    assert code == 2
    assert err == "ridgepoint: the kernels need triton, which is not installed: pip install triton\n"


def test_the_list_names_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", "--json")
    document = json.loads(out)
    assert code == 0
    assert [entry["kernel"] for entry in document["kernels"]] == list(KERNELS)
    assert all(entry["does"] and entry["operator"] for entry in document["kernels"])
    assert document["targets"] == list(TARGETS)
