# SPDX-License-Identifier: Apache-2.0
"""Which parameters the freeze flags take out of training: they get no gradient buffer, no optimizer state and no average.

``freeze_und`` detaches activations inside the model (``build_decoder(freeze_und=True)``). This module freezes the parameters that no
gradient can then reach. The original keeps them in its optimizer with gradients of exact zeros.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import nn

from megatron_bagel.config.lora import LoraSettings, is_factor
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.bagel import BagelModel

LLM_PARTS = ("embedding.", "decoder.", "final_layernorm.", "output_layer.")
TOWER_PARTS = ("vit_model.", "connector.")


@dataclass(frozen=True)
class FreezeSettings:
    """What does not train.

    Attributes:
        llm: Freezes embedding, layers, final norms and output layer. The modules that map latents in and out still train.
        vit: Freezes the vision transformer. Its connector still trains.
        und: Freezes every weight that only understanding tokens pass on their way to attention, including the vision tower.
            The output layer still trains (and with it a tied embedding), and so do weights that both experts share.
    """

    llm: bool = False
    vit: bool = False
    und: bool = False
    #: Adapters, which freeze every weight that they do not name in ``full``.
    lora: LoraSettings | None = None

    @property
    def tower_backward(self) -> bool:
        """Whether gradients pass through the vision transformer."""
        if self.lora is not None:
            return "vit" in self.lora.targets
        return not (self.vit or self.und)

    @property
    def decoder_weights(self) -> bool:
        """Whether the decoder's matrices have no gradients of their own."""
        return self.llm or self.lora is not None

    @property
    def vit_forward_only(self) -> bool:
        """Whether the vision transformer runs only forward, as far as its weights decide it."""
        return self.vit if self.lora is None else not self.tower_backward


def is_frozen(name: str, names: Container[str], tied: bool, frozen: FreezeSettings) -> bool:
    """Return whether the settings take a parameter out of training.

    Args:
        name: The parameter's name in the decoder or the vision tower.
        names: The names of all parameters of its module, which show whether each expert has a separate copy.
        tied: Whether the embedding is also the output layer.
        frozen: What does not train.
    """
    if frozen.lora is not None:
        return not (is_factor(name) or frozen.lora.trains_in_full(name))
    if name.startswith(TOWER_PARTS):
        return frozen.und or (frozen.vit and name.startswith("vit_model."))
    if frozen.llm and name.startswith(LLM_PARTS):
        return True
    has_gen_copy = ".und." in name and any(copy in names for copy in _gen_copies(name))
    only_embeds = name.startswith("embedding.") and not tied
    return frozen.und and (has_gen_copy or only_embeds)


def _gen_copies(name: str) -> tuple[str, ...]:
    """Return names of which one exists if the generation expert has its own copy of a part. Of two MLPs one may be sparse."""
    part = name.split(".und.")[0]
    mlps = (f"{part}.gen.router.weight", f"{part}.gen.linear_fc2.weight") if part.endswith(".mlp") else ()
    return (name.replace(".und.", ".gen."), *mlps)


def freeze(decoder: BagelModel, tower: VisionTower | None, frozen: FreezeSettings) -> None:
    """Set ``requires_grad`` to False where ``is_frozen`` says so, and never to True. Call it before ``wrap_ddp``."""
    parts: list[nn.Module] = [decoder] if tower is None else [decoder, tower]
    for part in parts:
        parameters = dict(part.named_parameters())
        for name, parameter in parameters.items():
            if is_frozen(name, parameters, decoder.share_embeddings_and_output_weights, frozen):
                parameter.requires_grad_(False)
