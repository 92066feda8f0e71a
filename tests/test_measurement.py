"""Records and deployments on disk: what is written is read back, and anything else is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.files import UserError, plain
from runtime.config import DecodingConfig, KernelConfig, Workload, replace
from runtime.deployment import Deployment, Rule, load_deployment, save_deployment
from runtime.measurement import Measurement, append_jsonl, read_jsonl

RECORD = Measurement(
    kind="generation",
    model="zaya-nano",
    model_hash="0123456789abcdef",
    device={"device": "a CPU", "software": {"torch": "2.13.0"}, "cores": 2},
    command="ridgepoint bench --note 'two\nlines \u2028 and \u00e9'",
    commit="abc",
    date="2026-01-01T00:00:00Z",
    workload=Workload(batch=2, prompt_tokens=5, generated_tokens=7),
    decoding=DecodingConfig("two_forward", 4, mixing_weight=0.5, temperature=0.8),
    kernels=KernelConfig({1: "gather", 64: "dense"}, threads=2),
    slots=5,
    context=12,
    seconds=(0.5, 0.25, 1.0),
    tokens=(14, 14, 13),
    forwards=6,
    acceptance_histogram=(1, 0, 3),
    experts_per_layer=2.5,
    quality={"disagreement": 0.125},
    simulated="imposed acceptance",
)
FORWARD = replace(RECORD, kind="forward", tokens=(), forward="verify", simulated=None, experts_per_layer=None)
DEPLOYMENT = Deployment(
    "zaya-nano",
    "0123456789abcdef",
    {"device": "a CPU"},
    (
        Rule(DecodingConfig("two_forward", 4), KernelConfig({1: "gather", 64: "dense"}, threads=1), max_batch=2),
        Rule(DecodingConfig(), KernelConfig(), max_context=512, evidence={"gain": 1.5, "interval": [1.2, 1.8]}),
    ),
    "2026-01-01",
    "ridgepoint export",
)


# Records


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    for record in (RECORD, FORWARD, RECORD):
        append_jsonl(path, record)
    assert read_jsonl(path) == [RECORD, FORWARD, RECORD]
    assert path.read_bytes().count(b"\n") == 3
    path.write_bytes(b"\n" + path.read_bytes() + b"\n  \n")  # blank lines are nothing
    assert len(read_jsonl(path)) == 3


@settings(max_examples=40, deadline=None)
@given(
    seconds=st.lists(st.floats(1e-9, 1e6), min_size=1, max_size=5),
    histogram=st.lists(st.integers(0, 10**6), max_size=20),
    experts=st.dictionaries(st.integers(1, 10**6), st.sampled_from(["loop", "grouped", "gather", "dense"]), min_size=1),
    text=st.text(max_size=30),
)
def test_any_record_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    seconds: list[float],
    histogram: list[int],
    experts: Any,
    text: str,
) -> None:
    path = tmp_path_factory.mktemp("records") / "runs.jsonl"
    record = replace(
        FORWARD,
        seconds=tuple(seconds),
        acceptance_histogram=tuple(histogram),
        kernels=KernelConfig(experts),
        command=text,
        simulated=text,
    )
    append_jsonl(path, record)
    assert read_jsonl(path) == [record]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        (json.dumps(plain(RECORD))[:-20], "line 2 is not valid JSON"),
        ("[1, 2]", "line 2: must be a mapping, but is \\[1, 2\\]"),
        ("3", "line 2: must be a mapping"),
        ("null", "line 2: must be a mapping"),
        (json.dumps(plain(RECORD) | {"kernels": None}), "line 2: kernels: must be a mapping"),
        (json.dumps(plain(RECORD) | {"kernels": {"experts": {"many": "loop"}}}), "line 2: kernels: experts \\(key\\)"),
        (json.dumps(plain(RECORD) | {"kernels": {"experts": {"1": "fast"}}}), "must be one of .*dense, but is 'fast'"),
        (json.dumps(plain(RECORD) | {"colour": "red"}), "line 2: unknown key 'colour'"),
        (json.dumps({k: v for k, v in plain(RECORD).items() if k != "seconds"}), "line 2: missing key 'seconds'"),
        (json.dumps(plain(RECORD) | {"seconds": []}), "line 2: a measurement must have at least one sample"),
        (json.dumps(plain(RECORD) | {"seconds": [0.5, 0, 1]}), "line 2: 0 < seconds must hold"),
        (json.dumps(plain(RECORD) | {"seconds": [0.5, float("nan"), 1]}), "line 2: 0 < seconds must hold"),
        (json.dumps(plain(RECORD) | {"tokens": [14]}), "one token count per sample, but got 1 for 3 samples"),
        (json.dumps(plain(FORWARD) | {"tokens": [14]}), "a forward has no token counts"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "runs.jsonl"
    append_jsonl(path, RECORD)
    path.write_text(path.read_text() + line + "\n" + json.dumps(plain(RECORD)) + "\n")
    with pytest.raises(UserError, match=message) as error:
        read_jsonl(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_cut_line_costs_no_later_record(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append_jsonl(path, RECORD)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    append_jsonl(path, FORWARD)
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        read_jsonl(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    assert read_jsonl(path) == [RECORD, FORWARD]


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        append_jsonl(tmp_path, RECORD)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(tmp_path / "binary.jsonl")


def test_what_a_record_says() -> None:
    assert RECORD.median_seconds == 0.5
    assert RECORD.tokens_per_second == 28  # the median of 28, 56 and 13, not the tokens over the median time
    assert RECORD.spread == (0.75 - 0.375) / 2 / 0.5
    assert RECORD.acceptance_length == 1 + 6 / 4
    assert replace(FORWARD, acceptance_histogram=()).acceptance_length is None
    assert replace(FORWARD, seconds=(0.5,)).spread == 0
    with pytest.raises(UserError, match="needs a measurement of kind 'generation'"):
        _ = FORWARD.tokens_per_second


# Deployments


def test_a_deployment_comes_back(tmp_path: Path) -> None:
    path = save_deployment(DEPLOYMENT, tmp_path / "deployment.yaml")
    assert load_deployment(path) == DEPLOYMENT
    save_deployment(replace(DEPLOYMENT, model="other"), path)
    assert load_deployment(path).model == "other"
    assert [p.name for p in tmp_path.iterdir()] == ["deployment.yaml"]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("colour",), "red", "unknown key 'colour'; known: .*model_hash"),
        (("rules",), [], "rules must have at least one entry"),
        (("schema_version",), 2, "schema_version must be 1, but is 2"),
        (("rules", 0, "max_batch"), 0, r"rules\[0\]: max_batch >= 1 must hold, but got 0"),
        (("rules", 1, "decoding", "draft_tokens"), 0, r"rules\[1\]: decoding: draft_tokens >= 1 must hold, but got 0"),
        (("rules", 0, "decoding", "mixing_weight"), 1.5, "0 <= mixing_weight <= 1 must hold, but got 1.5"),
        (("rules", 0, "decoding", "sampler"), "magic", "must be one of autoregressive, .*, but is 'magic'"),
        (("rules", 0, "kernels", "experts"), {}, "experts must have at least one bucket"),
        (("rules", 0, "kernels", "experts"), {0: "loop"}, r"expert buckets must be >= 1, but got \[0\]"),
        (("rules", 0, "kernels", "threads"), 0, "threads >= 1 must hold, but got 0"),
        (("rules", 0, "speed"), 9, r"rules\[0\]: unknown key 'speed'"),
    ],
)
def test_a_deployment_is_read_strictly(tmp_path: Path, place: tuple[Any, ...], value: Any, message: str) -> None:
    data = plain(DEPLOYMENT)
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path = tmp_path / "deployment.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match=message) as error:
        load_deployment(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["model", "model_hash", "fingerprint", "rules", "created", "command"])
def test_a_deployment_lacks_nothing(tmp_path: Path, key: str) -> None:
    (tmp_path / "d.yaml").write_text(yaml.safe_dump({k: v for k, v in plain(DEPLOYMENT).items() if k != key}))
    with pytest.raises(UserError, match=f"missing key '{key}'"):
        load_deployment(tmp_path / "d.yaml")


def test_expert_modes_by_bucket() -> None:
    kernels = KernelConfig({64: "dense", 1: "gather", 8: "grouped"})
    found = [kernels.expert_mode(tokens) for tokens in (1, 2, 8, 9, 64, 65, 10**9)]
    assert found == ["gather", "grouped", "grouped", "dense", "dense", "dense", "dense"]
