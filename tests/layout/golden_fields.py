# SPDX-License-Identifier: Apache-2.0
"""A pack against a packed batch of the original: the same integers under their names."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_bagel.layout.items import Mode
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.pack import LayoutSpec, Pack

FIELDS = {
    "text_ids": "packed_text_ids",
    "text_positions": "packed_text_indexes",
    "position_ids": "packed_position_ids",
    "vae_positions": "packed_vae_token_indexes",
    "latent_shapes": "patchified_vae_latent_shapes",
    "latent_position_ids": "packed_latent_position_ids",
    "vit_positions": "packed_vit_token_indexes",
    "vit_position_ids": "packed_vit_position_ids",
    "ce_positions": "ce_loss_indexes",
    "labels": "packed_label_ids",
    "mse_positions": "mse_loss_indexes",
}
GOLDEN_SPEC = LayoutSpec(411, 412, 419, 420, vit_patch=14, vit_max_side=16, vae_downsample=16, max_latent_size=16)


def assert_equal_to_golden(pack: Pack, golden: dict[str, Any]) -> None:
    """Every integer, and the weights of the text loss; a document of padding at the golden's end is left out."""
    assert pack.sequence_length == golden["sequence_length"]
    documents = len(pack.sample_lens)
    assert pack.sample_lens.tolist() == golden["sample_lens"][:documents]
    if "split_lens" in golden:
        splits = len(pack.split_lens)
        assert pack.split_lens.tolist() == golden["split_lens"][:splits]
        assert [Mode(m).name.lower() for m in pack.split_modes] == golden["attn_modes"][:splits]
    else:
        seen = PackMask.of(pack).row_areas().tolist()
        assert seen == [keys for mask in golden["nested_attention_masks"] for keys in mask["rows_allowed"]]
    for ours, theirs in FIELDS.items():
        assert getattr(pack, ours).tolist() == golden[theirs], ours
    assert pack.vit_shapes.prod(1).tolist() == golden["vit_token_seqlens"]
    np.testing.assert_allclose(pack.ce_weights, golden["ce_loss_weights"], rtol=1e-6)
