"""Recipes are read strictly, hold what was published, and say beforehand what they will take."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ridgepoint
from hardware.files import UserError, plain
from runtime.config import ModelConfig, replace
from runtime.conversion import plan as planning
from runtime.conversion.objective import block_starts, conversion_loss, next_token_loss
from runtime.conversion.plan import plan, training_flops_per_token
from runtime.conversion.recipe import Recipe, Stage, load_recipe
from runtime.conversion.train import train
from tests.models import RECIPE, TINY, VARIANTS, config_of, noisy_model, random_ids

torch.set_num_threads(1)


def test_bundled_recipe_loads_and_an_unknown_one_lists_it() -> None:
    recipe = load_recipe("zaya-nano")
    assert recipe.stages[0].objective == "next_token"
    assert recipe.model is not None
    assert recipe.stages[-1].objective == "conversion" and recipe.model.mask_token_id == 259
    with pytest.raises(UserError, match="unknown recipe 'zaya-mini'; known: zaya-nano, zaya1-8b-diffusion"):
        load_recipe("zaya-mini")


def test_the_published_recipe_holds_the_published_figures() -> None:
    recipe = load_recipe("zaya1-8b-diffusion")
    assert recipe.model == replace(ModelConfig(), mask_token_id=4, max_position_embeddings=32768)
    stages = {stage.name: stage for stage in recipe.stages}
    assert list(stages) == ["pretrain_ar", "convert", "extend_context", "sft"]
    assert [stages[name].tokens for name in ("convert", "extend_context")] == [600e9, 500e9]
    assert [stages[name].length for name in ("convert", "extend_context")] == [2**15, 2**17]
    assert recipe.stage_config(recipe.model, 2).max_position_embeddings == 2**17
    lines = (Path(str(files("runtime.conversion"))) / "recipes" / "zaya1-8b-diffusion.yaml").read_text().splitlines()
    values = [line for line in lines if line.startswith("    ") and ": " in line]
    assert len(values) > 40
    for line in values:  # each says where it is from, or that it is ours
        assert re.search(r"# (.*\[\d\]|ours)", line) or "objective" in line, line


def test_a_stage_is_as_long_as_its_tokens() -> None:
    stage = replace(RECIPE.stages[0], steps=None, tokens=97)  # 2 * 24 tokens a step
    assert stage.total_steps == 3 and replace(stage, tokens=96).total_steps == 2
    assert stage.rate(2) == replace(stage, steps=3, tokens=None).rate(2)


def test_a_part_of_a_recipe_keeps_its_order() -> None:
    assert RECIPE.only(["second", "first"]) == RECIPE
    assert RECIPE.only(["second"]).stages == RECIPE.stages[1:]
    with pytest.raises(UserError, match="unknown stage 'third'; known: first, second"):
        RECIPE.only(["first", "third"])


def test_data_lie_where_the_recipe_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    stages = [plain(RECIPE.stages[0]) | {"data": "my.npy"}]
    (tmp_path / "sub" / "recipe.yaml").write_text(json.dumps(plain(RECIPE) | {"stages": stages}))
    monkeypatch.chdir(tmp_path)
    assert load_recipe("sub/recipe.yaml").stages[0].data == str(tmp_path / "sub" / "my.npy")


CONVERT_ANY = Recipe("any", 0, RECIPE.stages[1:])


def test_a_checkpoint_without_a_mask_gets_the_one_that_the_recipe_names() -> None:
    plain_model = replace(TINY, mask_token_id=None, bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
    named = replace(CONVERT_ANY, mask_token_id=28)
    assert named.config_from(plain_model, "it") == replace(plain_model, mask_token_id=28)
    assert CONVERT_ANY.config_from(TINY, "it") == named.config_from(TINY, "it") == TINY  # it has one already
    full = replace(CONVERT_ANY, model=replace(plain_model, mask_token_id=28))
    assert full.config_from(plain_model, "it").mask_token_id == 28
    for recipe, start, message in (
        (CONVERT_ANY, plain_model, "it has no mask_token_id: the recipe must name an unused id of its 29"),
        (replace(named, mask_token_id=29), plain_model, "0 <= mask_token_id < vocab_size = 29 must hold, but got 29"),
        (replace(named, mask_token_id=5), plain_model, "must be an id of its own, but 5 is a special of it"),
        (replace(named, mask_token_id=27), TINY, "was converted with mask_token_id 28, but the recipe says 27"),
        (full, replace(TINY, num_experts=5), r"its config\.json is not the recipe's model"),
        (CONVERT_ANY, replace(TINY, max_position_embeddings=19), "length <= max_position_embeddings .* 20 and 19"),
    ):
        with pytest.raises(UserError, match=message):
            recipe.config_from(start, "it")
    with pytest.raises(UserError, match="mask_token_id belongs into the model"):
        replace(full, mask_token_id=28)


def test_a_recipe_file_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(plain(RECIPE)))  # JSON is YAML
    assert load_recipe(str(path)) == RECIPE
    path.write_text(json.dumps(plain(RECIPE) | {"sede": 3}))
    with pytest.raises(UserError, match="unknown key 'sede'"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps >= 1 must hold, but got 0"),
        ({"steps": None}, "either steps or tokens, but stage 'first' got None and None"),
        ({"tokens": 100}, "either steps or tokens, but stage 'first' got 7 and 100"),
        ({"batch": 6, "micro_batches": 4}, "batch must be a multiple of micro_batches, but got 6 and 4"),
        ({"task_share": 1.5}, "0 <= task_share <= 1 must hold, but got 1.5"),
        ({"final_learning_rate": 1.0}, "0 < final_learning_rate <= learning_rate must hold"),
    ],
)
def test_impossible_stages(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(RECIPE.stages[0], **changes)


def test_impossible_recipes() -> None:
    with pytest.raises(UserError, match="at least one entry"):
        replace(RECIPE, stages=())
    with pytest.raises(UserError, match="must have different names"):
        replace(RECIPE, stages=RECIPE.stages[:1] * 2)
    for name in ("../first", "..", ""):
        with pytest.raises(UserError, match=rf"a stage's name must be a folder's, but is '{re.escape(name)}'"):
            replace(RECIPE, stages=(replace(RECIPE.stages[0], name=name),))
    for key, value in (("alpha", -1.0), ("clip", 0.0), ("warmup_steps", -1)):
        with pytest.raises(UserError, match=f"{key} >=? 0 must hold, but got {value}"):
            replace(RECIPE.stages[0], **{key: value})
    with pytest.raises(UserError, match="must hold in stage 'second', but got 20 and 10"):
        replace(RECIPE, stages=(RECIPE.stages[0], replace(RECIPE.stages[1], max_position_embeddings=10)))
    with pytest.raises(UserError, match="stage 'second' converts, so the model must have a mask_token_id"):
        replace(RECIPE, model=replace(RECIPE.model, mask_token_id=None))


def test_learning_rate_warms_up_then_falls_to_the_final_one() -> None:
    stage = Stage("s", "next_token", 1, 2, 0.1, 0.01, 100, warmup_steps=20)
    rates = [stage.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.005) and max(rates) == pytest.approx(0.1) == rates[19]
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, rel=0.15)


# What it takes


@pytest.mark.parametrize("name", ["shrunk", "five-one-heads", "biases-untied"])
@pytest.mark.parametrize("halves", [1, 2])
def test_counted_flops_are_those_of_a_step(name: str, halves: int) -> None:
    """Against torch's own count of the products of one forward and backward, in which every token has an expert.

    It counts every score, the masked ones too, so the formula is asked for rows in which that many keys are visible.
    """
    config, length = replace(config_of(VARIANTS[name]), mask_token_id=95, vocab_size=512), 96
    model = noisy_model(config)
    for layer in model.model.layers:
        layer.mlp.gate.balancing_biases[-1] = -9.0
    model.train().requires_grad_(True)
    tokens = random_ids(2, length + 1, 95)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if halves == 1:
            next_token_loss(model, tokens).total.backward()
        else:
            starts = torch.from_numpy(block_starts(np.random.default_rng(0), 2, length, 8))
            conversion_loss(model, tokens, starts).total.backward()
    stage = Stage("s", "conversion", 2, length, 0.1, 0.1, 1)
    found = plan(Recipe("r", 0, (stage,), config), config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    computed = 2 * halves * length - 1
    formula = 2 * length * training_flops_per_token(config, found.active_parameters, computed, halves)
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.06)
    assert found.stages[0].flops == 2 * length * training_flops_per_token(config, found.active_parameters, length, 2)


def test_what_does_not_fit_is_refused_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RECIPE.model is not None
    needed = plan(RECIPE, RECIPE.model).needed_bytes
    assert needed >= 24 * plan(RECIPE, RECIPE.model).parameters  # weights, moments, and the copy that is written
    monkeypatch.setattr(planning, "_free_main_bytes", lambda: needed)
    plan(RECIPE, RECIPE.model).check()
    monkeypatch.setattr(planning, "_free_main_bytes", lambda: needed - 1)
    with pytest.raises(UserError, match=r"training .* G parameters needs at least .* GB on cpu, where .* are free"):
        train(RECIPE, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for big in ("zaya1-8b-diffusion", "zaya-nano"):
        recipe = load_recipe(big)
        assert recipe.model is not None
        monkeypatch.setattr(planning, "_free_main_bytes", lambda: 10**10)
        assert plan(recipe, recipe.model).fits == (big == "zaya-nano")


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = ridgepoint.main(["convert", *arguments])
    return code, *capsys.readouterr()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_free_main_bytes", lambda: 10**10)
    monkeypatch.chdir(tmp_path)
    code, out, err = run_command(capsys, "--recipe", "zaya1-8b-diffusion", "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0 and err == "" and not found["fits"]
    assert found["parameters"] == 8_840_488_784 and found["weight_bytes"] == 4 * found["parameters"]
    assert [stage["steps"] * 2**22 // 10**9 for stage in found["stages"][1:3]] == [600, 500]
    code, out, _ = run_command(capsys, "--recipe", "zaya1-8b-diffusion", "--dry-run", "--stages", "sft")
    assert code == 0 and "sft" in out and "pretrain_ar" not in out and "does not fit" in out
    code, out, err = run_command(capsys, "--recipe", "zaya1-8b-diffusion", "--out", "never")
    assert code == 2 and out == "" and err.count("\n") == 1 and "convert --dry-run" in err
    code, _, err = run_command(capsys, "--recipe", "zaya-nano")
    assert code == 2 and "--out must name a folder" in err
    code, _, err = run_command(capsys, "--recipe", "zaya-nano", "--dry-run", "--device", "cuda:99")
    assert code == 2 and "no device cuda:99" in err
    assert list(tmp_path.iterdir()) == []
