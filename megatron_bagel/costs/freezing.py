"""Which parameters the freeze flags take out of training: they get no gradient buffer, no optimizer state and no average.

``freeze_und`` detaches activations inside the model (``build_decoder(freeze_und=True)``). This module freezes the parameters that no
gradient can then reach. The original keeps them in its optimizer with gradients of exact zeros.
"""

from __future__ import annotations

from collections.abc import Container

from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.bagel import BagelModel

LLM_PARTS = ("embedding.", "decoder.", "final_layernorm.", "output_layer.")
TOWER_PARTS = ("vit_model.", "connector.")


def is_frozen(name: str, names: Container[str], tied: bool, freeze_llm: bool, freeze_vit: bool, freeze_und: bool) -> bool:
    """Return whether the flags take a parameter out of training.

    Args:
        name: The parameter's name in the decoder or the vision tower.
        names: The names of all parameters of its module, which show whether each expert has a separate copy.
        tied: Whether the embedding is also the output layer.
        freeze_llm: Freezes embedding, layers, final norms and output layer. The modules that map latents in and out still train.
        freeze_vit: Freezes the vision transformer. Its connector still trains.
        freeze_und: Freezes every weight that only understanding tokens pass on their way to attention, including the vision tower.
            The output layer still trains (and with it a tied embedding), and so do weights that both experts share.
    """
    if name.startswith(TOWER_PARTS):
        return freeze_und or (freeze_vit and name.startswith("vit_model."))
    if freeze_llm and name.startswith(LLM_PARTS):
        return True
    has_gen_copy = ".und." in name and name.replace(".und.", ".gen.") in names
    only_embeds = name.startswith("embedding.") and not tied
    return freeze_und and (has_gen_copy or only_embeds)


def freeze(decoder: BagelModel, tower: VisionTower | None, freeze_llm: bool, freeze_vit: bool, freeze_und: bool) -> None:
    """Set ``requires_grad`` to False where ``is_frozen`` says so, and never to True. Call it before ``wrap_ddp``."""
    for part in (decoder, *([tower] if tower is not None else [])):
        parameters = dict(part.named_parameters())
        for name, parameter in parameters.items():
            if is_frozen(name, parameters, decoder.share_embeddings_and_output_weights, freeze_llm, freeze_vit, freeze_und):
                parameter.requires_grad_(False)
