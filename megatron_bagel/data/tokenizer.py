# SPDX-License-Identifier: Apache-2.0
"""Maps text to ids and back with the four special tokens of every sample, from a Hugging Face folder or a SentencePiece ``.model`` file."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_bagel.common.files import refuse_lfs_pointer
from megatron_bagel.common.json_files import read_json
from megatron_bagel.common.json_text import check_encodable

SPECIAL_TOKENS = {
    "bos": "<|im_start|>",
    "eos": "<|im_end|>",
    "start_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}
# The fingerprint includes the ids of these texts: spaces, digits, contractions, accents, other scripts, a special token in the text.
_PROBES = ("a photo of a red circle.", " two  spaces\n\nand 12345's", "héllo wörld, 你好 🙂", "a<|im_end|>b")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


class Tokenizer(ABC):
    """The tokenizer interface of the project. ``bos``, ``eos``, ``start_of_image`` and ``end_of_image`` are ids; ``path`` is its source.

    ``num_added`` counts the special tokens that were not in the files and were added on top of the vocabulary.
    """

    bos: int
    eos: int
    start_of_image: int
    end_of_image: int
    num_added: int
    path: Path

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``. No special tokens are added, but those spelled out in the text are recognised.

        Raises ValueError for half a character (a lone surrogate), which tokenizers refuse with errors that do not name it.
        """
        check_encodable(text)
        return self._encode(text)

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Return the ids of a text without lone surrogates."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, with special tokens spelled out."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """Return every token with its id."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of ids, including added special tokens."""

    @property
    def special_ids(self) -> dict[str, int]:
        """Return the id of each special token by its attribute name."""
        return {name: getattr(self, name) for name in SPECIAL_TOKENS}

    @property
    def fingerprint(self) -> str:
        """Return a hash of vocabulary, special ids and ids of probe texts, equal for tokenizers that give the same ids."""
        parts = [sorted(self.vocabulary().items()), self.special_ids, [self.encode(probe) for probe in _PROBES]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def files(self) -> list[Path]:
        """Return the files of this tokenizer, which exports copy beside the weights."""
        if self.path.is_file():
            return [self.path]
        return [self.path / name for name in _TOKENIZER_FILES if (self.path / name).is_file()]


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer folder, read by transformers."""

    def __init__(self, path: Path, add_special: bool) -> None:
        self.path = path
        for file in self.files():
            refuse_lfs_pointer(file, "tokenizer")
        try:
            self._tokenizer = _tokenizer_class(path).from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # the library raises the base class for a file that its Rust part cannot read
            raise _unreadable(self.files(), path, error) from error
        vocabulary = self._tokenizer.get_vocab()
        missing_tokens = [token for token in SPECIAL_TOKENS.values() if token not in vocabulary]
        if missing_tokens and not add_special:
            raise _missing_special(path, missing_tokens)
        self.num_added = self._tokenizer.add_tokens(missing_tokens, special_tokens=True) if missing_tokens else 0
        for name, token in SPECIAL_TOKENS.items():
            setattr(self, name, self._tokenizer.convert_tokens_to_ids(token))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def __len__(self) -> int:
        return len(self._tokenizer)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Special tokens that it lacks get the ids above its last one, in the order of ``SPECIAL_TOKENS``."""

    def __init__(self, path: Path, add_special: bool) -> None:
        import sentencepiece

        self.path = path
        refuse_lfs_pointer(path, "tokenizer")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a SentencePiece model ({error}); give a .model file or a Hugging Face folder") from error
        base = self._pieces.get_piece_size()
        unknown_id = self._pieces.unk_id()
        special_ids = {token: self._pieces.piece_to_id(token) for token in SPECIAL_TOKENS.values()}
        missing_tokens = [token for token, number in special_ids.items() if number == unknown_id]
        if missing_tokens and not add_special:
            raise _missing_special(path, missing_tokens)
        self._special = {**special_ids, **{token: base + i for i, token in enumerate(missing_tokens)}}
        self._special_text = {number: token for token, number in self._special.items()}
        self._special_pattern = re.compile("(" + "|".join(re.escape(token) for token in self._special) + ")")
        self.num_added = len(missing_tokens)
        for name, token in SPECIAL_TOKENS.items():
            setattr(self, name, self._special[token])

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._special_pattern.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids.extend(self._pieces.encode(part))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text = ""
        pieces: list[int] = []
        for number in map(int, ids):
            if number in self._special_text:
                text += self._pieces.decode(pieces) + self._special_text[number]
                pieces = []
            else:
                pieces.append(number)
        return text + self._pieces.decode(pieces)

    def vocabulary(self) -> dict[str, int]:
        return {**{self._pieces.id_to_piece(i): i for i in range(self._pieces.get_piece_size())}, **self._special}

    def __len__(self) -> int:
        return self._pieces.get_piece_size() + self.num_added


def _tokenizer_class(path: Path) -> Any:
    """Return the class of tokenizer_config.json. AutoTokenizer would also read config.json, where BAGEL names a model unknown to it."""
    import transformers

    config = path / "tokenizer_config.json"
    name = read_json(config, "tokenizer").get("tokenizer_class") if config.is_file() else None
    name = name if isinstance(name, str) else ""
    return getattr(transformers, f"{name}Fast", None) or getattr(transformers, name or "AutoTokenizer", transformers.AutoTokenizer)


def _unreadable(files: Sequence[Path], folder: Path, error: Exception) -> ValueError:
    """Return an error that names the file which is no JSON, or else the folder whose files the library does not accept."""
    for file in files:
        if file.suffix == ".json":
            try:
                read_json(file, "tokenizer")
            except ValueError as file_error:
                return ValueError(f"{file_error}; copy the file again")
    names = ", ".join(file.name for file in files)
    return ValueError(f"tokenizer: transformers cannot read {folder} ({names}): {type(error).__name__}: {error}")


def _missing_special(path: Path, tokens: list[str]) -> ValueError:
    return ValueError(f"the tokenizer at {path} lacks {', '.join(tokens)}; load it with add_special=True to add them on top")


def load_tokenizer(path: str | Path, add_special: bool = True) -> Tokenizer:
    """Load the tokenizer at ``path``: a Hugging Face folder, a SentencePiece ``.model`` file, or a folder with only the latter.

    With ``add_special``, missing special tokens are added on top of the vocabulary (``num_added``), so the model's embedding needs at
    least ``len(tokenizer)`` rows. Raises ValueError for a path without a tokenizer.
    """
    path = Path(path)
    if path.is_file():
        return SentencePieceTokenizer(path, add_special)
    if not path.is_dir():
        raise ValueError(f"there is no tokenizer at {path}: give a Hugging Face folder or a SentencePiece .model file")
    has_config = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))
    if not has_config and (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model", add_special)
    if not has_config:
        raise ValueError(f"{path} holds no tokenizer: expected tokenizer.json, or vocab.json with merges.txt, or tokenizer.model")
    return HuggingFaceTokenizer(path, add_special)


@lru_cache(maxsize=1)
def process_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer at ``path``, which a process loads once: loading takes longer than the texts of a small shard."""
    return load_tokenizer(path)
