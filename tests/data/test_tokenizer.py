# SPDX-License-Identifier: Apache-2.0
"""Ids equal the goldens; SentencePiece models get the special tokens on top; the fingerprint tells tokenizers apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7031645\n"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sp")
    corpus = folder / "corpus.txt"
    names = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "square")]
    lines = [f"a photo of {name} number {n}." for name in names for n in range(40)]
    corpus.write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "sp"), vocab_size=290, byte_fallback=True, minloglevel=2
    )
    return folder / "sp.model"


@pytest.fixture(scope="module")
def golden_tokenizer(goldens: Path) -> Tokenizer:
    return load_tokenizer(goldens / "hf")


def test_ids_equal_the_goldens(goldens: Path, golden_tokenizer: Tokenizer) -> None:
    expected = json.loads((goldens / "tokenizer_golden.json").read_text())
    ids = expected["new_token_ids"]
    ids["bos"], ids["eos"] = ids.pop("bos_token_id"), ids.pop("eos_token_id")
    assert golden_tokenizer.special_ids == ids
    assert len(golden_tokenizer) == expected["len_tokenizer"]
    assert golden_tokenizer.num_added == expected["num_new_tokens"]
    for text, want in expected["samples"].items():
        assert golden_tokenizer.encode(text) == want
        assert golden_tokenizer.decode(want) == text


@given(first=st.text(max_size=20), second=st.text(max_size=20))
@settings(max_examples=300, deadline=None)
def test_a_joined_instruction_is_its_parts(golden_tokenizer: Tokenizer, first: str, second: str) -> None:
    """The index stores "a." and " b." and joins their ids; that must equal the ids of "a. b."."""
    if any("<|" in text for text in (first, second)):
        return
    parts = golden_tokenizer.encode(first + ".") + golden_tokenizer.encode(" " + second + ".")
    assert parts == golden_tokenizer.encode(f"{first}. {second}.")


def test_sentencepiece_gets_special_tokens_on_top(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model)
    assert [tokenizer.bos, tokenizer.eos, tokenizer.start_of_image, tokenizer.end_of_image] == [290, 291, 292, 293]
    assert len(tokenizer) == 294 and tokenizer.num_added == 4
    text = "a photo of a blue circle number 12."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(f"red{SPECIAL_TOKENS['eos']}")[-1] == tokenizer.eos
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("red"), tokenizer.eos]) == "<|im_start|>red<|im_end|>"
    with pytest.raises(ValueError, match="lacks"):
        load_tokenizer(sentencepiece_model, add_special=False)


def test_fingerprint_tells_tokenizers_apart(goldens: Path, golden_tokenizer: Tokenizer, sentencepiece_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in golden_tokenizer.files():
        shutil.copy(file, copy / file.name)
    assert load_tokenizer(copy).fingerprint == golden_tokenizer.fingerprint
    assert load_tokenizer(sentencepiece_model).fingerprint != golden_tokenizer.fingerprint


def test_missing_special_tokens_are_added(goldens: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(goldens / "hf" / name, tmp_path / name)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.num_added == 4
    assert sorted(tokenizer.special_ids.values()) == list(range(len(tokenizer) - 4, len(tokenizer)))
    with pytest.raises(ValueError, match="lacks"):
        load_tokenizer(tmp_path, add_special=False)


def test_a_path_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a SentencePiece"):
        load_tokenizer(tmp_path / "x.model")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("tokenizer.json", lambda _: POINTER, "is a Git LFS pointer, not the file: run git lfs pull"),
        ("tokenizer.json", lambda data: data[:3000], "is not valid JSON"),
        ("tokenizer_config.json", lambda _: b'{"a": ', "is not valid JSON"),
        ("tokenizer_config.json", lambda _: b"[" * 200_000, "nested deeper than"),
        ("tokenizer.json", lambda _: b"{}", "transformers cannot read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    goldens: Path, tmp_path: Path, name: str, change: Callable[[bytes], bytes], reason: str
) -> None:
    folder = Path(shutil.copytree(goldens / "hf", tmp_path / "tokenizer"))
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=reason) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value) and name in str(caught.value)


def test_a_pointer_in_place_of_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"tokenizer\.model is a Git LFS pointer"):
        load_tokenizer(tmp_path)
