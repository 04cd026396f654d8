"""Text to ids with the four special tokens every sample needs, from a Hugging Face folder or a SentencePiece ``.model`` file."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = {
    "bos": "<|im_start|>",
    "eos": "<|im_end|>",
    "start_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}
# Encodings of these enter the fingerprint: spaces, digits, contractions, accents, other scripts, a special token in the text.
_PROBES = ("a photo of a red circle.", " two  spaces\n\nand 12345's", "héllo wörld, 你好 🙂", "a<|im_end|>b")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


class Tokenizer(ABC):
    """What the project needs of a tokenizer. ``bos``, ``eos``, ``start_of_image``, ``end_of_image`` are ids; ``path`` its source.

    ``num_added`` counts the special tokens that were not in the files and now lie on top of the vocabulary.
    """

    bos: int
    eos: int
    start_of_image: int
    end_of_image: int
    num_added: int
    path: Path

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; no special token is put around it, but one spelled out in the text is recognised."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens spelled out."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of ids, added special tokens included."""

    @property
    def special_ids(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in SPECIAL_TOKENS}

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give the same ids: hash of the vocabulary, the special ids and the ids of probe texts."""
        parts = [sorted(self.vocabulary().items()), self.special_ids, [self.encode(probe) for probe in _PROBES]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def files(self) -> list[Path]:
        """The files that make this tokenizer, to be copied beside exported weights."""
        if self.path.is_file():
            return [self.path]
        return [self.path / name for name in _TOKENIZER_FILES if (self.path / name).is_file()]


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer folder read by transformers."""

    def __init__(self, path: Path, add_special: bool) -> None:
        self.path = path
        self._tokenizer = _tokenizer_class(path).from_pretrained(str(path), local_files_only=True)
        known = self._tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS.values() if token not in known]
        if missing and not add_special:
            raise _missing_special(path, missing)
        self.num_added = self._tokenizer.add_tokens(missing, special_tokens=True) if missing else 0
        for name, token in SPECIAL_TOKENS.items():
            setattr(self, name, self._tokenizer.convert_tokens_to_ids(token))

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def __len__(self) -> int:
        return len(self._tokenizer)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; special tokens it lacks get the ids right above its own, in the order of `SPECIAL_TOKENS`."""

    def __init__(self, path: Path, add_special: bool) -> None:
        import sentencepiece

        self.path = path
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a SentencePiece model ({error}); give a .model file or a Hugging Face folder") from error
        base = self._pieces.get_piece_size()
        unknown = self._pieces.unk_id()
        own = {token: self._pieces.piece_to_id(token) for token in SPECIAL_TOKENS.values()}
        missing = [token for token, number in own.items() if number == unknown]
        if missing and not add_special:
            raise _missing_special(path, missing)
        self._special = {**own, **{token: base + i for i, token in enumerate(missing)}}
        self._special_text = {number: token for token, number in self._special.items()}
        self._split = re.compile("(" + "|".join(re.escape(token) for token in self._special) + ")")
        self.num_added = len(missing)
        for name, token in SPECIAL_TOKENS.items():
            setattr(self, name, self._special[token])

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids.extend(self._pieces.encode(part))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text, run = "", []
        for number in map(int, ids):
            if number in self._special_text:
                text += self._pieces.decode(run) + self._special_text[number]
                run = []
            else:
                run.append(number)
        return text + self._pieces.decode(run)

    def vocabulary(self) -> dict[str, int]:
        return {**{self._pieces.id_to_piece(i): i for i in range(self._pieces.get_piece_size())}, **self._special}

    def __len__(self) -> int:
        return self._pieces.get_piece_size() + self.num_added


def _tokenizer_class(path: Path) -> Any:
    """The class that tokenizer_config.json names: AutoTokenizer would look at config.json too, and BAGEL's names no model it knows."""
    import transformers

    config = path / "tokenizer_config.json"
    name = json.loads(config.read_text()).get("tokenizer_class", "") if config.is_file() else ""
    return getattr(transformers, f"{name}Fast", None) or getattr(transformers, name or "AutoTokenizer", transformers.AutoTokenizer)


def _missing_special(path: Path, missing: list[str]) -> ValueError:
    return ValueError(f"the tokenizer at {path} lacks {', '.join(missing)}; load it with add_special=True to add them on top")


def load_tokenizer(path: str | Path, add_special: bool = True) -> Tokenizer:
    """The tokenizer at ``path``: a Hugging Face folder, a SentencePiece ``.model`` file, or a folder that holds only the latter.

    With ``add_special`` the special tokens that are missing are added on top of the vocabulary (``num_added``), so the model's
    embedding must have at least ``len(tokenizer)`` rows. Raises ValueError for a path that holds no tokenizer.
    """
    path = Path(path)
    if path.is_file():
        return SentencePieceTokenizer(path, add_special)
    if not path.is_dir():
        raise ValueError(f"there is no tokenizer at {path}: give a Hugging Face folder or a SentencePiece .model file (--tokenizer_path)")
    has_config = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))
    if not has_config and (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model", add_special)
    if not has_config:
        raise ValueError(f"{path} holds no tokenizer: expected tokenizer.json, or vocab.json with merges.txt, or tokenizer.model")
    return HuggingFaceTokenizer(path, add_special)
