"""A run can be killed anywhere and still end in the same weights; parts of a batch train like the whole of it."""

from __future__ import annotations

import itertools
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hardware.files import UserError, plain
from runtime.checkpoint import load_model, load_tensors, save_model, save_tensors
from runtime.config import replace
from runtime.conversion import run as running
from runtime.conversion import train as training
from runtime.conversion.data import training_batches
from runtime.conversion.objective import next_token_loss
from runtime.conversion.recipe import Recipe
from runtime.conversion.train import train
from tests.models import RECIPE, noisy_model, relative_error

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
        (
            "state.safetensors",
            _cut,
            r"state\.safetensors \(truncated .*; restore that file, or remove .* to begin again",
        ),
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


RESUMED = replace(  # everything that a resumed run must repeat, at once
    RECIPE,
    stages=(
        replace(RECIPE.stages[0], batch=4, micro_batches=2, dtype="bfloat16", max_position_embeddings=72),
        replace(RECIPE.stages[1], batch=4, micro_batches=4, loss_on="solutions", max_position_embeddings=80),
    ),
    evaluate_every=7,
)
CHILD = """
import sys
from pathlib import Path
from hardware.files import build, read_json
from runtime.conversion import train as training
from runtime.conversion.recipe import Recipe

step = training._step
def told(*arguments):
    print("step", flush=True)
    return step(*arguments)
training._step, training.LOG_EVERY, training.SAVE_EVERY = told, 1, 3
training.train(build(Recipe, read_json(sys.argv[1]), "recipe"), Path(sys.argv[2]), threads=1)
"""


def test_a_process_killed_at_a_random_moment_resumes_to_the_same_losses(tmp_path: Path) -> None:
    """SIGKILL from outside: no handler, no finally, no flush."""
    (tmp_path / "recipe.json").write_text(json.dumps(plain(RESUMED)))
    kill_at = random.Random().randrange(1, 13)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "recipe.json"), str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        for _ in range(kill_at):
            assert child.stdout.readline() == "step\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL, kill_at
    train(RESUMED, tmp_path / "killed")
    train(RESUMED, tmp_path / "whole")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    evaluations = [json.loads((tmp_path / run / "evaluations.json").read_text()) for run in ("killed", "whole")]
    assert evaluations[0] == evaluations[1], kill_at


def test_a_full_disk_stops_the_run_in_one_line_and_leaves_the_last_save(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real limit on the size of files, so that the system itself refuses the write, in the second save."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    step = training._step

    def limited(run: Any, *arguments: Any) -> Any:
        if run.step == 4:
            size = (tmp_path / "state.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
        return step(run, *arguments)

    monkeypatch.setattr(training, "_step", limited)
    try:
        with pytest.raises(UserError, match=r"cannot write .*state\.safetensors: File too large") as error:
            train(RECIPE, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert int(load_tensors(tmp_path / "state.safetensors")["position"]) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"state.safetensors", "progress.json", "losses.json"}
    monkeypatch.undo()
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    train(RECIPE, tmp_path)
    assert_same_run(tmp_path, finished)


def test_a_run_of_an_earlier_version_resumes(finished: Path, tmp_path: Path) -> None:
    """Its progress.json lacks what came later; the defaults mean what it did."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    progress = json.loads((tmp_path / "progress.json").read_text())
    del progress["model"], progress["start"], progress["recipe"]["evaluate_every"], progress["recipe"]["mask_token_id"]
    for stage in progress["recipe"]["stages"]:
        for key in ("tokens", "micro_batches", "dtype", "data", "max_position_embeddings"):
            del stage[key]
    (tmp_path / "progress.json").write_text(json.dumps(progress))
    assert train(RECIPE, tmp_path) == tmp_path / "second"


def gradients_of(recipe: Recipe, folder: Path, steps: int = 3) -> Tensor:
    """The gradients of the first steps of a one-stage recipe, weights unchanged; [steps, parameters]."""
    run = running.open_run(recipe, folder, None, "cpu")
    found = []

    def keep() -> None:
        found.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))

    run.optimizer.step = keep  # type: ignore[method-assign, assignment]
    (stage,) = recipe.stages
    stage = replace(stage, clip=1e9, balance_rate=0.0)
    _, batches = training._sources(run, recipe, folder)[0]
    for _ in range(steps):
        training._step(run, recipe, stage, next(batches))
        run.step += 1
    return torch.stack(found)


@pytest.mark.parametrize("loss_on", ["all", "solutions"])
@pytest.mark.parametrize("objective", ["next_token", "conversion"])
def test_a_step_in_parts_has_the_gradients_of_the_whole_batch(objective: str, loss_on: str, tmp_path: Path) -> None:
    stage = replace(RECIPE.stages[1], objective=objective, loss_on=loss_on, batch=6, task_share=0.5)
    recipe = replace(RECIPE, stages=(stage,))
    whole = gradients_of(recipe, tmp_path)
    for parts in (2, 6):
        found = gradients_of(replace(recipe, stages=(replace(stage, micro_batches=parts),)), tmp_path)
        assert relative_error(found, whole) < 1e-5


def test_bfloat16_trains_float32_weights(tmp_path: Path) -> None:
    stage = replace(RECIPE.stages[1], steps=25, batch=4, task_share=1.0, learning_rate=0.02, final_learning_rate=0.02)
    exact, rounded = (replace(RECIPE, stages=(replace(stage, dtype=d),)) for d in ("float32", "bfloat16"))
    one, other = gradients_of(exact, tmp_path, 1), gradients_of(rounded, tmp_path, 1)
    assert other.dtype == torch.float32
    assert 1e-4 < relative_error(other, one) < 0.1  # the products are rounded, and only they
    assert torch.nn.functional.cosine_similarity(other, one).item() > 0.99
    losses = {}
    for name, recipe in (("float32", exact), ("bfloat16", rounded)):
        train(recipe, tmp_path / name)
        losses[name] = [e["mask"] for e in json.loads((tmp_path / name / "losses.json").read_text())]
    assert losses["bfloat16"][0] > 5 and np.mean(losses["bfloat16"][-5:]) < 4.5
    assert np.mean(losses["bfloat16"][-5:]) == pytest.approx(np.mean(losses["float32"][-5:]), rel=0.1)
    state = load_tensors(tmp_path / "bfloat16" / "state.safetensors")
    assert {t.dtype for n, t in state.items() if n != "position"} == {torch.float32}
    assert bool((state["model.model.norm.weight"].bfloat16().float() != state["model.model.norm.weight"]).any())


def test_batches_without_a_label_leave_everything_as_it_was(tmp_path: Path) -> None:
    """One row a batch, mostly source text, and only solutions are judged."""
    stage = replace(RECIPE.stages[1], batch=1, steps=12, loss_on="solutions", task_share=0.2, partial_share=0.0)
    recipe = replace(RECIPE, stages=(stage,), seed=8)
    batches = list(itertools.islice(training_batches(8, 1, 21, task_share=0.2, weights=stage.family_weights), 12))
    labelled = [step for step, batch in enumerate(batches, 1) if batch.solutions[:, 1:].any()]
    assert 0 < len(labelled) < 10
    entries = json.loads((train(recipe, tmp_path).parent / "losses.json").read_text())
    assert [e["step"] for e in entries] == labelled
    assert all(np.isfinite(e["next_token"]) for e in entries)
    run = running.open_run(recipe, tmp_path / "other", None, "cpu")
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    empty = next(batch for batch in batches if not batch.solutions.any())
    assert training._step(run, recipe, stage, empty) == training._Means(None, None)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())


def test_evaluations_do_not_disturb_the_training(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(RECIPE, evaluate_every=3), tmp_path)
    assert_same_run(tmp_path, finished)
    entries = json.loads((tmp_path / "evaluations.json").read_text())
    assert [(e["stage"], e["step"]) for e in entries] == [
        *(("first", step) for step in (3, 6, 7)),
        *(("second", step) for step in (3, 6)),
    ]
    for entry in entries:
        masked = entry["stage"] == "second"
        names = {"next_token_tasks", "next_token_source", "exact_match"}
        names |= {"mask_tasks", "mask_source", "acceptance_length"} if masked else set()
        assert set(entry) - {"stage", "step"} == names
        assert 0 <= entry["exact_match"] <= 1 <= entry.get("acceptance_length", 1) <= 17
    shown = [line for line in capsys.readouterr().err.splitlines() if "held out" in line]
    assert len(shown) == len(entries)
    assert f"second, step 6, held out: next_token_tasks {entries[-1]['next_token_tasks']:.3f}, mask_" in shown[-1]
    assert not (finished / "evaluations.json").exists()


def test_held_out_losses_are_those_of_the_held_out_text(tmp_path: Path) -> None:
    """Those of the final weights, computed from the text itself."""
    stage = replace(RECIPE.stages[0], steps=40, batch=4, learning_rate=0.02, final_learning_rate=0.02, task_share=1.0)
    folder = train(replace(RECIPE, stages=(stage,), evaluate_every=40), tmp_path)
    model = load_model(str(folder))
    last = json.loads((tmp_path / "evaluations.json").read_text())[-1]
    for kind, share in (("tasks", 1.0), ("source", 0.0)):
        batch = next(training_batches(0, 8, stage.length + 1, task_share=share, split="test"))
        with torch.no_grad():
            expected = next_token_loss(model, torch.from_numpy(batch.tokens)).total
        assert last[f"next_token_{kind}"] == pytest.approx(float(expected), rel=1e-5)
    assert last["next_token_tasks"] < last["next_token_source"]  # it was trained on tasks only


def test_a_stage_extends_the_context_of_its_checkpoint_and_of_later_ones(tmp_path: Path) -> None:
    stages = (RECIPE.stages[0], replace(RECIPE.stages[1], max_position_embeddings=200))
    stages += (replace(RECIPE.stages[1], name="third"),)
    train(replace(RECIPE, stages=tuple(replace(s, steps=1) for s in stages)), tmp_path)
    contexts = [load_model(str(tmp_path / s.name)).config.max_position_embeddings for s in stages]
    assert contexts == [128, 200, 200]
