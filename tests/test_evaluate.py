"""The evaluation command: one table of samplers, whose laws hold for any model; its card says what its JSON says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ridgepoint
from hardware.files import UserError, plain, read_json
from runtime import engine
from runtime.checkpoint import find_checkpoint, load_model, model_hash, random_model, save_model
from runtime.config import ModelConfig, replace
from runtime.conversion import card as card_module
from runtime.conversion import comparison, families
from runtime.conversion.comparison import BASELINE, CURVES, SETTINGS, SPARSE, InsideBaseline, choose, compare
from runtime.conversion.data import evaluation_problems
from runtime.conversion.families import RUNS, SOURCE
from runtime.conversion.tables import lossless_line
from runtime.conversion.tasks import FAMILIES
from runtime.model.zaya import Zaya
from runtime.tokenizer import EOS, VOCABULARY

torch.set_num_threads(1)
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
    eos_token_id=EOS,
    mask_token_id=259,
)
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 1,
    "model": {k: v for k, v in TINY.__dict__.items() if k not in ("layer_types", "rope_parameters")},
    "stages": [
        {
            "name": name,
            "objective": objective,
            "steps": 2,
            "batch": 2,
            "length": 24,
            "learning_rate": 0.001,
            "final_learning_rate": 0.001,
            "max_block": 5,
        }
        for name, objective in (("pretrain_ar", "next_token"), ("convert", "conversion"))
    ],
}
FEW = ("addition", "story")
SMALL: dict[str, Any] = {"problems": 1, "samples": 2, "ks": (1, 2), "max_new_tokens": 6, "rounds": 1}


@pytest.fixture(autouse=True)
def _few_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the families and short excerpts, so that each test takes a second or two."""
    monkeypatch.setattr(families, "SOURCE_BYTES", 8)
    for module in (comparison, families, card_module):
        monkeypatch.setattr(module, "FAMILIES", {name: FAMILIES[name] for name in FEW})


@pytest.fixture(scope="module")
def model() -> Zaya:
    return random_model(TINY, seed=2).freeze()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, model: Zaya) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(model, folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert ridgepoint.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


# The samplers' table


def test_lossless_settings_draw_from_the_autoregressive_distribution_and_the_others_do_not(model: Zaya) -> None:
    found = compare(model, **SMALL)
    assert list(found.rows) == list(SETTINGS)
    for label, row in found.rows.items():
        variation = row.likeness.total_variation
        assert variation is not None and row.likeness.temperature == found.temperature
        assert (variation.value < 1e-5) == row.decoding.lossless, label
        assert (row.speedup is None) == (row.pass_1_difference is None) == (label == BASELINE)
        steps = row.decoding.forwards_per_step
        assert 1 / steps <= row.tokens_per_forward.value <= (row.decoding.draft_tokens + 1) / steps or "/t=" in label
    assert found.rows[BASELINE].tokens_per_forward.value == found.rows[BASELINE].acceptance_length.value == 1
    assert found.rows["denoising/S=1"].acceptance_length.value == 6  # a block holds the whole answer
    assert found.rows["denoising/S=4"].tokens_per_forward.value == pytest.approx(6 / 4)
    assert {c.setting for c in found.lossless} == {x for x, d in SETTINGS.items() if d.lossless and x != BASELINE}
    assert set(found.curves) == set(CURVES)


def test_the_sparse_levels_come_from_other_problems_than_the_table_s(
    model: Zaya, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(model: Zaya, prompts: list[list[int]], *arguments: Any, **settings: Any) -> Any:
        seen.append(bytes(prompts[0][1:]).decode())
        return engine.generate(model, prompts, *arguments, **settings)

    monkeypatch.setattr(comparison, "generate", spy)
    found = compare(model, settings=[SPARSE], **SMALL)
    levels = found.rows[SPARSE].decoding.proposal_levels
    assert levels is not None and levels[0] == 0 and len(levels) == comparison.SPARSE_LEVELS
    first = evaluation_problems(FEW[0], 1, 0)[0].prompt
    assert seen[0] != first and seen[1] == first


def test_the_figures_do_not_depend_on_how_many_are_decoded_together(model: Zaya) -> None:
    """Nor do they change when repeated: everything but the clock's readings."""

    def steady(batch: int) -> dict[str, Any]:
        rows = compare(model, settings=["two_forward/w=0.5", "denoising/S=4"], batch=batch, **SMALL).rows
        timed = ("tokens_per_second", "speedup")
        return {label: {k: v for k, v in plain(row).items() if k not in timed} for label, row in rows.items()}

    together, alone = steady(64), steady(3)
    for label, row in together.items():
        nearly = [row.pop("likeness"), alone[label].pop("likeness")]  # a batch sums in another order
        assert row == alone[label]
        for name, estimate in nearly[0].items():
            if isinstance(estimate, dict):
                assert estimate["value"] == pytest.approx(nearly[1][name]["value"], rel=1e-4, abs=1e-6)


def test_samples_are_counted_for_the_problem_they_answer(model: Zaya, monkeypatch: pytest.MonkeyPatch) -> None:
    """Problem i is answered rightly by the first i samples, and greedily by odd ones."""
    tasks = evaluation_problems("addition", 4, 0)

    def answers(model: Zaya, prompts: list[list[int]], decoding: Any, *, seed: int, **settings: Any) -> Any:
        good = [i % 2 == 1 if decoding.temperature == 0 else seed - 7 < i for i in range(4)]
        tokens = [[*p.solution.encode(), EOS] if fine else [*b"= 1", EOS] for p, fine in zip(tasks, good, strict=True)]
        return SimpleNamespace(tokens=tokens, steps=[2] * 4)

    monkeypatch.setattr(comparison, "generate", answers)
    monkeypatch.setattr(comparison, "collect", lambda *arguments: None)
    monkeypatch.setattr(comparison, "likeness", lambda *arguments: None)
    found = comparison._sample(model, tasks, SETTINGS[BASELINE], 3, 150, 64, 7, lambda: None)
    assert found.rights == (0, 1, 2, 3)
    assert found.greedy == [False, True, False, True]
    lengths = [len(p.solution) + 1 for p in tasks]
    assert found.tokens == [i * n + (3 - i) * 4 for i, n in enumerate(lengths)] and found.steps == [6] * 4


def test_a_lossless_setting_outside_the_interval_is_named(model: Zaya) -> None:
    found = compare(model, settings=["two_forward"], **SMALL)
    assert "2 of 2." in lossless_line(found)
    lost = replace(found, lossless=(InsideBaseline("two_forward", 1, True), InsideBaseline("two_forward", 2, False)))
    assert "1 of 2; outside: two_forward (pass@2)." in lossless_line(lost)
    row = found.rows["two_forward"]
    wrong = {BASELINE: found.rows[BASELINE], "two_forward": replace(row, pass_at={1: replace(row.pass_at[1], value=1)})}
    assert [c.inside for c in comparison._inside_baseline(wrong)] == [False]


def test_a_choice_of_settings_has_the_baseline() -> None:
    assert list(choose(None)) == list(SETTINGS)
    assert list(choose(["denoising/S=1"])) == [BASELINE, "denoising/S=1"]
    with pytest.raises(UserError, match=r"unknown setting 'psychic'.*two_forward/w=0.5"):
        choose(["psychic"])


# The command


def test_convert_then_eval_writes_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole recipe, in small: the card's figures are those of the JSON, and every run is there."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(RECIPE))
    trained = json.loads(run(capsys, "convert", "--recipe", recipe, "--out", tmp_path / "run", "--json"))
    folder = Path(trained["checkpoint"])
    assert folder == tmp_path / "run" / "convert"
    options = ["--model", folder, "--before", tmp_path / "run" / "pretrain_ar", "--problems", 1, "--max-new-tokens", 4]
    options += ["--sampled-problems", 1, "--samples", 2, "--pass-at", "1,2", "--rounds", 1]
    options += ["--recipe", recipe, "--losses", tmp_path / "run" / "losses.json"]
    options += ["--out", tmp_path / "evaluation.json", "--card", tmp_path / "README.md"]
    printed = run(capsys, "eval", *options)
    found = read_json(tmp_path / "evaluation.json")
    card = (tmp_path / "README.md").read_text()
    assert all(block in card for block in printed.strip().split("\n\n"))
    assert set(found["samplers"]["rows"]) == set(SETTINGS)
    assert f"with the engine {found['engine']}" in card and found["engine"] == load_model(str(folder)).kernels.engine
    for label, row in found["samplers"]["rows"].items():
        speed = row["tokens_per_second"]
        assert f"| {label} | " in card
        assert f"{speed['value']:.0f} ({speed['low']:.0f}-{speed['high']:.0f})" in card
        assert set(row["pass_at"]) == {"1", "2"} and len(row["right"]) == len(FEW)
    assert set(found["families"]) == {*FEW, SOURCE}
    for name, family in found["families"].items():
        assert set(family["runs"]) == set(RUNS)
        before, after = (f"{family[key]:.3f}" for key in ("loss_before", "loss_after"))
        assert f"| {name} | {before} | {after} |" in card
        assert family["runs"]["K=16"]["equal_to_autoregressive"] == 1
        assert family["runs"]["K=16"]["disagreement"] == 0
        assert (family["runs"]["K=16"]["exact_match"] is None) == (name == SOURCE)
    tokens = sum(sum(f["runs"]["K=4"]["tokens"]) for n, f in found["families"].items() if n != SOURCE)
    steps = sum(sum(f["runs"]["K=4"]["steps"]) for n, f in found["families"].items() if n != SOURCE)
    assert found["verifiable"]["K=4"]["value"] == pytest.approx(tokens / steps)
    assert card.count("| pretrain_ar |") == card.count("| convert |") == 1


def test_eval_compares_the_settings_asked_for(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", checkpoint, "--problems", 1, "--sampled-problems", 1, "--samples", 1, "--pass-at", "1"]
    options += ["--max-new-tokens", 3, "--rounds", 1, "--settings", "two_forward,denoising/S=4"]
    options += ["--engine", "eager"]
    found = json.loads(run(capsys, "eval", *options, "--json"))
    assert found["engine"] == "eager"
    assert list(found["samplers"]["rows"]) == [BASELINE, "two_forward", "denoising/S=4"]
    assert found["samplers"]["curves"]["denoising"]["settings"] == [BASELINE, "denoising/S=4"]
    assert "single_forward" not in found["samplers"]["curves"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--problems", "0"], ["problems >= 1"]),
        (["--sampled-problems", "0"], ["problems >= 1"]),
        (["--samples", "8"], ["1 <= k <= samples = 8", "k = 16"]),
        (["--pass-at", "0"], ["1 <= k <= samples = 16", "k = 0"]),
        (["--pass-at", "all"], ["--pass-at must be whole numbers", "all"]),
        (["--rounds", "0"], ["rounds >= 1"]),
        (["--batch", "0"], ["batch >= 1"]),
        (["--settings", "two_forward,psychic"], ["unknown setting 'psychic'", "single_forward/sparse"]),
        (["--recipe", "nonesuch"], ["unknown recipe 'nonesuch'"]),
        (["--card", "never.md"], ["losses.json"]),
    ],
    ids=lambda v: "-".join(v)[:30],
)
def test_bad_input_is_one_line(
    options: list[str], parts: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ridgepoint.main(["eval", "--model", str(checkpoint), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    for part in parts:
        assert part in err


def test_models_that_cannot_be_judged_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, message in (({"mask_token_id": None}, "no mask_token_id"), ({"vocab_size": 300}, "vocabulary")):
        save_model(random_model(replace(TINY, **change), seed=2), tmp_path)
        assert ridgepoint.main(["eval", "--model", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_the_shipped_card_and_evaluation_are_of_the_shipped_weights() -> None:
    found = model_hash(load_model("zaya-nano"))
    assert f"model hash `{found}`" in (find_checkpoint("zaya-nano") / "README.md").read_text()
