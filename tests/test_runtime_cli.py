"""The commands that run a model: results on stdout, one JSON document when asked, one line for bad input."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ridgepoint
from hardware.fingerprint import fingerprint
from runtime.checkpoint import load_model, model_hash, random_model, save_model
from runtime.config import DecodingConfig, KernelConfig, ModelConfig
from runtime.deployment import Deployment, Rule, save_deployment
from runtime.engine import generate
from runtime.kernels import native
from runtime.measurement import read_jsonl
from runtime.options import load
from runtime.tokenizer import BOS, VOCABULARY, ByteTokenizer

TINY = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=4,
    moe_intermediate_size=16,
    router_hidden_size=12,
    max_position_embeddings=320,
    eos_token_id=258,
    mask_token_id=259,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(random_model(TINY, seed=2), folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert ridgepoint.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_bench_times_a_grid_and_keeps_the_records(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.jsonl"
    grid = ["--model", checkpoint, "--batch", "1,2", "--slots", "1,4", "--context", "8,20", "--repeats", 2]
    document = json.loads(run(capsys, "bench", *grid, "--out", out, "--json"))
    records = read_jsonl(out)
    points = {(m.workload.batch, m.context, m.forward, m.slots) for m in records}
    forwards = (("decode", 1), ("draft", 4), ("verify", 4))
    assert points == {(b, c, *f) for b in (1, 2) for c in (8, 20) for f in forwards}
    assert [r["seconds"] for r in document["records"]] == [list(m.seconds) for m in records]
    assert len(run(capsys, "bench", *grid).splitlines()) == len(records)


def test_the_engine_that_is_asked_for_runs_and_stands_in_the_record(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point = ["--model", checkpoint, "--batch", 2, "--slots", 3, "--context", 9, "--repeats", 1]
    for engine in ("eager", "lean"):
        run(capsys, "bench", *point, "--engine", engine, "--out", tmp_path / "runs.jsonl")
    assert [m.kernels.engine for m in read_jsonl(tmp_path / "runs.jsonl")] == ["eager"] * 2 + ["lean"] * 2
    texts = [
        json.loads(run(capsys, "generate", "--model", checkpoint, "--prompt", "a", "--engine", engine, "--json"))
        for engine in ("eager", "lean")
    ]
    assert texts[0]["results"] == texts[1]["results"]
    assert [text["served"][0]["kernels"]["engine"] for text in texts] == ["eager", "lean"]


@pytest.mark.parametrize("buildable", [False, True])
def test_auto_says_why_it_does_without_lean_and_the_lines_name_the_engine(
    buildable: bool, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "the engine lean needs a C compiler: none of cc was found"
    monkeypatch.setattr(native, "obstacle", lambda: None if buildable else missing)
    expected = "lean" if buildable else "eager"
    shape = ["--batch", "2", "--context", "8", "--repeats", "1"]
    for command in (["generate", "--prompt", "a"], ["bench", *shape], ["bench", *shape, "--new-tokens", "2"]):
        for engine in ("auto", "eager"):
            assert ridgepoint.main([*command, "--model", str(checkpoint), "--engine", engine]) == 0
            said = capsys.readouterr()
            told = not buildable and engine == "auto"
            assert said.err == (f"ridgepoint: auto took the engine eager: {missing}\n" if told else "")
            line = said.out.splitlines()[-1 if command[0] == "generate" else 0]
            assert (expected if engine == "auto" else "eager") in line.replace(",", " ").split()
    load_model(str(checkpoint))
    assert capsys.readouterr().err == "", "the Python API says nothing"


def test_a_model_that_lean_does_not_run_builds_nothing(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "obstacle", lambda: pytest.fail("float16 is not for lean"))
    assert load(str(checkpoint), "cpu", "float16", None).kernels.engine == "eager"
    assert capsys.readouterr().err == ""


def test_bench_compares_generations_with_autoregressive_ones(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", checkpoint, "--batch", "10", "--new-tokens", 5, "--draft-tokens", 3, "--repeats", 2]
    document = json.loads(run(capsys, "bench", *options, "--json"))
    assert [r["decoding"]["sampler"] for r in document["records"]] == ["autoregressive", "two_forward"]
    assert all(sum(r["tokens"]) <= 2 * 10 * 5 for r in document["records"])
    ratio, low, high = document["speedup_over_autoregressive"]["closed"]["10"]
    assert 0 < low <= ratio <= high
    assert "autoregressive decoding (range of 2 rounds" in run(capsys, "bench", *options)


def test_bench_reports_closed_and_continuous_batches_by_name(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", checkpoint, "--batch", "4", "--new-tokens", 6, "--levels", "0,2", "--draft-tokens", 3]
    options += ["--repeats", 1, "--batching", "both"]
    document = json.loads(run(capsys, "bench", *options, "--out", tmp_path / "runs.jsonl", "--json"))
    records = read_jsonl(tmp_path / "runs.jsonl")
    assert [(r.decoding.sampler, r.batching) for r in records] == [
        (sampler, batching) for batching in ("closed", "continuous") for sampler in ("autoregressive", "single_forward")
    ]
    assert all(r.full_tokens_per_second is not None and r.full_tokens_per_second > 0 for r in records)
    assert records[0].tokens == records[2].tokens  # greedy, so the same text, on slots that are refilled
    assert set(document["speedup_over_autoregressive"]) == {"closed", "continuous"}
    lines = run(capsys, "bench", *options).splitlines()
    assert lines[-2].startswith("closed batch 4: ") and lines[-1].startswith("continuous batch 4: ")
    assert "tokens/s" in lines[0] and "in full steps" in lines[0]


def test_bench_times_the_forward_of_single_forward(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", checkpoint, "--batch", "2", "--context", 8, "--levels", "0,2", "--draft-tokens", 3]
    document = json.loads(run(capsys, "bench", *options, "--repeats", 1, "--json"))
    assert [(r["forward"], r["slots"]) for r in document["records"]] == [("decode", 1), ("single", 4 * 3)]
    assert document["records"][1]["decoding"]["proposal_levels"] == [0, 2]


def test_generate_prints_the_engines_text(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = generate(load_model(str(checkpoint)), [[BOS, *b"add 1\n"]], DecodingConfig(), max_new_tokens=20)
    text = ByteTokenizer().decode(result.tokens[0])
    monkeypatch.setattr("sys.stdin", io.StringIO("add 1\n"))
    assert run(capsys, "generate", "--model", checkpoint, "--max-new-tokens", 20).startswith(text + "\n\n")
    options = ["--prompt", "add 1\n", "--max-new-tokens", 20, "--draft-tokens", 4, "--json"]
    document = json.loads(run(capsys, "generate", "--model", checkpoint, *options))
    [found] = document["results"]
    assert found["text"] == text
    assert document["decoding"]["sampler"] == "two_forward"
    assert found["tokens"] == len(result.tokens[0])
    assert document["forwards"] == 2 * found["steps"]


PROMPTS = ["add 1\n", "rev 12\n", "b\n"]


def test_generate_takes_several_prompts_and_decodes_some_at_a_time(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n{PROMPTS[1]}{PROMPTS[2]}")  # a blank line is no prompt
    common = ["--model", checkpoint, "--max-new-tokens", 12, "--json"]
    repeated = json.loads(run(capsys, "generate", *common, *(part for p in PROMPTS for part in ("--prompt", p))))
    from_file = json.loads(
        run(capsys, "generate", *common, "--prompts", tmp_path / "prompts.txt", "--batch", 2, "--levels", "0,1")
    )
    expected = generate(
        load_model(str(checkpoint)), [[BOS, *p.encode()] for p in PROMPTS], DecodingConfig(), max_new_tokens=12
    )
    for document in (repeated, from_file):
        assert [r["token_ids"] for r in document["results"]] == expected.tokens
    assert (repeated["batching"], from_file["batching"]) == ("closed", "continuous")
    assert from_file["decoding"]["sampler"] == "single_forward"
    assert [s["steps"] for s in from_file["served"]] == [from_file["forwards"]]


def test_generate_ends_at_the_stop_tokens_given(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", checkpoint, "--prompt", "a", "--max-new-tokens", 12, "--json"]
    [free] = json.loads(run(capsys, "generate", *options))["results"]
    stop = free["token_ids"][3]
    [cut] = json.loads(run(capsys, "generate", *options, "--stop-token", stop))["results"]
    assert cut["token_ids"] == free["token_ids"][: free["token_ids"].index(stop) + 1]
    assert (free["finish_reason"], cut["finish_reason"]) == ("length", "stop")


def test_generate_streams_the_text_that_it_would_print(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", checkpoint, "--max-new-tokens", 12, "--draft-tokens", 3]
    whole, streamed = (
        run(capsys, "generate", *options, "--prompt", "a", *extra).rpartition(" tokens in ")[0]
        for extra in ((), ("--stream",))
    )
    assert streamed == whole
    several = [part for p in PROMPTS for part in ("--prompt", p)]
    lines = run(capsys, "generate", *options, *several, "--stream").splitlines()
    texts = ["", "", ""]
    for line in lines[:-2]:
        place, _, piece = line.partition("/3] ")
        texts[int(place[1:]) - 1] += ast.literal_eval(piece)
    expected = json.loads(run(capsys, "generate", *options, *several, "--json"))["results"]
    assert texts == [r["text"] for r in expected]


def test_generate_follows_a_deployment(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = model_hash(load_model(str(checkpoint)))
    decoding = DecodingConfig("two_forward", draft_tokens=6)
    path = save_deployment(
        Deployment("tiny", found, fingerprint(), (Rule(decoding, KernelConfig(threads=1)),), "now", "pytest"),
        tmp_path / "deployment.yaml",
    )
    options = ["--model", checkpoint, "--prompt", "a", "--max-new-tokens", 5, "--deployment", path]
    document = json.loads(run(capsys, "generate", *options, "--json"))
    assert document["decoding"]["draft_tokens"] == 6
    assert [(s["decoding"]["draft_tokens"], s["kernels"]["threads"]) for s in document["served"]] == [(6, 1)]
    assert ridgepoint.main(["generate", *map(str, options), "--temperature", "0.5"]) == 2
    assert "not both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options", "parts"),
    [
        ("generate", ["--model", "gpt-17"], ["unknown model 'gpt-17'", "known:"]),
        ("generate", ["--device", "cuda:9"], ["no device cuda:9"]),
        ("generate", ["--device", "abacus"], ["unknown device 'abacus'", "cpu, cuda"]),
        ("generate", ["--dtype", "int3"], ["unknown dtype 'int3'", "bfloat16"]),
        ("generate", ["--engine", "jet"], ["unknown engine 'jet'", "compiled, eager"]),
        ("generate", ["--engine", "graphs"], ["the engine graphs runs on a GPU, but the model is on cpu"]),
        ("bench", ["--engine", "lean", "--dtype", "float16"], ["the engine lean computes in float32 or bfloat16"]),
        ("generate", ["--draft-tokens", "0"], ["draft_tokens >= 1 must hold, but got 0"]),
        ("generate", ["--mixing-weight", "1.5"], ["0 <= mixing_weight <= 1", "1.5"]),
        ("generate", ["--sampler", "psychic"], ["unknown sampler 'psychic'", "two_forward"]),
        ("generate", ["--prompt", "x" * 400], ["the context of 320", "401 + 128"]),
        ("generate", ["--threads", "0"], ["threads >= 1"]),
        ("generate", ["--batch", "0"], ["batch >= 1 must hold, but got 0"]),
        ("generate", ["--prompts", "nothing.txt"], ["--prompt or from --prompts, not both"]),
        ("generate", ["--stream", "--json"], ["--stream or --json, not both"]),
        ("generate", ["--levels", "0,x"], ["--levels must be whole numbers", "0,x"]),
        ("generate", ["--levels", "1,2"], ["proposal_levels must ascend from 0"]),
        ("generate", ["--steps", "2", "--levels", "0"], ["denoising_steps is a setting of denoising"]),
        ("bench", ["--batching", "open"], ["unknown batching 'open'", "known: both, closed, continuous"]),
        ("bench", ["--batch", "1,two"], ["--batch must be whole numbers", "1,two"]),
        ("bench", ["--batch", "0"], ["batch >= 1"]),
        ("bench", ["--slots", "0"], ["slots >= 1"]),
        ("bench", ["--context", "5000"], ["320 positions", "5000 + 1"]),
        ("bench", ["--repeats", "0"], ["repeats >= 1"]),
        ("convert", ["--recipe", "nonesuch", "--out", "never"], ["unknown recipe 'nonesuch'", "zaya-nano"]),
    ],
    ids=lambda v: "-".join(v[:2])[:30] if isinstance(v, list) else v,
)
def test_bad_input_is_one_line(
    command: str, options: list[str], parts: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command != "convert" and "--model" not in options:
        options = ["--model", str(checkpoint), *options]
    if command == "generate" and "--prompt" not in options:
        options = ["--prompt", "a", *options]
    assert ridgepoint.main([command, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    for part in parts:
        assert part in err


def test_a_truncated_checkpoint_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (checkpoint / "model.safetensors").read_bytes()
    for size in (4, len(whole) // 2, len(whole) - 1):
        (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        assert ridgepoint.main(["generate", "--model", str(tmp_path), "--prompt", "a"]) == 2
        err = capsys.readouterr().err
        assert "truncated or not safetensors" in err and err.count("\n") == 1


def test_threads_are_the_commands_own(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        document = json.loads(
            run(
                capsys,
                "bench",
                "--model",
                checkpoint,
                "--repeats",
                1,
                "--threads",
                2,
                "--batch",
                1,
                "--context",
                4,
                "--json",
            )
        )
        assert {r["kernels"]["threads"] for r in document["records"]} == {2}
    finally:
        torch.set_num_threads(before)


def test_a_prompt_that_is_no_text_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes that are no UTF-8 reach the program as lone surrogates."""
    assert ridgepoint.main(["generate", "--model", str(checkpoint), "--prompt", "\udcff"]) == 2
    found = capsys.readouterr()
    assert found.out == "" and "cannot read the prompt" in found.err and found.err.count("\n") == 1


def test_a_failing_compiler_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own, with nothing compiled before."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    here = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ridgepoint", "generate", "--model", str(checkpoint), "--prompt", "a"]
    done = subprocess.run([*command, "--engine", "compiled"], env=os.environ | here, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert "the engine compiled needs a working compiler" in done.stderr and "No working C++ compiler" in done.stderr
