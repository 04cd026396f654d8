"""Which parameters the freeze flags take out of training: they get no gradient buffer, no optimizer state and no average.

``freeze_und`` cuts activations inside the model (``build_decoder(freeze_und=True)``); the parameters that no gradient can then
reach are frozen here. The original keeps them in its optimizer with gradients of exact zeros.
"""

from __future__ import annotations

from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.bagel import BagelModel

LLM_PARTS = ("embedding.", "decoder.", "final_layernorm.", "output_layer.")


def freeze(decoder: BagelModel, tower: VisionTower | None, freeze_llm: bool, freeze_vit: bool, freeze_und: bool) -> None:
    """Set ``requires_grad`` to False by the flags of the same names; nothing is ever switched on. Call before ``wrap_ddp``.

    Args:
        freeze_llm: embedding, layers, final norms and output layer. The paths of latents in and out still train.
        freeze_vit: the vision transformer. Its connector still trains.
        freeze_und: every weight that only understanding tokens pass on their way to attention, the whole tower included. Still
            training: the output layer (so the embedding too, when tied), and weights that both experts share, which the
            generation tokens train.
    """
    if freeze_llm:
        for name, parameter in decoder.named_parameters():
            if name.startswith(LLM_PARTS):
                parameter.requires_grad_(False)
    if freeze_und:
        _freeze_understanding(decoder)
    if tower is not None and (freeze_vit or freeze_und):
        (tower if freeze_und else tower.vit_model).requires_grad_(False)


def _freeze_understanding(decoder: BagelModel) -> None:
    parameters = dict(decoder.named_parameters())
    for name, parameter in parameters.items():
        own = ".und." in name and name.replace(".und.", ".gen.") in parameters
        read_only = name.startswith("embedding.") and not decoder.share_embeddings_and_output_weights
        if own or read_only:
            parameter.requires_grad_(False)
