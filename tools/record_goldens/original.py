# SPDX-License-Identifier: Apache-2.0
"""Imports the original from a checkout so that it runs on a CPU in fp32. Nothing in the checkout is changed.

What its modules see instead of the real thing: attention as in ``attention.py``, fp32 where they name bf16, and normal noise that is
kept, so that a golden holds the noise it was made with.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.record_goldens.attention import masked_attention, varlen_attention, whole_mask

#: A model or a module of the original, about whose attributes nothing is known here.
OriginalModel = Any


class NoiseLog:
    """The normal noise that the original has drawn since the last ``fresh``, or noise of before that it is given again."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []
        self._given: list[Tensor] | None = None

    @contextlib.contextmanager
    def fresh(self, seed: int | None = None, given: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
        """Keep what is drawn within the block, after ``seed``; or give out ``given``, in order, and keep nothing."""
        self.drawn, self._given = [], None if given is None else list(given)
        if seed is not None:
            torch.manual_seed(seed)
        try:
            yield self.drawn
        finally:
            self._given = None

    def randn_like(self, like: Tensor, **kwargs: Any) -> Tensor:
        """Return noise of the shape of ``like``."""
        if self._given is not None:
            return self._given.pop(0).to(like)
        return self._keep(torch.randn_like(like, **kwargs))

    def randn(self, *shape: Any, **kwargs: Any) -> Tensor:
        """Return noise of ``shape``."""
        return self._keep(torch.randn(*shape, **kwargs))

    def _keep(self, noise: Tensor) -> Tensor:
        self.drawn.append(noise.detach().clone())
        return noise


class SeenTorch(types.ModuleType):
    """torch as one module of the original sees it: some names are others."""

    def __init__(self, **names: Any) -> None:
        super().__init__("torch")
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Original:
    """The modules of a checkout. ``noise`` is what its model and its autoencoder have drawn."""

    def __init__(self, checkout: Path) -> None:
        if not (checkout / "modeling" / "bagel" / "bagel.py").is_file():
            raise ValueError(f"--reference {checkout}: there is no modeling/bagel/bagel.py in it; give a checkout of the original BAGEL")
        self.checkout, self.noise = checkout, NoiseLog()
        _absent_modules()
        sys.path.insert(0, str(checkout))
        self.bagel: Any = importlib.import_module("modeling.bagel.bagel")
        self.decoder: Any = importlib.import_module("modeling.bagel.qwen2_navit")
        self.vision: Any = importlib.import_module("modeling.bagel.siglip_navit")
        self.autoencoder: Any = importlib.import_module("modeling.autoencoder")
        self.tokenizer = importlib.import_module("modeling.qwen2")
        self.datasets: Any = importlib.import_module("data.dataset_base")
        self.dataset_info = importlib.import_module("data.dataset_info")
        self.data_utils = importlib.import_module("data.data_utils")
        self.transforms: Any = importlib.import_module("data.transforms")
        self.inferencer = importlib.import_module("inferencer")
        self._stand_in()

    def _stand_in(self) -> None:
        """Give each module what it needs on a CPU in fp32."""
        self.decoder.torch = self.vision.torch = SeenTorch(bfloat16=torch.float32)
        self.bagel.torch = SeenTorch(randn_like=self.noise.randn_like, randn=self.noise.randn)
        self.autoencoder.torch = SeenTorch(randn_like=self.noise.randn_like)
        self.bagel.create_block_mask, self.decoder.flex_attention = whole_mask, masked_attention
        self.decoder.sdpa_kernel = lambda **unused: contextlib.nullcontext()
        self.bagel.tqdm = lambda steps, **unused: steps

    @contextlib.contextmanager
    def real_flex_attention(self) -> Iterator[None]:
        """Use torch's own FlexAttention within the block, not compiled."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self.bagel.create_block_mask = lambda *args, **kwargs: create_block_mask(*args, **{**kwargs, "_compile": False})
        self.decoder.flex_attention = flex_attention
        try:
            yield
        finally:
            self.bagel.create_block_mask, self.decoder.flex_attention = whole_mask, masked_attention

    def trainer_function(self, name: str) -> Any:
        """Return one function of the trainer, whose module cannot be imported without CUDA. The function must stand by itself."""
        import ast

        path = self.checkout / "train" / "pretrain_unified_navit.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        (node,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        names: dict[str, Any] = {}
        exec(compile(ast.Module([node], []), str(path), "exec"), names)  # noqa: S102
        return names[name]


def _absent_modules() -> None:
    """Import torchvision and transformers, then stand in for modules that the original imports and a CPU does not have.

    torchvision's operators may not fit a CPU build of torch, and only its transforms are used here. transformers must not take the stand-in
    for flash-attn.
    """
    register = torch.library.register_fake
    # What torchvision registers for operators that it cannot load would fail.
    torch.library.register_fake = lambda op, *args, **kwargs: (
        (lambda function: function) if str(op).startswith("torchvision::") else register(op, *args, **kwargs)
    )
    try:
        importlib.import_module("torchvision")
    finally:
        torch.library.register_fake = register
    importlib.import_module("transformers.modeling_utils")
    _stand_in_module("flash_attn", flash_attn_varlen_func=varlen_attention)
    reader = _stand_in_module("decord.video_reader", VideoReader=_no_videos)
    _stand_in_module("decord", VideoReader=_no_videos, video_reader=reader)


def _stand_in_module(name: str, **names: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(names)
    sys.modules[name] = module
    return module


def _no_videos(*unused: Any, **unused_names: Any) -> None:
    raise RuntimeError("goldens have no videos")
