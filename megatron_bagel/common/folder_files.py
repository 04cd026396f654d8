# SPDX-License-Identifier: Apache-2.0
"""Names of the small files of a model folder."""

from __future__ import annotations

#: Files that describe a model here.
CONFIG_FILES = ("config.json", "llm_config.json", "vit_config.json", "ae_config.json")
#: What describes an autoencoder, beside its weights.
AUTOENCODER_CONFIG_FILES = ("ae_config.json",)
#: Files of a tokenizer, which exports copy.
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.jinja",
)
SMALL_FILES = (*CONFIG_FILES, *TOKENIZER_FILES)
