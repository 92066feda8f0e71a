"""`ridgepoint predict` and `sweep` as a user calls them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ridgepoint
from runtime.config import SAMPLER_NAMES

ROOT = Path(__file__).parents[1]
PREDICT = (
    "predict --model zaya1-8b --hardware h100-sxm --batch 16 --context 2048 --sampler two_forward --draft-tokens 16 "
    "--acceptance-length 6.8"
).split()


def test_predict_in_a_second_without_torch() -> None:
    """From the shell: one JSON document, in less than a second (best of three: the machine may be busy), torch-free."""
    program = (
        f"import sys, ridgepoint; code = ridgepoint.main({[*PREDICT, '--json']!r})\n"
        "print(sorted({'torch', 'scipy', 'pandas'} & set(sys.modules)), file=sys.stderr); sys.exit(code)\n"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
        assert run.stderr == "[]\n"
    assert min(seconds) < 1.0
    document = json.loads(run.stdout)
    wanted = "step_seconds bound_step_seconds tokens_per_second speedup_over_autoregressive bound experts_per_layer"
    assert {*wanted.split(), "operators"} <= set(document)
    assert sum(op["seconds"] for op in document["operators"]) == pytest.approx(document["step_seconds"])
    assert document["workload"]["dtype"] == "bfloat16"


def test_predict_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert ridgepoint.main(PREDICT) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in ("experts", "verify", "tokens/s", "speedup", "roofline"):
        assert word in out


def test_a_histogram_is_another_form_of_the_length(capsys: pytest.CaptureFixture[str]) -> None:
    base = [word for word in PREDICT if word not in ("--acceptance-length", "6.8")]
    histogram = ",".join(["0"] * 5 + ["1", "4"])  # a fifth of the steps accept five drafts, the others six
    documents = []
    for form in (["--acceptance-length", "6.8"], ["--acceptance-histogram", histogram]):
        assert ridgepoint.main([*base, *form, "--json"]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0]["tokens_per_second"] == pytest.approx(documents[1]["tokens_per_second"])
    for wrong in ("a,b", "", "1,inf", "1,nan"):
        assert ridgepoint.main([*base, "--acceptance-histogram", wrong, "--json"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--context", "131060"], ["max_position_embeddings", "131072"]),
        (["--dtype", "float64"], ["float64", "bfloat16"]),
        (["--expert-coverage", "guess"], ["guess", "uniform", "correlated"]),
        (["--engine", "warp"], ["warp", "ridgepoint-eager"]),
        (["--batch", "100000"], ["fit", "80.0 GB"]),
    ],
)
def test_refusals_are_one_line(extra: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ridgepoint.main([*PREDICT, *extra]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "grid.csv"
    arguments = (
        "sweep --model zaya1-8b --hardware mi300x --batch 1,16 --context 1024,8192 --draft-tokens 4,16 "
        "--acceptance-rate 0.85"
    ).split()
    assert ridgepoint.main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 8
    assert ridgepoint.main([*arguments, "--out", str(path)]) == 0
    capsys.readouterr()
    with path.open() as stream:
        written = list(csv.DictReader(stream))
    assert [float(r["speedup_over_autoregressive"]) for r in written] == [
        r["speedup_over_autoregressive"] for r in rows
    ]
    assert ridgepoint.main(arguments) == 0
    assert "speedup" in capsys.readouterr().out
    assert ridgepoint.main([*arguments, "--batch", "1,x"]) == 2


OPTIONS = {
    "autoregressive": [],
    "two_forward": ["--acceptance-length", "4"],
    "single_forward": ["--levels", "0,4,7,11", "--acceptance-length", "4"],
    "denoising": ["--steps", "4", "--threshold", "0.9", "--steps-per-block", "2.5"],
}
WHERE = ["--model", "zaya1-8b", "--hardware", "h100-sxm", "--batch", "2", "--context", "1024"]


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_sampler_has_its_options(sampler: str, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [*WHERE, "--sampler", sampler, *OPTIONS[sampler]]
    assert ridgepoint.main(["predict", *chosen, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    forwards = sum(f["times"] for f in document["forwards"])
    assert document["tokens_per_forward"] == pytest.approx(document["acceptance_length"] / forwards)
    assert ridgepoint.main(["predict", *chosen]) == 0
    assert f"{document['tokens_per_forward']:.2f} tokens a forward" in capsys.readouterr().out
    assert ridgepoint.main(["sweep", *chosen, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["tokens_per_second"] == pytest.approx(document["tokens_per_second"])


def test_a_verified_block_and_dense_levels(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["predict", *WHERE, "--draft-tokens", "3", "--acceptance-histogram", "1,2,3", "--json"]
    documents = {}
    for name, options in {
        "dense": ["--sampler", "single_forward", "--levels", "dense"],
        "all": ["--sampler", "single_forward"],
        "sparse": ["--sampler", "single_forward", "--levels", "0"],
        "verified": ["--sampler", "denoising", "--steps", "3", "--verify"],
    }.items():
        assert ridgepoint.main([*chosen, *options]) == 0
        documents[name] = json.loads(capsys.readouterr().out)
    assert documents["dense"] == documents["all"]
    assert documents["sparse"]["acceptance_length"] < documents["dense"]["acceptance_length"]
    assert documents["verified"]["acceptance_length"] == pytest.approx(1 + 8 / 6)
    assert [f["times"] for f in documents["verified"]["forwards"]] == [3.0, 1.0]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--sampler", "denoising", "--acceptance-length", "7"], "without verify keeps what it drafts"),
        (["--sampler", "denoising", "--steps", "3", "--steps-per-block", "2"], "--threshold"),
        (["--sampler", "denoising", "--steps", "3", "--threshold", "0.5", "--steps-per-block", "5"], "<= 3"),
        (["--sampler", "denoising", "--steps", "17"], "denoising_steps"),
        (["--sampler", "single_forward", "--levels", "1,2", "--acceptance-length", "3"], "ascend from 0"),
        (["--sampler", "single_forward", "--levels", "all", "--acceptance-length", "3"], "numbers with commas"),
        (["--sampler", "two_forward", "--levels", "dense", "--acceptance-length", "3"], "single_forward's"),
        (["--sampler", "two_forward", "--verify", "--acceptance-length", "3"], "verify is a setting of denoising"),
        (["--sampler", "magic"], "known: autoregressive, denoising, single_forward, two_forward"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    options: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ridgepoint.main(["predict", *WHERE, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and part in err
