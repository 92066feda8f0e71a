"""Text to token ids: bytes with four specials for zaya-nano, a `tokenizer.json` for every other checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from hardware.files import UserError

BYTES = 256
PAD, BOS, EOS, MASK = 256, 257, 258, 259
VOCABULARY = 264  # 260..263 are reserved


class Tokenizer(Protocol):
    """What the runtime and the commands ask of a tokenizer. No call adds special tokens."""

    def encode(self, text: str | bytes) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8 text; the ids from 256 up are special and have no text."""

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of `text` as ids, without specials."""
        return list(text.encode("utf-8") if isinstance(text, str) else text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, specials dropped. Raises UserError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not (min(ids) >= 0 and max(ids) < VOCABULARY):
            raise UserError(f"0 <= id < {VOCABULARY} must hold, but got ids in [{min(ids)}, {max(ids)}]")
        return bytes(i for i in ids if i < BYTES)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face `tokenizer.json`, read by the `tokenizers` library."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise UserError(f"{path} needs the `tokenizers` library: pip install tokenizers") from error
        try:
            self._library: Any = Library.from_file(os.fspath(path))
        except Exception as error:  # the library raises bare Exception for an unreadable or malformed file
            raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of `text`, without specials. Bytes must be UTF-8."""
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, specials dropped."""
        return str(self._library.decode([int(i) for i in ids], skip_special_tokens=True))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of `decode`."""
        return self.decode(ids).encode("utf-8")


def load_tokenizer(checkpoint: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint folder: its `tokenizer.json`, or bytes when it has none (zaya-nano)."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise UserError(f"a checkpoint must be a folder, but {folder} is none")
    path = folder / "tokenizer.json"
    return FileTokenizer(path) if path.exists() else ByteTokenizer()
