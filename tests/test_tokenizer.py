from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.files import UserError
from runtime.tokenizer import BOS, EOS, MASK, PAD, VOCABULARY, ByteTokenizer, load_tokenizer


@given(st.binary())
def test_any_bytes_round_trip(data: bytes) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


@given(st.text())
def test_any_text_round_trips_and_specials_have_no_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert all(0 <= i < 256 for i in ids)
    assert tokenizer.decode([BOS, *ids, EOS, MASK, PAD, VOCABULARY - 1]) == text


def test_a_cut_character_is_replaced_not_an_error() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("aé")[:-1]) == "a�"


@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_an_id_outside_the_vocabulary_is_an_error(bad: int) -> None:
    with pytest.raises(UserError, match=str(bad)):
        ByteTokenizer().decode([65, bad])


def test_a_checkpoint_without_tokenizer_json_is_bytes(tmp_path) -> None:
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    with pytest.raises(UserError, match="absent"):
        load_tokenizer(tmp_path / "absent")


def test_a_tokenizer_json_is_read_by_the_library(tmp_path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["sort the list, sort it again"], trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", library.token_to_id("<bos>"))]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("sort é list")
    assert library.token_to_id("<bos>") not in ids
    assert tokenizer.decode([library.token_to_id("<bos>"), *ids]) == "sort é list"
    assert tokenizer.decode_bytes(ids) == "sort é list".encode()
    assert tokenizer.encode("sort é list".encode()) == ids


def test_a_malformed_tokenizer_json_is_one_clear_error(tmp_path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_bytes_and_data_need_neither_torch_nor_tokenizers() -> None:
    code = (
        "import sys, runtime.tokenizer, runtime.conversion.data as d; "
        "next(d.training_batches(0, 1, 64)); "
        "sys.exit(bool({'torch', 'tokenizers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
