"""Any checkpoint of the family converts, in its own vocabulary and on its user's own tokens."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.numpy import save_file
from transformers import ZayaForCausalLM

import ridgepoint
from hardware.files import UserError, plain
from runtime.checkpoint import load_model, save_model
from runtime.config import DecodingConfig, replace
from runtime.conversion import train as training
from runtime.conversion.data import encoding_of, training_batches
from runtime.conversion.recipe import Recipe, Stage
from runtime.conversion.token_file import TokenFile
from runtime.conversion.train import train
from runtime.engine import generate
from runtime.tokenizer import ByteTokenizer, load_tokenizer
from tests.models import RECIPE, TINY, VARIANTS, add_noise, noisy_model, random_ids, relative_error
from tests.test_model import load_reference, reference_config

torch.set_num_threads(1)
VOCABULARY, MASK = 321, 317  # of the checkpoint; the tokenizer knows fewer ids
STAGE = Stage("convert", "conversion", 2, 24, 0.003, 0.001, 4, warmup_steps=1, max_block=6, partial_share=0.3)
ANY = Recipe("any", 5, (STAGE, replace(STAGE, name="sft", loss_on="solutions", steps=2)), mask_token_id=MASK)


def write_tokenizer(folder: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["sort the list, add and carry, return the answer" for _ in range(3)], trainer)
    library.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=["five-one-heads", "biases-untied"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `transformers` writes it, in two shards and with a tokenizer: unconverted, of odd sizes."""
    folder = tmp_path_factory.mktemp("published")
    keys = VARIANTS[request.param] | {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
    reference = ZayaForCausalLM(reference_config(keys))
    with torch.no_grad():
        add_noise(reference)
    reference.save_pretrained(folder, max_shard_size="100KB")
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_a_published_checkpoint_converts_decodes_and_loads_in_the_reference(published: Path, tmp_path: Path) -> None:
    assert len(list(published.glob("model-*.safetensors"))) > 1
    folder = train(ANY, tmp_path, start_from=str(published))
    model, before = load_model(str(folder)), load_model(str(published))
    assert model.config == replace(before.config, mask_token_id=MASK) and before.config.mask_token_id is None
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    tokenizer = load_tokenizer(folder)
    prompt = [1, *tokenizer.encode("sort the list")]
    assert prompt == [1, *load_tokenizer(published).encode("sort the list")]
    drafted = generate(model, [prompt], DecodingConfig("two_forward", draft_tokens=5), max_new_tokens=20)
    assert drafted.tokens == generate(model, [prompt], DecodingConfig(), max_new_tokens=20).tokens
    assert isinstance(tokenizer.decode(drafted.tokens[0]), str)
    ids = random_ids(2, 15, VOCABULARY)
    with torch.no_grad():
        assert relative_error(model.logits(ids), load_reference(folder)(ids).logits) < 1e-4
        assert relative_error(model.logits(ids), before.logits(ids)) > 1e-3  # it was trained
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert {e["stage"] for e in losses} == {"convert", "sft"} and all(np.isfinite(e["mask"]) for e in losses)


def test_a_conversion_resumes_without_the_checkpoint_and_not_from_another(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    run, whole = tmp_path / "run", tmp_path / "whole"
    steps = iter([False, False, True])

    def stopped(*arguments: Any) -> Any:
        if next(steps):
            raise KeyboardInterrupt
        return step(*arguments)

    step = training._step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "_step", stopped)
        train(ANY, run, start_from=str(published))
    save_model(noisy_model(), tmp_path / "other")
    with pytest.raises(UserError, match=r"holds a run that started from .*published.*; choose another folder"):
        train(ANY, run, start_from=str(tmp_path / "other"))
    folders = [train(ANY, run), train(ANY, whole, start_from=str(published))]
    first, second = (load_model(str(folder)).state_dict() for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert (folders[0] / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()


def test_the_command_converts(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "any.yaml"
    stages = tuple(replace(stage, max_position_embeddings=60) for stage in ANY.stages)
    recipe.write_text(json.dumps(plain(replace(ANY, evaluate_every=1, stages=stages))))
    options = ["--recipe", str(recipe), "--stages", "sft", "--from", str(published), "--threads", "1"]
    assert ridgepoint.main(["convert", *options, "--out", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] == str(tmp_path / "run" / "sft") and found["losses"][-1]["step"] == 2
    assert [e["step"] for e in found["evaluations"]] == [1, 2]
    assert ridgepoint.main(["convert", "--recipe", str(recipe), "--out", str(tmp_path / "none")]) == 2
    assert "recipe any has no model of its own: give a checkpoint" in capsys.readouterr().err


def test_built_in_text_is_in_the_checkpoints_own_ids(published: Path) -> None:
    tokenizer = load_tokenizer(published)
    encoding = encoding_of(tokenizer, load_model(str(published)).config)
    batch = next(training_batches(0, 30, 60, encoding=encoding))
    assert batch.tokens.shape == (30, 60) and (batch.tokens[:, 0] == 1).all() and batch.tokens.max() < 300
    texts = [tokenizer.decode(row) for row in batch.tokens]
    byte_rows = next(training_batches(0, 30, 60)).tokens
    for text, row in zip(texts, byte_rows, strict=True):  # the same draws, so the same text, in fewer tokens
        assert text.replace("\ufffd", "")[:20] == ByteTokenizer().decode(row).replace("\ufffd", "")[:20]
    judged = [tokenizer.decode(row[mark]) for row, mark in zip(batch.tokens, batch.solutions, strict=True)]
    assert any(judged) and not all(judged)


def test_a_checkpoint_whose_ids_mean_nothing_needs_token_files(tmp_path: Path) -> None:
    save_model(noisy_model(TINY), tmp_path / "start")
    recipe = replace(ANY, mask_token_id=None, stages=(replace(STAGE, steps=2),))
    with pytest.raises(UserError, match=r"without a tokenizer\.json the vocabulary must be the 264 bytes.* 29 ids"):
        train(recipe, tmp_path / "run", start_from=str(tmp_path / "start"))
    np.save(tmp_path / "tokens.npy", random_ids(1, 600, 28)[0].numpy())
    recipe = replace(recipe, stages=(replace(STAGE, steps=2, data=str(tmp_path / "tokens.npy")),), evaluate_every=2)
    folder = train(recipe, tmp_path / "run", start_from=str(tmp_path / "start"))
    assert load_model(str(folder)).config == TINY
    (entry,) = json.loads((tmp_path / "run" / "evaluations.json").read_text())
    assert {"next_token_data", "mask_data", "acceptance_length"} < set(entry) and "exact_match" not in entry


# Token files


def write_tokens(path: Path, tokens: np.ndarray, judged: np.ndarray | None = None) -> TokenFile:
    if path.suffix == ".npy":
        np.save(path, tokens)
    else:
        save_file({"tokens": tokens} | ({} if judged is None else {"judged": judged}), path)
    return TokenFile(path)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.int64])
def test_rows_of_a_token_file_are_its_tokens_and_repeat_by_seed_and_step(
    suffix: str, kind: type, tmp_path: Path
) -> None:
    tokens = np.arange(1000, dtype=kind)
    judged = tokens % 3 == 0
    file = write_tokens(tmp_path / f"t{suffix}", tokens, judged)
    batches = file.batches(1, 20, 30, vocabulary=1000)
    first, second = next(batches), next(batches)
    assert first.tokens.dtype == np.int64 and first.tokens.shape == (20, 30)
    assert (np.diff(first.tokens) == 1).all() and first.tokens.max() < 950  # the last 50 are held out
    assert len(np.unique(first.tokens[:, 0])) > 10 and not np.array_equal(first.tokens, second.tokens)
    again = next(file.batches(1, 20, 30, vocabulary=1000, start_step=1))
    np.testing.assert_array_equal(again.tokens, second.tokens)
    assert next(file.batches(1, 50, 30, vocabulary=1000, split="test")).tokens.min() >= 950
    assert file.has_judged == (suffix == ".safetensors")
    if file.has_judged:
        np.testing.assert_array_equal(first.solutions, first.tokens % 3 == 0)
    edge = write_tokens(tmp_path / f"edge{suffix}", tokens[:40]).batches(0, 200, 38, vocabulary=1000)
    assert set(next(edge).tokens[:, 0]) == {0}  # 38 of 40 are for training: one place
    with pytest.raises(UserError, match=r"a row needs 39 tokens, but the train part .* has 38"):
        TokenFile(tmp_path / f"edge{suffix}").batches(0, 1, 39, vocabulary=1000)
    with pytest.raises(UserError, match=r"0 <= id < vocab_size = 500 must hold, but ids lie in \[\d+, \d{3}\]"):
        next(file.batches(1, 20, 30, vocabulary=500))


def test_fine_tuning_on_a_token_file_judges_what_it_marks(tmp_path: Path) -> None:
    tokens = random_ids(1, 400, 256)[0].numpy()
    marked = write_tokens(tmp_path / "marked.safetensors", tokens, np.zeros(400, dtype=np.bool_))
    stage = replace(RECIPE.stages[1], loss_on="solutions", data=str(marked.path), steps=2)
    folder = train(replace(RECIPE, stages=(stage,)), tmp_path / "run")
    assert json.loads((folder.parent / "losses.json").read_text()) == []  # nothing is judged, so nothing is learned
    np.save(tmp_path / "plain.npy", tokens)
    stage = replace(stage, data=str(tmp_path / "plain.npy"))
    with pytest.raises(UserError, match=r"loss on solutions: .*plain\.npy must be \.safetensors with `judged`"):
        train(replace(RECIPE, stages=(stage,)), tmp_path / "other")


def test_data_that_hold_the_mask_token_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.full(400, 259))
    stage = replace(RECIPE.stages[1], data=str(tmp_path / "t.npy"))
    with pytest.raises(UserError, match="the training data of stage 'second' hold mask_token_id 259"):
        train(replace(RECIPE, stages=(stage,)), tmp_path / "run")


class Trap:
    """Unpickling it would leave a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_other_files_are_refused_and_none_is_run(tmp_path: Path) -> None:
    trap = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.save(tmp_path / "object.npy", trap, allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(trap))
    np.savez(tmp_path / "archive.npz", tokens=np.arange(9))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "floats.npy", np.arange(9.0))
    np.save(tmp_path / "rows.npy", np.zeros((3, 3), dtype=np.int64))
    np.save(tmp_path / "cut.npy", np.arange(9))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-5])
    save_file({"tokens": np.arange(9)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-5])
    save_file({"ids": np.arange(9)}, tmp_path / "names.safetensors")
    save_file({"tokens": np.arange(9.0)}, tmp_path / "floats.safetensors")
    save_file({"tokens": np.arange(9), "judged": np.ones(8, dtype=np.bool_)}, tmp_path / "judged.safetensors")
    (tmp_path / "t.txt").write_text("1 2 3")
    messages = {
        "object.npy": "cannot read .*object.npy",
        "pickle.npy": "cannot read .*pickle.npy",
        "empty.npy": "cannot read .*empty.npy",
        "archive.npy": "is an archive, not one array",
        "floats.npy": "must be one row of integers, but are float64",
        "rows.npy": r"must be one row of integers, but are int64 of shape \(3, 3\)",
        "cut.npy": "cannot read .*cut.npy",
        "absent.npy": "cannot read .*absent.npy",
        "cut.safetensors": r"cannot read .* \(truncated or not safetensors\)",
        "absent.safetensors": "cannot read .*absent",
        "names.safetensors": "must hold `tokens`, but holds ids",
        "floats.safetensors": "must be one row of integers, but are F64",
        "judged.safetensors": r"judged must be bool of shape \(9,\), but is BOOL of shape \(8,\)",
        "t.txt": r"token files end in \.npy or \.safetensors",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message) as error:
            TokenFile(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "sprung").exists()


def test_a_large_file_is_not_read_as_a_whole(tmp_path: Path) -> None:
    """A sparse file of 64 GB: larger than what could be read."""
    header = np.lib.format.header_data_from_array_1_0(np.zeros(1, dtype=np.uint16)) | {"shape": (2**35,)}
    with (tmp_path / "large.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[arg-type]
        stream.truncate(stream.tell() + 2 * 2**35)
    batch = next(TokenFile(tmp_path / "large.npy").batches(0, 3, 50, vocabulary=10))
    assert batch.tokens.shape == (3, 50) and not batch.tokens.any()
