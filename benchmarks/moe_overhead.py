# SPDX-License-Identifier: Apache-2.0
"""What a sparse MLP costs beyond its products: its time beside a dense MLP of equal active operations, and the time of each part.

    python -m benchmarks.moe_overhead                                    # 16 experts of which 4 serve a token
    python -m benchmarks.moe_overhead --experts 128 --topk 8 --width 96

Forward and backward on one process, with both auxiliary losses. The parts run one after the other on cut graphs, so their sum is a little
more than the whole layer. The dense MLP has the width of the experts that serve a token together.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from megatron_bagel import platform  # noqa: E402

platform.install()

from benchmarks.measure import Stopwatch, alternating_seconds  # noqa: E402
from benchmarks.record import report  # noqa: E402
from megatron_bagel.config.architecture import LLMArch, SparseArch  # noqa: E402
from megatron_bagel.config.megatron_arguments import MegatronArguments  # noqa: E402
from megatron_bagel.config.transformer_config import transformer_config  # noqa: E402
from megatron_bagel.model.sparse_mlp import SparseMLP  # noqa: E402
from megatron_bagel.platform.launch.process_group import init_distributed, shutdown_distributed  # noqa: E402


def sparse_mlp(hidden: int, experts: int, topk: int, width: int, tokens: int) -> SparseMLP:
    """A sparse MLP with random weights, whose routers choose about evenly."""
    llm = LLMArch(hidden, topk * width, 1, hidden // 32, hidden // 32, 64, sparse=SparseArch(experts, topk, width))
    mlp = SparseMLP(transformer_config(llm, MegatronArguments(moe_aux_loss_coeff=0.01, moe_z_loss_coeff=0.001)), 1)
    mlp.router.global_tokens = tokens
    return mlp.to(platform.device()).train()


def dense_run(hidden: int, width: int, rows: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of a SwiGLU MLP."""
    first = torch.randn(2 * width, hidden, device=rows.device).mul_(0.02).requires_grad_()
    second = torch.randn(hidden, width, device=rows.device).mul_(0.02).requires_grad_()

    def run() -> None:
        first.grad = second.grad = rows.grad = None
        gate, up = torch.nn.functional.linear(rows, first).chunk(2, -1)
        torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, second).sum().backward()

    return run


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the start of a new graph."""
    return tensor.detach().requires_grad_()


def parts_of(mlp: SparseMLP, rows: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of each part's forward and backward."""
    watch, dispatcher = Stopwatch(skip=1), mlp.token_dispatcher
    for _ in range(rounds + 1):
        mlp.zero_grad(set_to_none=True)
        watch.start()
        probs, routing_map = mlp.router(cut(rows.unsqueeze(1)))
        probs.sum().backward()
        watch.lap("router")
        hidden, weights = dispatcher.dispatch_preprocess(cut(rows.unsqueeze(1)), routing_map, cut(probs))
        hidden, weights = dispatcher.token_dispatch(hidden, weights)
        hidden, counts, weights = dispatcher.dispatch_postprocess(hidden, weights)
        torch.autograd.backward([hidden, weights], [torch.ones_like(hidden), torch.ones_like(weights)])
        watch.lap("dispatch")
        results, _ = mlp.experts(cut(hidden), counts, cut(weights))
        results.sum().backward()
        watch.lap("experts")
        combined = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(cut(results))))
        combined.sum().backward()
        watch.lap("combine")
    return watch.medians()


def measure(hidden: int, experts: int, topk: int, width: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of both MLPs in turn, of the sparse one's parts, and the overhead."""
    torch.manual_seed(0)
    rows = torch.randn(tokens, hidden, device=platform.device()).requires_grad_()
    mlp = sparse_mlp(hidden, experts, topk, width, tokens)

    def sparse() -> None:
        mlp.zero_grad(set_to_none=True)
        rows.grad = None
        mlp.rows(rows).sum().backward()

    sparse_seconds, dense_seconds = alternating_seconds(sparse, dense_run(hidden, topk * width, rows), rounds)
    parts = parts_of(mlp, rows, rounds)
    sparse_s, dense_s = statistics.median(sparse_seconds), statistics.median(dense_seconds)
    return {
        "hidden": hidden, "experts": experts, "topk": topk, "expert_width": width, "tokens": tokens, "rounds": rounds,
        "threads": torch.get_num_threads(), "dense_s": dense_s, "sparse_s": sparse_s, "overhead": sparse_s / dense_s - 1,
        "parts_s": parts, "experts_beyond_dense_s": parts["experts"] - dense_s,
    }  # fmt: skip


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="width of the hidden states (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--topk", type=int, default=4, help="experts that serve a token (default: %(default)s)")
    parser.add_argument("--width", type=int, default=344, help="width of an expert (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the MLP's kind (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds; the median counts (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    arguments = parse_arguments(argv)
    started = time.perf_counter()
    init_distributed()
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    try:
        settings = {name: getattr(arguments, name) for name in ("hidden", "experts", "topk", "width", "tokens", "rounds")}
        result = {**measure(**settings), "benchmark_s": time.perf_counter() - started}
    finally:
        shutdown_distributed()
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
