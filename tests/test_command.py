"""The command: what a user sees when all goes well, and the one line when it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import ridgepoint
from hardware.files import UserError

ROOT = Path(__file__).parents[1]
PREDICT = {
    "--model": "zaya1-8b",
    "--hardware": "h100-sxm",
    "--batch": "16",
    "--context": "2048",
    "--sampler": "two_forward",
    "--draft-tokens": "16",
    "--acceptance-length": "6.8",
}


def predict(**changes: str) -> list[str]:
    options = PREDICT | {"--" + name.replace("_", "-"): value for name, value in changes.items()}
    return ["predict", *(word for pair in options.items() for word in pair)]


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run the command; it must fail with code 2, one line on stderr and nothing on stdout. Returns the line."""
    assert ridgepoint.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ridgepoint: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": "gpt-17"}, ["gpt-17", "zaya1-8b", "zaya-nano"]),
        ({"hardware": "abacus"}, ["abacus", "h100-sxm", "mi300x"]),
        ({"sampler": "psychic"}, ["psychic", "autoregressive", "two_forward"]),
        ({"draft_tokens": "0"}, ["draft_tokens >= 1", "0"]),
        ({"mixing_weight": "1.5"}, ["0 <= mixing_weight <= 1", "1.5"]),
        ({"batch": "0"}, ["batch", "0"]),
        ({"batch": "many"}, ["--batch", "many"]),
        ({"context": "-1"}, ["context", "-1"]),
        ({"acceptance_length": "0.5"}, ["acceptance_length", "0.5"]),
        ({"acceptance_length": "18"}, ["acceptance_length", "17", "18"]),
        ({"colour": "red"}, ["--colour", "ridgepoint predict --help"]),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_bad_input_is_one_line(changes: dict[str, str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, predict(**changes))
    for part in parts:
        assert part in line.replace("draft-tokens", "draft_tokens").replace("acceptance-length", "acceptance_length")


def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "prophesy" in fails(capsys, ["prophesy"])
    assert "--model" in fails(capsys, ["predict"])


def test_a_result_is_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert ridgepoint.main([*predict(), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)["step_seconds"] > 0


def test_without_arguments_it_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert ridgepoint.main([]) == 2
    out, err = capsys.readouterr()
    assert "predict" in out
    assert err == ""


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whether the distribution is installed or the files lie in a checkout."""

    def not_installed(_: str) -> str:
        raise ridgepoint.metadata.PackageNotFoundError

    assert ridgepoint.main(["--version"]) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(ridgepoint.metadata, "version", not_installed)
    assert ridgepoint.main(["--version"]) == 0
    assert capsys.readouterr().out == first == f"ridgepoint {ridgepoint.version()}\n"


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root command replaced by one whose commands raise."""
    app = typer.Typer()
    errors = {
        "user": UserError("a must hold,\n  but got b"),
        "interrupt": KeyboardInterrupt(),
        "bug": ZeroDivisionError("division by zero"),
    }
    for name, error in errors.items():

        def command(error: BaseException = error) -> None:
            raise error

        app.command(name)(lambda command=command: command())
    monkeypatch.setattr(ridgepoint, "command", lambda: typer.main.get_command(app))


@pytest.mark.usefixtures("raising")
def test_expected_failures_are_one_line_and_bugs_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, ["user"]) == "ridgepoint: a must hold, but got b\n"
    assert ridgepoint.main(["interrupt"]) == 130
    assert capsys.readouterr().err == "ridgepoint: interrupted\n"
    with pytest.raises(ZeroDivisionError):
        ridgepoint.main(["bug"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ridgepoint", "predict", "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.parametrize("arguments", [["--version"], predict(), ["hardware", "list", "--json"]])
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "ridgepoint", *arguments], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert run.stderr == "ridgepoint: cannot write the output: No space left on device\n"
    assert run.returncode == 2


def test_a_closed_output_is_no_error() -> None:
    line = [sys.executable, "-m", "ridgepoint", *predict()]
    run = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *line], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["--help"], [*predict(), "--json"]], ids=["help", "predict"])
def test_it_starts_fast(arguments: list[str]) -> None:
    """Under a second of processor time (the machine may be busy) from a new interpreter; no slow library is loaded."""
    program = (
        f"import sys, time, ridgepoint; ridgepoint.main({arguments!r})\n"
        "slow = {'torch', 'triton', 'transformers', 'optuna', 'sqlalchemy', 'streamlit', 'plotly', 'pandas', 'scipy'}\n"
        "print(time.process_time(), *sorted(slow & set(sys.modules)), file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout
    seconds, *loaded = run.stderr.split()
    assert loaded == []
    assert float(seconds) < 1.0
