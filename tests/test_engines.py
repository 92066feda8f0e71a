"""Every engine says what the eager one says: the tokens of every sampler, and the state its forwards leave behind."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from benchmarks import engine_equality
from benchmarks.engine_equality import settings
from runtime.config import DecodingConfig
from runtime.engine import generate
from runtime.engines import use_engine
from runtime.model.zaya import Zaya
from tests.interpreter import interpreted
from tests.models import SLIDING, TINY, config_of, noisy_model, random_ids

torch.set_num_threads(1)
SETTINGS = settings(3)


@cache
def tiny() -> Zaya:
    return noisy_model(seed=2)


@cache
def sliding() -> Zaya:
    return noisy_model(config_of(SLIDING | {"mask_token_id": 95}), seed=4)


def tokens_of(
    model: Zaya, engine: str, decoding: DecodingConfig, rows: int, batch: int | None = None
) -> list[list[int]]:
    """Of prompts of 1, 4, 7 ... tokens, with limits that let sequences end at different steps."""
    ids = random_ids(rows, 3 * rows, TINY.vocab_size - 1, seed=3).tolist()
    prompts = [row[: 1 + 3 * i] for i, row in enumerate(ids)]
    limits = [24 - 5 * (i % 3) for i in range(rows)]
    use_engine(model, engine)
    return generate(model, prompts, decoding, max_new_tokens=limits, stop_tokens=(), batch=batch, seed=5).tokens


@pytest.mark.parametrize("decoding", SETTINGS, ids=map(engine_equality.described, SETTINGS))
def test_the_lean_engine_commits_eagers_tokens(decoding: DecodingConfig) -> None:
    for model in (tiny(), sliding()):
        assert tokens_of(model, "lean", decoding, 3) == tokens_of(model, "eager", decoding, 3)


@pytest.mark.parametrize("decoding", SETTINGS[2:5:2], ids=map(engine_equality.described, SETTINGS[2:5:2]))
def test_slots_that_are_refilled_commit_the_same(decoding: DecodingConfig) -> None:
    assert tokens_of(tiny(), "lean", decoding, 7, batch=2) == tokens_of(tiny(), "eager", decoding, 7)


def test_the_measured_equality_of_the_shipped_model(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--prompts", "3", "--new-tokens", "12", "--draft-tokens", "3", "--json"]
    assert engine_equality.main(["--engines", "lean", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["dtype"] for row in found["tokens"]} == {row["dtype"] for row in found["logits"]}
    assert not any(row["first"] for row in found["tokens"] if row["dtype"] == "float32")
    for row in found["logits"]:
        assert row["error"] < (1e-5 if row["dtype"] == "float32" else 1e-2)
        assert row["differing_argmaxes"] <= (0 if row["dtype"] == "float32" else 2)


@pytest.mark.parametrize("part", ["forwards", "tokens"])
def test_interpreted_triton_kernels_in_whole_steps(part: str) -> None:
    interpreted("tests.interpreted_engine", part)
