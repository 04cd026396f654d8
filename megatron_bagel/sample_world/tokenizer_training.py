# SPDX-License-Identifier: Apache-2.0
"""Trains a byte-level BPE tokenizer in the form of Qwen2's (same text splitting, same special tokens), of any vocabulary size.

Small worlds need small vocabularies: Qwen2.5's 151,665 tokens would make the embedding most of a laptop-sized model.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# Qwen2's special tokens, in the order of their ids; BAGEL uses im_start (bos), im_end (eos), vision_start and vision_end.
SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# How Qwen2 cuts text before merging: contractions, words with their leading space, single digits, punctuation, line ends, spaces.
SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = 256


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int = 512) -> int:
    """Write tokenizer.json, vocab.json, merges.txt and tokenizer_config.json into ``folder``.

    ``vocab_size`` includes the special tokens, and is not reached if the texts hold fewer merges. Every byte has a token, so any text
    can be encoded.

    Returns:
        The number of tokens.

    Raises:
        ValueError: If the size leaves no room for bytes and special tokens.
    """
    min_vocab_size = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < min_vocab_size:
        raise ValueError(f"a vocabulary of {vocab_size} has no room for {BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens; "
                         f"use {min_vocab_size} or more")  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pre_split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt, without the special tokens, as Qwen2 ships them
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_config(tokenizer), indent=1) + "\n")
    return tokenizer.get_vocab_size()


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in SPECIAL_TOKENS},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
