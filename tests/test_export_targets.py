"""What other engines are given, read back by strict readers of their documented formats, written without the writers.

A reader knows what its engine does with the file, and says it in the terms of ours: what is written means the same
settings, and what cannot be said is refused by the setting's name, with nothing written.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ridgepoint
from autotune.export.step_times import COLUMNS
from autotune.export.targets import TARGETS, write
from autotune.tiling_results import read_tilings_file
from autotune.tiling_runner import Described, TilingWork, subject_of
from hardware.files import UserError, plain
from runtime.config import DecodingConfig, KernelConfig, model_config_from_json
from runtime.deployment import load_deployment
from runtime.samplers.denoising import unmask
from tests.export_policies import GPU, GRAPHS, TILE, WIDE, decodings, policy, study, tiling

EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
DENOISING = DecodingConfig("denoising", draft_tokens=8, denoising_steps=8, confidence_threshold=0.9)
TWO_FORWARD = DecodingConfig("two_forward", draft_tokens=6)
LEVELS = DecodingConfig("single_forward", draft_tokens=6, proposal_levels=(0, 3))


def strict_json(path: Path) -> Any:
    """JSON without a key given twice, and without numbers that JSON does not have."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    return json.loads(path.read_text(), object_pairs_hook=once, parse_constant=refuse)


def variables(path: Path) -> dict[str, str]:
    """A file of NAME=value lines, as shells and containers read it: nothing in it is code."""
    found = [re.fullmatch(r"([A-Z][A-Z0-9_]*)=([A-Za-z0-9_.,-]+)", line) for line in path.read_text().splitlines()]
    assert all(found)
    return {match[1]: match[2] for match in found if match}


# --- the publisher's vLLM fork

SPECULATIVE = {  # the fields of its SpeculativeConfig that may be given here, and their types
    "method": str,
    "num_speculative_tokens": int,
    "tidar_diff_temperature": float,
    "tidar_ar_temperature": float,
}


def read_tidar(folder: Path) -> DecodingConfig:
    """The settings that the fork takes from these files."""
    sampling = strict_json(folder / "sampling.json")
    assert set(sampling) == {"temperature"}
    if not (folder / "speculative-config.json").exists():
        return DecodingConfig(temperature=sampling["temperature"])
    config = strict_json(folder / "speculative-config.json")
    assert all(type(value) is SPECULATIVE[name] for name, value in config.items())
    assert config["method"] == "tidar" and config["num_speculative_tokens"] > 0
    assert config.get("tidar_ar_temperature", 1.0) > 0
    shell = variables(folder / "environment")
    two = shell["VLLM_TIDAR_TWO_FORWARD"] == "1"
    levels = None
    if not two:
        levels = tuple(int(level) for level in shell["VLLM_TIDAR_PROPOSAL_ACC_LEVELS"].split(","))
        assert all(0 <= level <= config["num_speculative_tokens"] for level in levels)
        assert shell["VLLM_ATTENTION_BACKEND"] == "FLEX_ATTENTION"  # else drafts are never accepted
    mixed = shell["TIDAR_MIX_DRAFT_TARGET_V1"] not in ("", "0", "false")
    weight = float(shell["TIDAR_MIX_LOGIT_TARGET_WEIGHT"])
    assert not mixed or sampling["temperature"] > 0  # greedy requests are not mixed
    return DecodingConfig(
        "two_forward" if two else "single_forward",
        draft_tokens=config["num_speculative_tokens"],
        temperature=sampling["temperature"],
        draft_temperature=config["tidar_diff_temperature"],
        mixing_weight=weight if mixed else 1.0,
        proposal_levels=levels,
    )


def tidar_lacks(decoding: DecodingConfig) -> set[str]:
    lacks = set()
    if decoding.sampler == "denoising":
        lacks.add("sampler")
    if decoding.anchor_draft:
        lacks.add("anchor_draft")
    if decoding.mixing_weight < 1 and decoding.temperature == 0:
        lacks.add("mixing_weight")
    return lacks


@EXAMPLES
@given(decoding=decodings())
def test_tidar_settings_come_back_or_are_refused(decoding: DecodingConfig, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("tidar") / "out"
    if refused("tidar-vllm", decoding, folder, tidar_lacks(decoding)):
        return
    found = read_tidar(folder)
    assert found.levels == decoding.levels if decoding.sampler == "single_forward" else found.proposal_levels is None
    assert replace(found, proposal_levels=decoding.proposal_levels) == decoding


def refused(target: str, decoding: DecodingConfig, folder: Path, lacks: set[str]) -> bool:
    """Whether it was; asserts that it was where, and only where, it lacks something, by name and without a trace."""
    try:
        paths = write(target, policy(study(decoding)), folder)
    except UserError as error:
        named = re.search(r"cannot represent (\w+)=", str(error))
        assert named and named[1] in lacks, (str(error), lacks)
        assert "\n" not in str(error) and not folder.exists()
        return True
    assert not lacks, decoding
    assert all(path.is_file() for path in paths)
    return False


# --- vLLM's schedule


def read_schedule(folder: Path, most: int) -> list[int]:
    """Drafts for 1 .. most sequences, by the documented rules."""
    if not (folder / "speculative-config.json").exists():
        return [0] * most
    config = strict_json(folder / "speculative-config.json")
    assert set(config) <= {*SPECULATIVE, "num_speculative_tokens_per_batch_size"}
    entries = config["num_speculative_tokens_per_batch_size"]
    assert entries and all(len(entry) == 3 and all(type(n) is int for n in entry) for entry in entries)
    last = 0
    for low, high, k in entries:
        assert low == last + 1 <= high and 0 <= k <= config["num_speculative_tokens"]
        last = high
    assert config["num_speculative_tokens"] > 0
    return [
        next((k for low, high, k in entries if low <= batch <= high), entries[-1][2]) for batch in range(1, most + 1)
    ]


@EXAMPLES
@given(
    drafts=st.dictionaries(st.integers(1, 12), st.integers(0, 9), min_size=1, max_size=4),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_a_schedule_gives_each_batch_the_drafts_of_its_rule(
    drafts: dict[int, int], temperature: float, tmp_path_factory: Any
) -> None:
    """... as the native policy does, batches between and beyond the tuned ones too."""
    folder = tmp_path_factory.mktemp("schedule")
    results = [
        study(
            DecodingConfig("two_forward", draft_tokens=k, temperature=temperature)
            if k
            else DecodingConfig(temperature=temperature),
            batch=batch,
        )
        for batch, k in drafts.items()
    ]
    write("vllm-schedule", policy(*results), folder / "out")
    (native,) = write("native", policy(*results), folder / "deployment.yaml")
    rules = load_deployment(native)
    expected = [rules.rule_for(batch, 100).decoding for batch in range(1, 15)]
    assert read_schedule(folder / "out", 14) == [d.draft_tokens if d.drafts else 0 for d in expected]
    assert strict_json(folder / "out" / "sampling.json") == {"temperature": temperature}
    if any(drafts.values()):  # what the fork alone would be told of such a batch
        told = strict_json(folder / "out" / "speculative-config.json")
        assert told.get("tidar_ar_temperature", 0.0) == temperature
        write("tidar-vllm", policy(next(r for r in results if r.trials[-1].number)), folder / "one")
        assert (folder / "one" / "environment").read_text() == (folder / "out" / "environment").read_text()


@pytest.mark.parametrize(
    ("results", "named"),
    [
        ([study(LEVELS)], "sampler=single_forward"),
        ([study(DENOISING)], "sampler=denoising"),
        ([study(replace(TWO_FORWARD, mixing_weight=0.5))], "mixing_weight=0.5"),
        ([study(replace(TWO_FORWARD, anchor_draft=True))], "anchor_draft=True"),
        ([study(TWO_FORWARD, context=128), study(TWO_FORWARD, context=768)], "context=128"),
        ([study(TWO_FORWARD), study(replace(TWO_FORWARD, temperature=1.0), batch=2)], "temperature by batch"),
        (
            [study(TWO_FORWARD), study(replace(TWO_FORWARD, draft_temperature=1.0), batch=2)],
            "draft_temperature by batch",
        ),
    ],
)
def test_what_a_schedule_cannot_say_is_refused(results: list[Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"vllm-schedule cannot represent {named}"):
        write("vllm-schedule", policy(*results), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- block diffusion: what an engine decides in each forward, on the same confidences as ours


def fill(decide: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], confidences: torch.Tensor) -> list[list[bool]]:
    """Which positions of a block are decided after each forward; a forward has its own confidences."""
    decided = torch.zeros(1, confidences.shape[-1], dtype=torch.bool)
    found = []
    for confidence in confidences:
        decided = decided | decide(confidence[None], decided)
        found.append(decided[0].tolist())
        if decided.all():
            return found
    raise AssertionError("the block was never filled")


def ours(decoding: DecodingConfig) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    share = -(-decoding.draft_tokens // decoding.denoising_steps)
    return lambda confidence, decided: unmask(confidence, decided, share, decoding.confidence_threshold)


def sglang(path: Path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """LowConfidence: above the threshold, or the surest one where none is."""
    config = yaml.safe_load(path.read_text())
    assert set(config) == {"block_size", "threshold"}
    assert type(config["block_size"]) is int and type(config["threshold"]) is float

    def decide(confidence: torch.Tensor, decided: torch.Tensor) -> torch.Tensor:
        confidence = confidence.masked_fill(decided, -torch.inf)
        above = confidence > config["threshold"]
        surest = torch.zeros_like(decided).scatter(-1, confidence.argmax(-1, keepdim=True), True)
        return above if bool(above.any()) else surest

    return decide


def lmdeploy(path: Path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Its two strategies that are written: by a threshold and at least one, or a fixed number."""
    config = strict_json(path)
    assert {"dllm_block_length", "dllm_unmasking_strategy", "dllm_denoising_steps"} <= set(config)
    block, steps = config["dllm_block_length"], config["dllm_denoising_steps"]
    assert type(block) is int and type(steps) is int and steps >= 1
    if config["dllm_unmasking_strategy"] == "low_confidence_static":
        assert "dllm_confidence_threshold" not in config
        count = max(1, min(block // steps, block))
        return lambda confidence, decided: torch.zeros_like(decided).scatter(
            -1, confidence.masked_fill(decided, 0.0).topk(count, -1).indices, True
        )
    assert config["dllm_unmasking_strategy"] == "low_confidence_dynamic"
    threshold = config["dllm_confidence_threshold"]

    def decide(confidence: torch.Tensor, decided: torch.Tensor) -> torch.Tensor:
        confidence = confidence.masked_fill(decided, 0.0)
        surest = confidence.topk(1, -1).indices
        return (confidence.scatter(-1, surest, threshold) >= threshold) & ~decided

    return decide


def denoising_lacks(decoding: DecodingConfig, target: str) -> set[str]:
    """What an engine that fills blocks cannot be told."""
    if decoding.sampler == "autoregressive":
        return {"sampler"} if target == "diffusion-gemma" else set()
    if decoding.sampler != "denoising":
        return {"sampler"}
    lacks = {"verify"} if decoding.verify else set()
    lacks |= {"temperature"} if decoding.temperature else set()
    k, threshold = decoding.draft_tokens, decoding.confidence_threshold
    share = -(-k // decoding.denoising_steps)
    if threshold == 0 or share in (1, k) or target == "diffusion-gemma":
        return lacks
    if target == "lmdeploy-diffusion" and threshold is None and any(k // steps == share for steps in range(1, k + 1)):
        return lacks
    return lacks | {"denoising_steps"}


@pytest.mark.parametrize(
    ("target", "name", "reader"),
    [("sglang-diffusion", "dllm.yaml", sglang), ("lmdeploy-diffusion", "engine-config.json", lmdeploy)],
)
@EXAMPLES
@given(decoding=decodings("denoising"), seed=st.integers(0, 1000))
def test_an_engine_fills_blocks_as_ours_does(
    target: str, name: str, reader: Any, decoding: DecodingConfig, seed: int, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("filling") / "out"
    if refused(target, decoding, folder, denoising_lacks(decoding, target)):
        return
    generator = torch.Generator().manual_seed(seed)
    confidences = torch.rand(decoding.draft_tokens, decoding.draft_tokens, generator=generator) ** 0.25  # high ones
    confidences[torch.rand(confidences.shape, generator=generator) < 0.1] = 1.0  # softmax rounds to it often
    confidences += 1e-6 * torch.rand(confidences.shape, generator=generator) * (confidences < 1)  # no ties but at 1
    if decoding.confidence_threshold is None:
        confidences = torch.rand(confidences.shape, generator=generator)
    assert fill(reader(folder / name), confidences) == fill(ours(decoding), confidences)


@EXAMPLES
@given(decoding=decodings(), seed=st.integers(0, 1000))
def test_gemmas_sampler_ends_a_block_early_only_where_every_position_is_sure(
    decoding: DecodingConfig, seed: int, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("gemma") / "out"
    if refused("diffusion-gemma", decoding, folder, denoising_lacks(decoding, "diffusion-gemma")):
        return
    config = yaml.safe_load((folder / "gemma4-renoise.yaml").read_text())
    assert set(config) == {"block_size", "max_denoising_steps", "temperature_schedule", "stopping_config"}
    schedule, stopping = config["temperature_schedule"], config["stopping_config"]
    assert 0 <= schedule["t_min"] < schedule["t_max"] and set(stopping) == {
        "confidence_threshold",
        "stability_threshold",
    }
    assert stopping["confidence_threshold"] >= 0 and stopping["stability_threshold"] == 0
    k, threshold = decoding.draft_tokens, decoding.confidence_threshold
    assert config["block_size"] == k
    never = torch.full((k, k), 1e-3) * torch.arange(1, k + 1)  # nothing is sure: every forward is needed
    assert config["max_denoising_steps"] == len(fill(ours(decoding), never))
    if not stopping["confidence_threshold"]:  # never early
        return
    assert threshold is not None
    generator = torch.Generator().manual_seed(seed)
    logits = 12 * torch.randn(200, k, 7, generator=generator, dtype=torch.float64)
    scaled = (logits / schedule["t_max"]).log_softmax(-1)
    mean = -(scaled.exp() * scaled).sum(-1).mean(-1)
    done = mean < stopping["confidence_threshold"]
    assert (logits.softmax(-1).amax(-1)[done] > threshold).all()


# --- tile files


def read_tiles(path: Path, *, version: bool) -> dict[int, dict[str, int]]:
    """As both engines load it: every key but vLLM's version must be a whole number."""
    data = strict_json(path)
    if version:
        data.pop("triton_version", None)
    table = {int(key): value for key, value in data.items()}
    needed = {"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages"}
    for tile in table.values():
        assert needed <= set(tile) <= needed | {"waves_per_eu", "matrix_instr_nonkdim", "kpack"}
        assert all(type(value) is int for value in tile.values())
    return table


def nearest(table: dict[int, dict[str, int]], tokens: int) -> dict[str, int]:
    return table[min(table, key=lambda m: abs(m - tokens))]


def test_vllm_finds_its_tiles(tmp_path: Path) -> None:
    """By the name it looks for, beside a stranger's file that stays; what it rests on is no part of the file."""
    folder = tmp_path / "zaya1-8b"
    folder.mkdir()
    (folder / "E=8,N=1,device_name=abacus.json").write_text("{}")
    amd = TILE | {"waves_per_eu": 0, "matrix_instr_nonkdim": 16, "kpack": 1}
    results = [tiling(272, WIDE), tiling(17, amd), tiling(1), tiling(16, kernel="attention"), study(TWO_FORWARD)]
    paths = write("vllm-moe", policy(*results), tmp_path)
    name = "E=16,N=2048,device_name=NVIDIA_H100_80GB_HBM3"
    assert paths == [folder / f"{name}.json", folder / f"{name}.provenance.yaml"]
    table = read_tiles(paths[0], version=True)
    assert table == {1: TILE, 17: amd, 272: WIDE}
    assert nearest(table, 10) == amd and nearest(table, 8) == TILE and nearest(table, 4000) == WIDE
    assert strict_json(paths[0])["triton_version"] == "3.6.0"
    left_out = yaml.safe_load(paths[1].read_text())["left_out"]
    assert any("attention" in line for line in left_out) and any("batch=1" in line for line in left_out)
    assert (folder / "E=8,N=1,device_name=abacus.json").read_text() == "{}"


def test_sglang_finds_its_tiles(tmp_path: Path) -> None:
    """In the folder of its Triton version, without a version among the keys; no second file for the second product."""
    paths = write("sglang-moe", policy(tiling(272, WIDE), tiling(17)), tmp_path)
    configs = tmp_path / "zaya1-8b" / "configs"
    assert [p.name for p in configs.iterdir()] == ["triton_3_6_0"]
    assert [p.name for p in (configs / "triton_3_6_0").iterdir()] == [paths[0].name]
    assert paths[0].name == "E=16,N=2048,device_name=NVIDIA_H100_80GB_HBM3.json"
    assert read_tiles(paths[0], version=False) == {17: TILE, 272: WIDE}
    old = paths[0].with_name(paths[0].stem + "_down.json")
    old.write_text("{}")
    with pytest.raises(UserError, match=r"_down\.json would go on setting"):
        write("sglang-moe", policy(tiling(17)), tmp_path)
    with pytest.raises(UserError, match=r"Triton version of numbers, as 3\.6\.0, but got '3\.6\.0\+git'"):
        write("sglang-moe", policy(tiling(17, triton="3.6.0+git")), tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"device": GPU | {"device": "NVIDIA H200 NVL"}}, "E=16,N=2048,device_name=NVIDIA_H200.json"),
        ({"device": GPU | {"device": "AMD Instinct MI300X"}}, "E=16,N=2048,device_name=AMD_Instinct_MI300X.json"),
        ({"device": GPU | {"device": "AMD Instinct MI300X VF"}}, "E=16,N=2048,device_name=AMD_Instinct_MI300X.json"),
        ({"dtype": "float32"}, "E=16,N=2048,device_name=NVIDIA_H100_80GB_HBM3,dtype=float32.json"),
        ({"dtype": "float16"}, "E=16,N=2048,device_name=NVIDIA_H100_80GB_HBM3.json"),
    ],
)
def test_vllm_names_devices_and_types_its_own_way(change: dict[str, Any], name: str, tmp_path: Path) -> None:
    assert write("vllm-moe", policy(tiling(**change)), tmp_path)[0].name == name


@pytest.mark.parametrize("target", ["vllm-moe", "sglang-moe"])
@pytest.mark.parametrize(
    ("results", "said"),
    [
        ([tiling(kernel="experts")], "grouped_experts.*zaya1-8b experts tokens=16"),
        ([study(TWO_FORWARD)], "grouped_experts.*zaya1-8b batch=1"),
        ([replace(tiling(), decision=None)], "no decision yet"),
        ([tiling(16, TILE | {"SPLIT_K": 2})], "sets SPLIT_K"),
        ([tiling(16, {"BLOCK_SIZE_M": 16})], "has no BLOCK_SIZE_N"),
        ([tiling(), tiling(16, WIDE, batch=2, slots=8)], "one tiling per token count"),
        ([tiling(), tiling(32, dtype="float32")], "file per dtype"),
        ([tiling(device=GPU | {"device": "../../x"})], "cannot be part of a file's name"),
        ([tiling(model="..")], "cannot name one"),
        ([tiling(experts=0)], "does not say them"),
        ([tiling(), tiling(32, config_hash="0")], "one model on one device"),
        ([tiling(), tiling(32, device=GPU | {"torch": "2.8"})], "one model on one device"),
    ],
)
def test_tiles_that_no_file_can_say_are_refused(target: str, results: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        write(target, policy(*results), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tuned_kernel_says_the_sizes_that_name_its_file() -> None:
    config = model_config_from_json(Path(__file__).parents[1] / "perfmodel" / "models" / "zaya1-8b.json")
    work = TilingWork("grouped_experts", "zaya1-8b", config, routing="uniform")
    subject = subject_of(work, Described(GPU, "3.6.0", "sm_90", (), (), 0, 0, "uniform"))
    assert (subject.experts, subject.expert_width) == (16, 2048)


# --- step times


def test_step_times_are_a_table_for_others(tmp_path: Path) -> None:
    results = [
        study(replace(LEVELS, mixing_weight=0.5), batch=4, context=768, simulated="made up"),
        study(TWO_FORWARD, KernelConfig(threads=2)),
    ]
    (path,) = write("step-times", policy(*results), tmp_path / "steps.csv")
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == list(COLUMNS) and all(COLUMNS.values())
    assert [(r["study"], r["trial"], r["chosen"]) for r in rows] == [
        ("zaya1-8b batch=4 context=768", "0", "false"),
        ("zaya1-8b batch=4 context=768", "1", "true"),
        ("zaya1-8b batch=1", "0", "false"),
        ("zaya1-8b batch=1", "1", "true"),
    ]
    single, two = rows[1], rows[3]
    assert (single["sampler"], single["slots"], single["proposal_levels"]) == ("single_forward", "21", "0;3")
    assert (single["cached_tokens"], single["context"], single["simulated"]) == ("125", "768", "made up")
    assert (two["slots"], two["forwards_per_step"], two["experts"], two["threads"]) == ("7", "2", "loop", "2")
    assert float(two["measured_step_seconds"]) == 0.02 and float(two["tokens_per_step"]) == pytest.approx(1 + 8 / 6)
    assert (rows[2]["draft_tokens"], rows[2]["tokens_per_step"]) == ("", "1.0")
    (path,) = write("step-times", policy(*results), tmp_path / "steps.json")
    document = strict_json(path)
    assert document["columns"] == COLUMNS and document["simulated"] == "made up"
    assert [row["measured_step_seconds"] for row in document["rows"]] == [0.01, 0.02] * 2
    assert all(set(row) == set(COLUMNS) for row in document["rows"])


def test_an_untimed_study_makes_no_table(tmp_path: Path) -> None:
    untimed = study(TWO_FORWARD)
    untimed = replace(untimed, trials=tuple(replace(t, step_seconds=None) for t in untimed.trials))
    with pytest.raises(UserError, match=r"no step was timed in zaya1-8b batch=1"):
        write("step-times", policy(untimed), tmp_path / "steps.csv")
    assert not list(tmp_path.iterdir())


# --- all of them

FITTING: dict[str, Any] = {  # a policy that each target can say
    "native": study(TWO_FORWARD, simulated="made up"),
    "vllm-moe": tiling(),
    "sglang-moe": tiling(),
    "tidar-vllm": study(TWO_FORWARD, simulated="made up"),
    "vllm-schedule": study(TWO_FORWARD, simulated="made up"),
    "sglang-diffusion": study(DENOISING, simulated="made up"),
    "lmdeploy-diffusion": study(DENOISING, simulated="made up"),
    "diffusion-gemma": study(DENOISING, simulated="made up"),
    "step-times": study(TWO_FORWARD, simulated="made up"),
}
SETTINGS = ["tidar-vllm", "vllm-schedule", "sglang-diffusion", "lmdeploy-diffusion", "diffusion-gemma"]


def test_the_registry_says_what_each_is() -> None:
    assert set(TARGETS) == set(FITTING)
    for name, target in TARGETS.items():
        assert target.name == name and target.loads in ("loads today", "needs a fork")
        assert all((target.engine, target.file, target.does, target.out)) and len(target.does) < 120
    assert {name for name, t in TARGETS.items() if t.loads == "loads today"} == {
        *("native", "vllm-moe", "sglang-moe", "step-times")
    }


@pytest.mark.parametrize("target", sorted(FITTING))
def test_what_was_simulated_stays_labelled_and_other_files_stay(target: str, tmp_path: Path) -> None:
    out = tmp_path / "out" if TARGETS[target].file.startswith("a folder") else tmp_path / "out.json"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    tiles = target.endswith("-moe")  # of which the decoding study beside them says nothing
    results = [tiling(routing="uniform"), study(TWO_FORWARD, simulated="other")] if tiles else [FITTING[target]]
    paths = write(target, policy(*results), out)
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    assert not [p for p in tmp_path.rglob(".*")]  # nothing half written
    said = next((p for p in paths if p.name.endswith(".provenance.yaml")), paths[0])
    document = yaml.safe_load(said.read_text())
    if target == "native":
        assert document["rules"][0]["evidence"]["simulated"] == "made up"
        return
    assert document["simulated"] == ("uniform routing" if tiles else "made up")
    assert document["command"] == "ridgepoint export"
    if said.suffix == ".yaml":
        assert document["schema"] == "ridgepoint-provenance-1" and document["target"] == target and document["says"]
        assert (document["model"], document["fingerprint"]) == ("zaya1-8b", GPU)
    if target in SETTINGS:
        (setting,) = document["settings"]
        assert setting["evidence"]["comparison"]["ratio"] == 2.0 and setting["evidence"]["simulated"] == "made up"
        assert setting["decoding"] == plain(FITTING[target].settings[1].decoding)
        assert any("engine=graphs" in line for line in setting["not_carried"])


@pytest.mark.parametrize("target", SETTINGS)
@pytest.mark.parametrize(
    ("kernels", "named"),
    [(KernelConfig(threads=2), "threads=2"), (KernelConfig(engine="lean", threads=2), "engine=lean")],
)
def test_settings_of_a_cpu_are_refused(target: str, kernels: KernelConfig, named: str, tmp_path: Path) -> None:
    decoding = FITTING[target].settings[1].decoding
    with pytest.raises(UserError, match=f"{target} cannot represent {named}"):
        write(target, policy(study(decoding, kernels)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", sorted({*SETTINGS} - {"vllm-schedule"}))
def test_an_engine_that_takes_one_setting_is_given_one(target: str, tmp_path: Path) -> None:
    decoding = FITTING[target].settings[1].decoding
    results = [study(decoding, context=c, batch=b) for b in (1, 8) for c in (128, 768)]
    with pytest.raises(UserError, match=r"there are 4 buckets \(zaya1-8b batch=1 context=128, .*--batch and --context"):
        write(target, policy(*results), tmp_path / "out")
    with pytest.raises(UserError, match=r"there are 2 buckets"):
        write(target, policy(*results).select(batch=8), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    chosen = policy(*results).select(batch=8, context=128)
    paths = write(target, chosen, tmp_path / "out")
    said = next(p for p in paths if p.name.endswith(".provenance.yaml"))
    (setting,) = yaml.safe_load(said.read_text())["settings"]
    assert (setting["batch"], setting["context"]) == (8, 128)
    with pytest.raises(UserError, match=r"nothing was tuned for batch=3; known: zaya1-8b batch=1 context=128"):
        policy(*results).select(batch=3)
    with_tiles = policy(*results, tiling(16), tiling(17)).select(batch=8)
    assert len(with_tiles.studies) == 2 == len(with_tiles.tilings)  # tiles serve every bucket


@pytest.mark.parametrize("target", sorted({*SETTINGS} - {"diffusion-gemma"}))
def test_autoregressive_decoding_is_nothing_to_set_and_said_in_words(target: str, tmp_path: Path) -> None:
    paths = write(target, policy(study(DecodingConfig())), tmp_path)
    assert {p.name for p in paths} <= {"sampling.json", f"{target}.provenance.yaml"}
    said = yaml.safe_load((tmp_path / f"{target}.provenance.yaml").read_text())
    assert "nothing to set" in said["says"][0]
    assert said["settings"][0]["evidence"]["prefers"].startswith("autoregressive decoding")
    write(target, policy(FITTING[target]), tmp_path / "again")  # drafts, and then no more
    with pytest.raises(UserError, match=r"again/[\w.-]+ would go on setting what is not to be set any more"):
        write(target, policy(study(DecodingConfig())), tmp_path / "again")


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"step-times"}))
def test_what_was_not_decided_is_not_exported(target: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no decision yet"):
        write(target, policy(replace(FITTING[target], decision=None)), tmp_path / "out")
    with pytest.raises(UserError, match="at least one study or tiling"):
        write(target, policy(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_policy_has_its_tilings_and_says_where_they_come_from(tmp_path: Path) -> None:
    """Tilings that beat their default serve the rules of the engine that runs them; no speed is claimed for them."""
    own = tiling(32, {"block": 64}, kernel="attention")
    results = [
        *(study(TWO_FORWARD, batch=b, context=c) for b in (1, 8) for c in (128, 768)),
        study(DecodingConfig(), KernelConfig(), batch=16),
        *(own, tiling(16, kernel="attention", default=True), tiling(16, kernel="router", default=True), tiling(16)),
        tiling(32, {"block": 8}, kernel="attention", dtype="float32"),
    ]
    (path,) = write("native", policy(*results), tmp_path / "deployment.yaml")
    found = load_deployment(path)
    bounds = [(r.max_batch, r.max_context) for r in found.rules]
    assert bounds == [(1, 128), (1, 768), (8, 128), (8, 768), (16, None)]
    # A kept default is said too: forwards of up to 16 tokens would take the tiling of 32 else.
    # What was tuned in another dtype is not this model's.
    tables = {"attention": {16: WIDE, 32: {"block": 64}}}
    assert [r.kernels.tilings for r in found.rules] == [tables] * 4 + [{}]
    assert found.rules[0].kernels.tiling("attention", 9) == WIDE
    assert found.rules[0].kernels.engine == GRAPHS.engine
    told = found.rules[0].evidence["tilings"]["kernels"]
    assert [(t["kernel"], t["tokens"], t["kept_default"]) for t in told] == [
        ("attention", 32, False),
        ("attention", 16, True),
    ]
    assert (told[0]["name"], told[0]["ratio"], told[0]["routing"]) == (own.name, 2.0, "recorded")
    prefers = [r.evidence["prefers"] for r in found.rules]
    assert prefers[:4] == ["two_forward"] * 4 and prefers[4].startswith("autoregressive decoding")


def main_error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command fails with."""
    assert ridgepoint.main([*words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_gpu_scripts_tilings_are_exported_from_their_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tilings.json`, as benchmarks/gpu.sh leaves it, is read like a tuning run's storage."""
    file = tmp_path / "tilings.json"
    file.write_text(json.dumps([plain(tiling()) | {"rank_correlation": 0.5}, plain(tiling(272, WIDE))]))
    assert read_tilings_file(file) == [tiling(), tiling(272, WIDE)]
    export = ["export", "--study", str(file), "--format", "vllm-moe", "--out", str(tmp_path / "out")]
    assert ridgepoint.main([*export, "--json"]) == 0
    (written, beside) = json.loads(capsys.readouterr().out)["paths"]
    assert list(strict_json(Path(written))) == ["triton_version", "16", "272"]
    assert "more than 272 tokens, prefills among them" in " ".join(yaml.safe_load(Path(beside).read_text())["says"])
    assert main_error(capsys, *export, "--batch", "16").endswith(f"known: {tiling().name}, {tiling(272).name}")
    assert ridgepoint.main(["study", "show", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["storage"] == str(file)
    for text in ("", "{}", '[{"name": "x"}]'):
        file.write_text(text)
        assert main_error(capsys, *export)
