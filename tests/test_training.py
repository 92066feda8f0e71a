"""A run can be killed anywhere and still end in the same weights; parts of a batch train like the whole of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hardware.files import UserError
from runtime.checkpoint import load_model, load_tensors, save_model, save_tensors
from runtime.config import replace
from runtime.conversion import run as running
from runtime.conversion import train as training
from runtime.conversion.train import train
from tests.models import RECIPE, noisy_model

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _frequent_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    monkeypatch.setattr(training, "SAVE_EVERY", 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed, saved and logged as often as the others."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LOG_EVERY", 1)
        patch.setattr(training, "SAVE_EVERY", 3)
        assert train(RECIPE, folder) == folder / "second"
    return folder


def assert_same_run(folder: Path, finished: Path) -> None:
    assert json.loads((folder / "losses.json").read_text()) == json.loads((finished / "losses.json").read_text())
    for stage in ("first", "second"):
        mine, other = (load_tensors(f / stage / "model.safetensors") for f in (folder, finished))
        assert mine.keys() == other.keys()
        for name, tensor in other.items():
            assert torch.equal(mine[name], tensor), (stage, name)


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def killed_at(function: Callable[..., Any], call: int, *, after: bool) -> Callable[..., Any]:
    """The function, killed at its n-th call, before or after its work."""
    calls = iter(range(10**6))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        now = next(calls) == call
        if now and not after:
            raise Killed
        result = function(*args, **kwargs)
        if now:
            raise Killed
        return result

    return wrapped


@pytest.mark.parametrize("step", [0, 2, 3, 5, 6, 7, 9, 12])
def test_a_run_killed_in_any_step_resumes_to_the_same_weights(
    step: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "_step", killed_at(training._step, step, after=True))
        train(RECIPE, tmp_path)
    train(RECIPE, tmp_path)
    assert_same_run(tmp_path, finished)


def test_a_run_killed_after_any_of_its_writes_resumes_to_the_same_weights(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt gets one write further than the one before, until one needs no more."""
    for call in range(100):
        with monkeypatch.context() as patch:
            left = [call % 4]  # of all three together; a save of the state is three writes

            def counted(function: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
                def wrapped(*args: Any, **kwargs: Any) -> Any:
                    result = function(*args, **kwargs)
                    left[0] -= 1
                    if left[0] < 0:
                        raise Killed
                    return result

                return wrapped

            for name in ("write_atomic", "save_tensors", "save_model"):
                patch.setattr(running, name, counted(getattr(running, name)))
            try:
                train(RECIPE, tmp_path)
                break
            except Killed:
                continue
    assert call > 3
    assert_same_run(tmp_path, finished)


def test_a_finished_run_does_nothing_more(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    monkeypatch.setattr(training, "_step", lambda *a: pytest.fail("a finished run was trained on"))
    assert train(RECIPE, finished) == finished / "second"
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_losses_are_logged_by_stage_and_step(finished: Path) -> None:
    entries = json.loads((finished / "losses.json").read_text())
    assert [(e["stage"], e["step"]) for e in entries] == [
        (stage.name, step) for stage in RECIPE.stages for step in range(1, stage.steps + 1)
    ]
    assert all(np.isfinite(e["next_token"]) for e in entries)
    assert [("mask" in e) for e in entries] == [e["stage"] == "second" for e in entries]
    assert [e["rate"] for e in entries[:7]] == [RECIPE.stages[0].rate(s) for s in range(7)]


def test_training_learns(tmp_path: Path) -> None:
    stage = replace(RECIPE.stages[0], steps=60, batch=8, learning_rate=0.02, final_learning_rate=0.02, task_share=1.0)
    train(replace(RECIPE, stages=(stage,)), tmp_path)
    losses = [e["next_token"] for e in json.loads((tmp_path / "losses.json").read_text())]
    assert losses[0] > 5 and np.mean(losses[-5:]) < losses[0] - 1.5


def test_balancing_moves_towards_equal_load_and_keeps_the_skip_experts_bias() -> None:
    model = noisy_model()
    routers = [layer.mlp.gate for layer in model.model.layers]
    before = [router.balancing_biases - router.balancing_biases[-1] for router in routers]
    routes = [torch.zeros(40, dtype=torch.int64), torch.arange(40) % 4]
    training._balance(model, routes, replace(RECIPE.stages[0], balance_rate=0.01, skip_share=0.05))
    steps = torch.tensor([[-0.01, 0.01, 0.01, 0.01, 0.01], [-0.01, -0.01, -0.01, -0.01, 0.01]])
    for router, old, step in zip(routers, before, steps, strict=True):
        assert float(router.balancing_biases[-1]) == pytest.approx(
            -1, abs=1e-6
        )  # what transformers sets it to after loading a file
        found = router.balancing_biases + 1 - old  # routing sees differences only
        torch.testing.assert_close(found, step - step[-1], rtol=0, atol=1e-6)


def test_starting_from_a_checkpoint(tmp_path: Path) -> None:
    model = noisy_model(RECIPE.model)
    save_model(model, tmp_path / "start")
    still = replace(RECIPE.stages[0], steps=1, learning_rate=1e-12, final_learning_rate=1e-12, balance_rate=0.0)
    end = train(replace(RECIPE, stages=(still,)), tmp_path / "run", start_from=str(tmp_path / "start"))
    for name, tensor in load_model(str(end)).named_parameters():
        torch.testing.assert_close(tensor, model.get_parameter(name), rtol=0, atol=1e-8)
    other = replace(RECIPE, model=replace(RECIPE.model, num_experts=5))
    with pytest.raises(UserError, match=r"its config\.json is not the recipe's model"):
        train(other, tmp_path / "other", start_from=str(tmp_path / "start"))


def test_a_folder_of_another_recipe_is_refused(finished: Path) -> None:
    for other in (replace(RECIPE, seed=4), replace(RECIPE, stages=RECIPE.stages[:1])):
        with pytest.raises(UserError, match="holds a run of another recipe; choose another folder"):
            train(other, finished)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _not_json(path: Path) -> None:
    path.write_text("[{")


def _other_tensors(path: Path) -> None:
    save_tensors({"something": torch.zeros(2)}, path)


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("state.safetensors", _cut, r"cannot read .*state\.safetensors \(truncated or not safetensors\)"),
        ("state.safetensors", _not_json, r"cannot read .*state\.safetensors \(truncated or not safetensors\)"),
        ("state.safetensors", _remove, r"cannot read .*state\.safetensors"),
        ("state.safetensors", _other_tensors, r"state\.safetensors is no saved state of a training run"),
        ("progress.json", _cut, r"progress\.json is not valid JSON"),
        ("losses.json", _not_json, r"cannot read .*losses\.json"),
        ("losses.json", _remove, r"cannot read .*losses\.json"),
    ],
)
def test_damaged_runs_are_refused_in_one_line(
    finished: Path, tmp_path: Path, file: str, damage: Callable[[Path], None], message: str
) -> None:
    for name in ("state.safetensors", "progress.json", "losses.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    damage(tmp_path / file)
    with pytest.raises(UserError, match=message) as error:
        train(RECIPE, tmp_path)
    assert "\n" not in str(error.value)


def test_a_loss_that_explodes_stops_the_run(tmp_path: Path) -> None:
    wild = replace(RECIPE.stages[0], learning_rate=1e30, final_learning_rate=1e30, steps=50)
    with pytest.raises(UserError, match=r"the loss is not finite at step .* of stage first; lower the learning rate"):
        train(replace(RECIPE, stages=(wild,)), tmp_path)
