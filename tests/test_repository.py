"""Laws of the repository: who may import whom, what is packaged, what every command offers."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import ridgepoint

ROOT = Path(__file__).parents[1]
PACKAGES = ("autotune", "dashboards", "hardware", "perfmodel", "runtime")
SKIPPED_FOLDERS = {"build", "dist", "runs", "demo-out", "__pycache__"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# What a package may import besides itself and third parties; "x" stands for x and everything below it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "hardware": (),
    "runtime": ("hardware",),
    "perfmodel": (
        "hardware",
        "runtime.config",
        "runtime.deployment",
        "runtime.levels",
        "runtime.measurement",
        "runtime.routing",
    ),
    "autotune": ("hardware", "runtime", "perfmodel"),
    "dashboards": ("hardware", "runtime", "perfmodel", "autotune"),
}
KERNEL_PARTS = "acceptance attention cca experts grouped_experts native residual_norm router".split()
# Modules whose import may load a slow library. Everything else imports it inside the functions that need it.
TORCH_FREE_RUNTIME = {
    "runtime",
    "runtime.bench_lines",
    "runtime.cli",
    "runtime.config",
    "runtime.conversion.cli",
    "runtime.deployment",
    "runtime.device",
    "runtime.kernels",
    *(f"runtime.kernels.{name}" for name in KERNEL_PARTS),
    "runtime.kernels.check",
    "runtime.kernels.cli",
    "runtime.kernels.compiler",
    "runtime.kernels.problem",
    "runtime.kernels.registry",
    "runtime.kernels.target",
    "runtime.levels",
    "runtime.measurement",
    "runtime.options",
    "runtime.routing",
    "runtime.statistics",
}
MAY_LOAD: dict[str, tuple[str, ...]] = {
    "torch": ("runtime.*", "autotune.local", "autotune.runner"),  # autotune's: what runs trials on this device
    "triton": ("runtime.kernels.*",),
    "transformers": (),
    "optuna": ("autotune.*",),
    "streamlit": (
        *("dashboards.app", "dashboards.asgi", "dashboards.frame", "dashboards.source_menu", "dashboards.sweep_panel"),
        "dashboards.views.*",
    ),
    "plotly": ("dashboards.*",),
}
# Commands without --json, each because it prints no result.
NO_RESULT = {"dashboard": "serves pages until it is stopped"}


def files(*suffixes: str, under: str = ".") -> list[Path]:
    """Files of the checkout, sorted, without environments, caches and build products."""
    found = []
    for folder, folders, names in os.walk(ROOT / under):
        folders[:] = [
            f
            for f in folders
            if f not in SKIPPED_FOLDERS and not f.endswith(".egg-info") and (not f.startswith(".") or f == ".ci")
        ]
        found += [Path(folder) / n for n in names if not suffixes or n.endswith(suffixes)]
    return sorted(found)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for package in PACKAGES for p in files(".py", under=package)}


def imported(tree: ast.AST, *, functions: bool) -> Iterator[str]:
    """Names of the modules a parsed module imports; with or without those imported only inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "write imports in full: relative ones hide who imports whom"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module
        elif functions or not is_late(node):
            yield from imported(node, functions=functions)


def is_late(node: ast.AST) -> bool:
    """Whether the code below runs only later (a function) or never (for the type checker)."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test).endswith("TYPE_CHECKING")
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


@cache
def imports_of(module: str, *, functions: bool) -> set[str]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return set(imported(tree, functions=functions))


def is_below(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


@cache
def loads(module: str) -> frozenset[str]:
    """Every module loaded when `module` is imported, local ones followed; `safetensors.torch` counts as torch."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        parts = name.split(".")
        for whole in (".".join(parts[: n + 1]) for n in range(len(parts))):
            if whole in seen:
                continue
            seen.add(whole)
            if whole in MODULES:
                waiting += imports_of(whole, functions=False)
    return frozenset(seen | ({"torch"} if "safetensors.torch" in seen else set()))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    package = module.split(".")[0]
    allowed = (package, *MAY_IMPORT[package])
    for name in imports_of(module, functions=True):
        local = name.split(".")[0] in {*PACKAGES, "ridgepoint", "tests", "benchmarks"}
        assert not local or any(is_below(name, a) for a in allowed), f"{module} must not import {name}"


@pytest.mark.parametrize("library", sorted(MAY_LOAD))
def test_slow_libraries_are_loaded_where_they_are_needed(library: str) -> None:
    for module in MODULES:
        if library in loads(module):
            allowed = any(fnmatch.fnmatch(module, pattern) for pattern in MAY_LOAD[library])
            allowed = allowed and module.split(".")[-1] != "cli" and module not in TORCH_FREE_RUNTIME
            assert allowed, f"importing {module} loads {library}: import it inside the function that needs it"


def test_the_torch_free_modules_are_so_when_imported() -> None:
    """The static reading above, against Python itself."""
    free = sorted(m for m in MODULES if not loads(m) & set(MAY_LOAD))
    assert {"hardware.files", "perfmodel.prediction", *TORCH_FREE_RUNTIME} <= set(free)
    program = (
        "import importlib, json, sys\n"
        f"for name in {free!r}: importlib.import_module(name)\n"
        f"print(json.dumps(sorted(set({sorted(MAY_LOAD)!r}) & set(sys.modules))))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == []


def test_every_package_on_disk_is_listed() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == {module_name(p) for package in PACKAGES for p in files("__init__.py", under=package)}
    folders = {module_name(p.parent / "__init__.py") for p in MODULES.values()}
    assert folders == listed, "a folder with modules lacks its __init__.py"


def test_every_data_file_is_packaged() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:
        packaged = {p for pattern in patterns.get(package, []) for p in (ROOT / package).glob(pattern)}
        for path in files(under=package):
            if path.suffix not in {".py", ".pyc"} and path.name != "py.typed":
                assert path in packaged, f"{path.relative_to(ROOT)} matches no package-data pattern of pyproject.toml"
        assert (ROOT / package / "py.typed").exists()


def test_every_dependency_is_pinned() -> None:
    """constraints.txt holds one exact version of each, inside the range that pyproject.toml allows."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    assert versions["torch"] == "2.13.0"
    extras = PROJECT["project"]["optional-dependencies"].values()
    for text in [*PROJECT["project"]["dependencies"], *(d for extra in extras for d in extra)]:
        requirement = Requirement(text)
        version = versions[requirement.name.lower()]
        assert version in requirement.specifier, f"{requirement}: constraints.txt has {version}"


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_installs_only_pinned_versions(target: str, tmp_path: Path) -> None:
    # Under `make test` this make is a nested one, which would announce its folders on stdout.
    command = ["make", "--dry-run", "--no-print-directory", target, f"VENV={tmp_path / 'venv'}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    installs = [line for line in run.stdout.splitlines() if "pip install" in line]
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)
    assert f"{tmp_path / 'venv'}/bin/" in run.stdout.splitlines()[-1]  # and runs in the environment it made


@pytest.mark.parametrize("path", files(".yaml", ".yml"), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_yaml_parses(path: Path) -> None:
    assert yaml.safe_load(path.read_text(encoding="utf-8")) is not None


def test_no_file_names_a_machine() -> None:
    patterns = ["/wor" + "k/", r"\.\./" + "shared", "/op" + "t/venv", "/roo" + "t/", "bash_" + "jobs"]
    forbidden = re.compile("|".join(patterns))
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = forbidden.search(text)
        assert not found, f"{path.relative_to(ROOT)} names {found and found.group()!r}"


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group of the command line with its path."""
    command = command or ridgepoint.command()
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


COMMANDS = dict(commands())


@pytest.mark.parametrize("path", sorted(COMMANDS), ids=lambda p: " ".join(p) or "ridgepoint")
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    assert command.help and command.help.strip()
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{' '.join(path)}: {parameter.name} lacks a help text"
    options = {option for parameter in command.params for option in parameter.opts}
    if not hasattr(command, "commands") and path[-1] not in NO_RESULT:
        assert "--json" in options, f"{' '.join(path)} prints a result and must offer --json"


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def documented_commands() -> list[str]:
    """The `ridgepoint ...` lines in the README's code blocks, continued lines joined."""
    lines = "".join(readme_blocks("bash")).replace("\\\n", " ").splitlines()
    return sorted({line.strip() for line in lines if line.strip().startswith("ridgepoint ")})


def test_documented_commands_exist() -> None:
    lines = documented_commands()
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        path: tuple[str, ...] = ()
        while words and (*path, words[0]) in COMMANDS:
            path = (*path, words.pop(0))
        assert path, f"unknown command: {line}"
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        parameters = [p for p in COMMANDS[path].params if p.opts[0].startswith("-")]
        assert given <= {option for parameter in parameters for option in parameter.opts}, line
        assert all(given & set(p.opts) for p in parameters if p.required), f"lacks a required option: {line}"


def test_documented_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = readme_blocks("python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "02469" in capsys.readouterr().out  # the model sorts the digits of the README's prompt


CI_TESTS = """
import pytest

def test_runs(): pass
def test_without_gpu(): pytest.skip("needs a GPU: none here")
@pytest.mark.xfail(strict=True)
def test_expected(): assert False
def test_lost(): pytest.skip("no browser")
"""


@pytest.mark.parametrize(
    ("ci", "closing"),
    [("1", "1 failed, 1 passed, 1 skipped, 1 xfailed, 1 error"), ("", "1 passed, 3 skipped, 1 xfailed")],
)
def test_ci_turns_lost_tests_into_failures(
    ci: str, closing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skips inside a test and of a whole file fail in CI; what needs a GPU may be skipped anywhere."""
    (tmp_path / "test_some.py").write_text(CI_TESTS)
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.importorskip('no_such_library')\n")
    monkeypatch.setenv("RIDGEPOINT_CI", ci)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "--rootdir", str(tmp_path), str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert closing in run.stdout.splitlines()[-1]
    assert run.returncode == (1 if ci else 0)
