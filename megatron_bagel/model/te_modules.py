"""Transformer Engine's linears and norm in the shape our specs expect. GPU only; imported when asked for, and nowhere else.

The linears run with ``parallel_mode=None``: like the local ones they leave communication to the layer, which gathers and reduces
once for both experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


def te_modules() -> tuple[type, type, type]:
    """(column linear, row linear, norm) classes; ValueError when Transformer Engine is not installed."""
    try:
        import transformer_engine.pytorch as te
    except ImportError as error:
        raise ValueError(
            "--transformer-impl transformer_engine needs the package transformer-engine (pip install megatron_bagel[cuda] on a "
            "machine with a GPU), or use --transformer-impl local"
        ) from error

    class TELinear(te.Linear):
        """A linear cut along ``partition_dim`` over the tensor-parallel ranks, without communication of its own."""

        partition_dim = 0

        def __init__(
            self,
            input_size: int,
            output_size: int,
            *,
            config: TransformerConfig,
            init_method: Callable[[torch.Tensor], Any],
            bias: bool,
            stride: int = 1,
            **_: Any,
        ) -> None:
            sizes = [output_size, input_size]
            sizes[self.partition_dim] //= config.tensor_model_parallel_size
            super().__init__(
                sizes[1], sizes[0], bias=bias, init_method=init_method, params_dtype=config.params_dtype, parallel_mode=None,
            )  # fmt: skip
            set_tensor_model_parallel_attributes(self.weight, True, self.partition_dim, stride)
            if bias:
                set_tensor_model_parallel_attributes(self.bias, True, 0, stride)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> ShardedStateDict:
            """Same keys and cuts as the local linears, so checkpoints do not depend on the implementation."""
            state = {name: value for name, value in self.state_dict(prefix="", keep_vars=True).items() if "_extra_state" not in name}
            return make_sharded_tensors_for_checkpoint(
                state,
                prefix,
                {"weight": self.partition_dim, "bias": 0},
                sharded_offsets,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            )

    class TEColumn(TELinear):
        """[s, in] -> [s, out / tp]."""

    class TERow(TELinear):
        """[s, in / tp] -> [s, out], a partial sum."""

        partition_dim = 1

    class TENorm(te.RMSNorm):
        """Transformer Engine's RMSNorm with the mark Megatron needs for sequence parallelism."""

        def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, sequence_parallel: bool | None = None) -> None:
            super().__init__(hidden_size, eps=eps, params_dtype=config.params_dtype)
            self.weight.sequence_parallel = config.sequence_parallel if sequence_parallel is None else sequence_parallel

    return TEColumn, TERow, TENorm
