"""`ridgepoint predict`, `sweep`, `explain` and `breakeven` as a user calls them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

import perfmodel.cli
import ridgepoint
from runtime.config import SAMPLER_NAMES

ROOT = Path(__file__).parents[1]
PREDICT = (
    "predict --model zaya1-8b --hardware h100-sxm --batch 16 --context 2048 --sampler two_forward --draft-tokens 16 "
    "--acceptance-length 6.8"
).split()


def test_predict_without_slow_libraries() -> None:
    """From the shell: one JSON document, and nothing slow imported (`benchmarks.sweep_speed` times it)."""
    program = (
        f"import sys, ridgepoint; code = ridgepoint.main({[*PREDICT, '--json']!r})\n"
        "print(sorted({'torch', 'scipy', 'pandas'} & set(sys.modules)), file=sys.stderr); sys.exit(code)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stderr == "[]\n"
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
        (["--batch", "100000"], ["76.4 GB", "fits there"]),
        (["--batch", "0"], ["batch >= 1", "0"]),
        (["--context", "0"], ["context >= 1", "0"]),
        (["--hardware", "h1000"], ["h1000", "h100-sxm", "mi300x"]),
        (["--model", "zaya9"], ["zaya9", "zaya1-8b"]),
        (["--weights", "fp3"], ["fp3", "fp8"]),
        (["--weights", "fp8", "--dtype", "float32"], ["bfloat16", "float32"]),
        (["--tensor-parallel", "3"], ["3 devices", "8"]),
        (["--tensor-parallel", "64"], ["64"]),
        (["--expert-parallel", "0"], ["expert >= 1"]),
        (["--acceptance-length", "18"], ["17", "18"]),
    ],
)
def test_refusals_are_one_line(extra: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ridgepoint.main([*PREDICT, *extra]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(part in err for part in parts), err


GRID = (
    "sweep --model zaya1-8b --hardware mi300x --batch 1,16 --context 1024,8192 --draft-tokens 4,16 "
    "--acceptance-rate 0.85"
).split()


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "grid.csv"
    assert ridgepoint.main([*GRID, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 8
    assert ridgepoint.main([*GRID, "--out", str(path)]) == 0
    capsys.readouterr()
    with path.open() as stream:
        written = list(csv.DictReader(stream))
    assert [float(r["speedup_over_autoregressive"]) for r in written] == [
        r["speedup_over_autoregressive"] for r in rows
    ]
    assert ridgepoint.main(GRID) == 0
    assert "speedup" in capsys.readouterr().out


GRID_REFUSALS = [
    (["--batch", "1,x"], ["--batch", "1,x"]),
    (["--batch", "1,0"], ["batch", ">= 1"]),
    (["--context", ""], ["--context"]),
    (["--context", "200000"], ["131072"]),
    (["--hardware", "mi300x,tpu"], ["tpu", "mi300x"]),
    (["--hardware", ","], ["--hardware"]),
    (["--sampler", "two_forward,magic"], ["magic", "two_forward"]),
    (["--sampler", "two_forward", "--levels", "0,4"], ["levels", "single_forward"]),
    (["--sampler", "two_forward,denoising", "--levels", "0,4"], ["--levels", "single_forward"]),
    (["--sampler", "single_forward", "--levels", "0,8"], ["levels must", "4"]),
    (["--acceptance-length", "3"], ["one"]),
]
REFUSALS = [(command, *case) for case in GRID_REFUSALS for command in ("sweep", "breakeven")] + [
    ("sweep", ["--sampler", "autoregressive"], ["no acceptance"]),
    ("sweep", ["--out", "grid.xlsx"], [".csv", ".parquet", "grid.xlsx"]),
    ("breakeven", ["--sampler", "autoregressive"], ["compares with"]),
]


@pytest.mark.parametrize(("command", "extra", "parts"), REFUSALS)
def test_grids_refuse_in_one_line(
    command: str, extra: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ridgepoint.main([command, *GRID[1:], *extra, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_a_sweep_over_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Devices x (autoregressive once, two_forward, two level sets); a Parquet file holds the same rows."""
    path = tmp_path / "grid.parquet"
    samplers = ["--sampler", "autoregressive,two_forward,single_forward", "--levels", "dense", "--levels", "0,2"]
    assert ridgepoint.main([*GRID, *samplers, "--hardware", "mi300x,h100-sxm", "--out", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = document["rows"]
    assert len(rows) == 2 * 4 * (1 + 2 + 2 + 2)
    assert pyarrow.parquet.read_table(path).to_pylist() == rows
    single = {(r["hardware"], r["batch"], r["context"]): r for r in rows if r["sampler"] == "autoregressive"}
    for r in rows:
        base = single[r["hardware"], r["batch"], r["context"]]
        assert r["autoregressive_step_seconds"] == pytest.approx(base["step_seconds"])
        assert r["speedup_over_autoregressive"] == pytest.approx(r["tokens_per_second"] / base["tokens_per_second"])
        assert r["dollars_per_million_tokens"] * r["speedup_over_autoregressive"] == pytest.approx(
            base["dollars_per_million_tokens"]
        )
    assert {r["draft_tokens"] for r in rows if r["sampler"] == "autoregressive"} == {0}
    assert {r["setting"] for r in rows} == {
        "autoregressive",
        "two_forward",
        "single_forward",
        "single_forward levels 0,2",
    }
    assert "estimates" in document["economics"]


def test_quantised_and_divided_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    """Narrower weights and more devices make a step shorter; what is served says so; a device-second costs the same."""

    def run(*extra: str) -> dict[str, Any]:
        chosen = ["predict", "--model", "zaya1-8b", "--hardware", "h100-sxm", "--engine", "ideal-graph", *extra]
        assert ridgepoint.main([*chosen, "--batch", "32", "--context", "8000", "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    whole, narrow, cached = run(), run("--weights", "fp8"), run("--cache-dtype", "fp8")
    two = run("--tensor-parallel", "2")
    assert narrow["step_seconds"] < whole["step_seconds"] > cached["step_seconds"]
    assert whole["bound_step_seconds"] > two["bound_step_seconds"] > whole["bound_step_seconds"] / 2
    assert (whole["precision"], narrow["precision"]) == ("bfloat16", "fp8, bfloat16 cache")
    assert two["parallel"] == {"tensor": 2, "expert": 1}
    assert "collective" in {op["name"] for op in two["operators"]} - {op["name"] for op in whole["operators"]}
    for found, devices in ((whole, 1), (two, 2)):
        power = found["joules_per_million_tokens"] * found["tokens_per_second"] / 1e6
        assert power == pytest.approx(700 * devices)
    experts = run("--expert-weights", "mxfp4")
    assert experts["precision"].startswith("bfloat16, mxfp4 experts")
    assert experts["step_seconds"] < whole["step_seconds"]


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["explain", *PREDICT[1:]]
    assert ridgepoint.main([*chosen, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert sum(o["share"] for o in document["operators"]) == pytest.approx(1)
    assert ridgepoint.main([*PREDICT, "--json"]) == 0
    p = json.loads(capsys.readouterr().out)
    assert document["step_seconds"] == pytest.approx(p["step_seconds"]) and document["bound"] == p["bound"]
    assert ridgepoint.main(chosen) == 0
    out = capsys.readouterr().out
    assert "memory bandwidth" in out and "waits for" in out and "whole change" in out
    for extra, part in ((["--batch", "100000"], "fits there"), (["--context", "131060"], "131072")):
        assert ridgepoint.main([*chosen, *extra]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and part in err


def test_breakeven(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = (
        "breakeven --model zaya1-8b --hardware h100-sxm,mi300x --engine ideal-graph --batch 1,16,256 "
        "--context 1024,65536 --draft-tokens 4,16 --acceptance-histogram 2,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,6"
    ).split()
    assert ridgepoint.main([*chosen, "--json"]) == 0
    maps = json.loads(capsys.readouterr().out)["maps"]
    assert [(m["hardware"], m["sampler"]) for m in maps] == [
        ("h100-sxm", "two_forward"), ("h100-sxm", "single_forward"),
        ("mi300x", "two_forward"), ("mi300x", "single_forward"),
    ]  # fmt: skip
    for m in maps:
        for i, j in ((0, 0), (1, 1)):
            setting = m["settings"][m["best"][i][j]]
            cost = m["break_even_tokens_per_step"][i][j]
            assert m["speedup"][i][j] == pytest.approx(setting["acceptance_length"] / cost)
            assert 0 < m["headlines"][0]["remaining"][i][j] < 4.6  # no step is cheaper than an autoregressive one
        assert m["speedup"][2][1] is None and m["best"][2][1] is None  # 256 sequences of 65,536 tokens do not fit
    assert {len(s["levels"]) for s in maps[1]["settings"] if s["draft_tokens"] == 16} >= {1, 2, 3, 17}
    assert ridgepoint.main(chosen) == 0
    out = capsys.readouterr().out
    for part in ("does not fit", "pays at batch", "pays at context", "headline 4.6x", "headline 7.7x", "K16 P"):
        assert part in out
    assert ridgepoint.main([*chosen[:-2], "--acceptance-length", "3", "--json"]) == 2
    assert "that of one setting" in capsys.readouterr().err


def breakeven(extra: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """The maps of a small grid by sampler."""
    grid = "breakeven --model zaya1-8b --hardware h100-sxm --engine ideal-graph --batch 1,16 --context 1024 --json"
    assert ridgepoint.main([*grid.split(), *extra.split()]) == 0
    return {m["sampler"]: m for m in json.loads(capsys.readouterr().out)["maps"]}


def test_each_sampler_is_compared_at_the_k_that_its_acceptance_is_known_of(capsys: pytest.CaptureFixture[str]) -> None:
    maps = breakeven("--acceptance aime25-on", capsys)
    assert {s["draft_tokens"] for s in maps["two_forward"]["settings"]} == {4, 8, 12, 16, 20, 24, 28, 32}
    assert {s["draft_tokens"] for s in maps["single_forward"]["settings"]} == {16}
    maps = breakeven("--acceptance zaya-nano-t1", capsys)
    assert {s["draft_tokens"] for s in maps["two_forward"]["settings"]} == {4, 8, 16}
    maps = breakeven("--acceptance-rate 0.9,0.8,0.7 --sampler two_forward", capsys)
    assert {s["draft_tokens"] for s in maps["two_forward"]["settings"]} == {3}
    (settings,) = breakeven("--acceptance-length 5 --sampler two_forward", capsys)["two_forward"]["settings"]
    assert (settings["draft_tokens"], settings["acceptance_length"]) == (16, 5)


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ("--acceptance aime25-on --draft-tokens 4", ["single_forward with K = 16", "--draft-tokens", "4"]),
        ("--acceptance-length 5", ["two_forward and single_forward", "one"]),
        ("--acceptance-length 5 --sampler two_forward --draft-tokens 8,16", ["one of --draft-tokens"]),
    ],
)
def test_what_acceptance_says_nothing_of(extra: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    grid = "breakeven --model zaya1-8b --hardware h100-sxm --batch 1 --context 1024"
    assert ridgepoint.main([*grid.split(), *extra.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_a_map_in_which_nothing_fits_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    grid = "breakeven --model zaya1-8b --hardware h100-sxm --batch 100000,200000 --context 100000 --acceptance-rate 0.8"
    assert ridgepoint.main(grid.split()) == 0
    out = capsys.readouterr().out
    assert out.count("nothing fits the memory") == 2
    assert "so many tokens" not in out and "pays" not in out


def test_a_long_sweep_shows_its_progress_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(perfmodel.cli, "LONG_GRID_POINTS", 1)
    assert ridgepoint.main([*GRID, "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["rows"]) == 8 and "operating points" in err


def test_a_known_acceptance_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [*WHERE, "--sampler", "two_forward", "--acceptance", "aime25-off"]
    assert ridgepoint.main(["predict", *chosen, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["acceptance_length"] == pytest.approx(9.68, rel=1e-3) and document["acceptance"]["source"]
    assert ridgepoint.main(["predict", *chosen]) == 0
    assert "AIME 2025" in capsys.readouterr().out
    assert ridgepoint.main(["sweep", *chosen, "--draft-tokens", "4,32", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["acceptance_length"] for r in rows] == pytest.approx([1.44, 12.97], rel=1e-3)
    for command in ("predict", "explain", "sweep", "breakeven"):
        assert ridgepoint.main([command, *chosen, "--acceptance", "mine"]) == 2
        assert "aime25-off" in capsys.readouterr().err
    assert ridgepoint.main(["predict", *WHERE, "--acceptance", "aime25-off"]) == 2
    assert "autoregressive" in capsys.readouterr().err


FOUR = {
    "predict": "--batch 2 --context 500 --sampler two_forward --acceptance-length 4",
    "explain": "--batch 2 --context 500 --sampler two_forward --acceptance-rate 0.8",
    "sweep": "--batch 1,2 --context 500 --acceptance-rate 0.8",
    "breakeven": "--batch 1,2 --context 500 --acceptance-rate 0.8",
}


@pytest.mark.parametrize("command", sorted(FOUR))
def test_a_new_device_and_a_new_model(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One YAML in the user's folder and one config.json are all that a command needs; a slip in either is named."""
    monkeypatch.setenv("RIDGEPOINT_HOME", str(tmp_path))
    bundled = (ROOT / "hardware" / "profiles" / "h100-sxm.yaml").read_text()
    text = bundled.replace("name: h100-sxm", "name: half-h100", 1)
    device = tmp_path / "hardware" / "half-h100.yaml"
    device.parent.mkdir()
    device.write_text(text)
    model = tmp_path / "mine" / "config.json"
    model.parent.mkdir()
    config = json.loads((ROOT / "perfmodel" / "models" / "qwen3-30b-a3b.json").read_text())
    model.write_text(json.dumps(config | {"num_hidden_layers": 2}))
    chosen = [command, "--model", str(model), "--hardware", "half-h100", *FOUR[command].split(), "--json"]
    engine = ["--engine", "vllm"]
    assert ridgepoint.main([*chosen, *engine]) == 0
    assert "half-h100" in capsys.readouterr().out
    device.write_text(text.replace("warp_size:", "wrap_size:", 1))
    assert ridgepoint.main([*chosen, *engine]) == 2
    assert "wrap_size" in capsys.readouterr().err
    device.write_text(text.replace("warp_size: 32", "warp_size: -32", 1))
    assert ridgepoint.main([*chosen, *engine]) == 2
    assert "warp_size > 0" in capsys.readouterr().err
    device.write_text(bundled)
    assert ridgepoint.main([*chosen, *engine]) == 2
    assert "'half-h100', but is 'h100-sxm'" in capsys.readouterr().err
    device.write_text(text)
    model.write_text(json.dumps(config | {"num_hidden_layers": 2, "moe_top_p": 0.5}))
    assert ridgepoint.main([*chosen, *engine]) == 2
    out, err = capsys.readouterr()
    assert "moe_top_p" in err and err.count("\n") == 1 and out == ""


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
