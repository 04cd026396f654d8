"""Which parameters the freeze flags take out of training: they get no gradient buffer, no optimizer state and no average.

``freeze_und`` cuts activations inside the model (``build_decoder(freeze_und=True)``); the parameters that no gradient can then
reach are frozen here. The original keeps them in its optimizer with gradients of exact zeros.
"""

from __future__ import annotations

from collections.abc import Container

from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.bagel import BagelModel

LLM_PARTS = ("embedding.", "decoder.", "final_layernorm.", "output_layer.")
TOWER_PARTS = ("vit_model.", "connector.")


def is_frozen(name: str, names: Container[str], tied: bool, freeze_llm: bool, freeze_vit: bool, freeze_und: bool) -> bool:
    """Whether the flags of the same names take a parameter out of training.

    Args:
        name: of the parameter, as the decoder and the vision tower have it.
        names: every parameter beside it, which tells whether an expert has it for itself.
        tied: whether the embedding is the output layer too.
        freeze_llm: embedding, layers, final norms and output layer. The paths of latents in and out still train.
        freeze_vit: the vision transformer. Its connector still trains.
        freeze_und: every weight that only understanding tokens pass on their way to attention, the whole tower included. Still
            training: the output layer (so the embedding too, when tied), and weights that both experts share, which the
            generation tokens train.
    """
    if name.startswith(TOWER_PARTS):
        return freeze_und or (freeze_vit and name.startswith("vit_model."))
    if freeze_llm and name.startswith(LLM_PARTS):
        return True
    own = ".und." in name and name.replace(".und.", ".gen.") in names
    read_only = name.startswith("embedding.") and not tied
    return freeze_und and (own or read_only)


def freeze(decoder: BagelModel, tower: VisionTower | None, freeze_llm: bool, freeze_vit: bool, freeze_und: bool) -> None:
    """Set ``requires_grad`` to False by the flags (``is_frozen``); nothing is ever switched on. Call before ``wrap_ddp``."""
    for part in (decoder, *([tower] if tower is not None else [])):
        parameters = dict(part.named_parameters())
        for name, parameter in parameters.items():
            if is_frozen(name, parameters, decoder.share_embeddings_and_output_weights, freeze_llm, freeze_vit, freeze_und):
                parameter.requires_grad_(False)
