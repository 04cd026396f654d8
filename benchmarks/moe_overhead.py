# SPDX-License-Identifier: Apache-2.0
"""What a sparse MLP costs beyond its products: its time beside a dense MLP of equal active operations, and the time of each part.

    python -m benchmarks.moe_overhead                                    # 16 experts of which 4 serve a token
    python -m benchmarks.moe_overhead --experts 128 --topk 8 --width 96
    python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.moe_overhead --expert-parallel 2

Forward and backward, with both auxiliary losses. Both MLPs run in turn. Without a GPU seconds are processor time of the process, so other
work on the machine and waiting for other ranks do not count. The parts run one after the other on cut graphs, so their sum is a little more
than the whole layer. The dense MLP is this package's, and has the width of the experts that serve a token together. Figures are those of
rank 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
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
from megatron_bagel.model.fused import swiglu  # noqa: E402
from megatron_bagel.model.sparse_mlp import SparseMLP  # noqa: E402
from megatron_bagel.platform.launch.process_group import init_distributed, shutdown_distributed  # noqa: E402


@dataclass(frozen=True)
class Sizes:
    """Sizes of both MLPs. ``tokens`` are those of one rank."""

    hidden: int
    experts: int
    topk: int
    width: int
    tokens: int
    expert_parallel: int = 1


def clock() -> Callable[[], float]:
    """The clock of the figures: wall time on a GPU, else this process's processor time."""
    return time.perf_counter if torch.cuda.is_available() else time.process_time


def sparse_mlp(sizes: Sizes) -> SparseMLP:
    """A sparse MLP with random weights, whose routers choose about evenly."""
    hidden, topk = sizes.hidden, sizes.topk
    llm = LLMArch(hidden, topk * sizes.width, 1, hidden // 32, hidden // 32, 64, sparse=SparseArch(sizes.experts, topk, sizes.width))
    flags = {"moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 0.001, "expert_model_parallel_size": sizes.expert_parallel}
    mlp = SparseMLP(transformer_config(llm, MegatronArguments(**flags)), 1)
    mlp.router.global_tokens = sizes.tokens * sizes.expert_parallel
    return mlp.to(platform.device()).train()


def dense_run(hidden: int, width: int, rows: torch.Tensor, bare: bool = False) -> Callable[[], None]:
    """Forward and backward of a SwiGLU MLP. ``bare`` leaves out everything but its products."""
    first = torch.randn(2 * width, hidden, device=rows.device).mul_(0.02).requires_grad_()
    second = torch.randn(hidden, width, device=rows.device).mul_(0.02).requires_grad_()

    def run() -> None:
        first.grad = second.grad = rows.grad = None
        both = torch.nn.functional.linear(rows, first)
        inside = both[:, :width] if bare else swiglu(both)
        torch.nn.functional.linear(inside, second).sum().backward()

    return run


def products_run(sizes: Sizes, rows: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of only the products of this rank's experts, whose rows are equally many."""
    local_experts = sizes.experts // sizes.expert_parallel
    per_expert = len(rows) * sizes.topk // local_experts
    inputs = rows.detach().repeat(sizes.topk, 1)[: per_expert * local_experts]
    runs = [dense_run(sizes.hidden, sizes.width, cut(part), bare=True) for part in inputs.split(per_expert)]

    def run() -> None:
        for expert_run in runs:
            expert_run()

    return run


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the start of a new graph."""
    return tensor.detach().requires_grad_()


def parts_of(mlp: SparseMLP, rows: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of each part's forward and backward."""
    watch, dispatcher = Stopwatch(skip=1, clock=clock()), mlp.token_dispatcher
    for _ in range(rounds + 1):
        mlp.zero_grad(set_to_none=True)
        watch.start()
        probs, routing_map = mlp.router(cut(rows.unsqueeze(1)))
        probs.sum().backward()
        watch.lap("router")
        permuted, weights = dispatcher.dispatch_preprocess(cut(rows.unsqueeze(1)), routing_map, cut(probs))
        backward(permuted, weights)
        watch.lap("permutation")
        sent, weights = dispatcher.token_dispatch(cut(permuted), cut(weights))
        backward(sent, weights)
        watch.lap("exchange")
        hidden, counts, weights = dispatcher.dispatch_postprocess(cut(sent), cut(weights))
        backward(hidden, weights)
        watch.lap("permutation_of_received")
        results, _ = mlp.experts(cut(hidden), counts, cut(weights))
        results.sum().backward()
        watch.lap("experts")
        returned = dispatcher.combine_preprocess(cut(results))
        backward(returned)
        watch.lap("permutation_of_results")
        received = dispatcher.token_combine(cut(returned))
        backward(received)
        watch.lap("exchange_of_results")
        combined = dispatcher.combine_postprocess(cut(received))
        combined.sum().backward()
        watch.lap("combination")
    return watch.medians()


def backward(*tensors: torch.Tensor) -> None:
    """Backward passes of tensors with gradients of ones."""
    torch.autograd.backward(list(tensors), [torch.ones_like(tensor) for tensor in tensors])


def measure(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Seconds of both MLPs in turn, of their products alone, of the sparse one's parts, and the overhead."""
    torch.manual_seed(0)
    rows = torch.randn(sizes.tokens, sizes.hidden, device=platform.device()).requires_grad_()
    mlp, dense_width = sparse_mlp(sizes), sizes.topk * sizes.width

    def sparse() -> None:
        mlp.zero_grad(set_to_none=True)
        rows.grad = None
        mlp.rows(rows).sum().backward()

    def medians(first: Callable[[], None], second: Callable[[], None]) -> list[float]:
        return [statistics.median(seconds) for seconds in alternating_seconds(first, second, rounds, clock=clock())]

    sparse_s, dense_s = medians(sparse, dense_run(sizes.hidden, dense_width, rows))
    products_s, dense_products_s = medians(products_run(sizes, rows), dense_run(sizes.hidden, dense_width, rows, bare=True))
    parts = parts_of(mlp, rows, rounds)
    return {
        **asdict(sizes), "rounds": rounds, "threads": torch.get_num_threads(), "clock": clock().__name__, "dense_s": dense_s,
        "sparse_s": sparse_s, "overhead": sparse_s / dense_s - 1, "dense_products_s": dense_products_s, "products_s": products_s,
        "parts_s": parts, "share_of_dense": shares(parts, products_s, dense_s, dense_products_s),
    }  # fmt: skip


def shares(parts: dict[str, float], products_s: float, dense_s: float, dense_products_s: float) -> dict[str, float]:
    """Where the overhead lies, each over the time of the dense MLP: small products for large ones, elements, and the parts around them."""
    inside = {
        "smaller_products": products_s - dense_products_s,
        "elements": (parts["experts"] - products_s) - (dense_s - dense_products_s),
    }
    around = {name: seconds for name, seconds in parts.items() if name != "experts"}
    return {name: seconds / dense_s for name, seconds in {**inside, **around}.items()}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="width of the hidden states (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--topk", type=int, default=4, help="experts that serve a token (default: %(default)s)")
    parser.add_argument("--width", type=int, default=344, help="width of an expert (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the MLP's kind (default: %(default)s)")
    parser.add_argument("--expert-parallel", type=int, default=1, help="ranks that divide the experts: all that run (default: 1)")
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
    ranks = torch.distributed.get_world_size()
    if ranks != arguments.expert_parallel:
        raise ValueError(f"--expert-parallel is {arguments.expert_parallel}, but {ranks} processes run: start as many with torchrun")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)
    try:
        sizes = Sizes(**{field.name: getattr(arguments, field.name) for field in fields(Sizes)})
        result = {**measure(sizes, arguments.rounds), "benchmark_s": time.perf_counter() - started}
        is_first = torch.distributed.get_rank() == 0
    finally:
        shutdown_distributed()
    if is_first:
        report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
