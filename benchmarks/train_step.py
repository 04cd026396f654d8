# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of a training step, as JSON: a named config on its named pack, part by part, beside the machine's own rate.

    python -m benchmarks.train_step step --config bench-53m            # forward, backward, update; add --recompute-layers -1
    python -m benchmarks.train_step layers                             # expert-sorted layer against gather/scatter
    python -m benchmarks.train_step rate                               # matrix products of a layer's size alone

Run it on an otherwise idle machine, one measurement per process: peak memory is the process's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

import torch

from megatron_bagel import platform

platform.install()

from benchmarks.layers import compare_layers  # noqa: E402
from benchmarks.measure import matmul_gflops  # noqa: E402
from benchmarks.named_configs import CONFIGS  # noqa: E402
from benchmarks.record import report  # noqa: E402
from benchmarks.step import StepOptions, measure_step  # noqa: E402
from megatron_bagel.platform.device import device_name  # noqa: E402
from megatron_bagel.platform.launch.process_group import init_distributed, shutdown_distributed  # noqa: E402


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "layers", "rate"))
    parser.add_argument("--config", choices=sorted(CONFIGS), default="bench-53m")
    parser.add_argument("--recompute-layers", type=int, default=0, metavar="N",
                        help="activation checkpointing of the first N decoder layers, and of the ViT if N > 0; -1: all")  # fmt: skip
    parser.add_argument(
        "--attention-backend", choices=("sdpa", "flex", "flex_flash", "magi", "dense"), help="default: flex on a GPU, sdpa on a CPU"
    )
    parser.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local")
    parser.add_argument("--vae-encode-bf16", action="store_true", help="the autoencoder under bf16 autocast")
    parser.add_argument("--rounds", type=int, default=5, help="measured repetitions; medians are reported")
    parser.add_argument("--warmup", type=int, default=1, help="repetitions before the measured ones")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0 keeps torch's choice")
    parser.add_argument("--hidden", type=int, default=512, help="layers: hidden size")
    parser.add_argument("--layers", type=int, default=8, help="layers: number of layers")
    parser.add_argument("--tokens", type=int, default=2048, help="layers: tokens, half of them generation tokens")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.warmup < 0:
        parser.error("--rounds must be at least 1 and --warmup at least 0")
    return arguments


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    from megatron.core import parallel_state, tensor_parallel

    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    init_distributed()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    result: dict[str, Any] = {"what": arguments.what, "device": device_name(), "torch": torch.__version__}
    result["threads"] = torch.get_num_threads()
    if arguments.what == "step":
        layers = CONFIGS[arguments.config].arch.llm.num_hidden_layers
        if not -1 <= arguments.recompute_layers <= layers:
            raise SystemExit(f"--recompute-layers is -1 (all) to {layers}, the layers of {arguments.config}")
        recomputed = layers if arguments.recompute_layers == -1 else arguments.recompute_layers
        options = StepOptions(recomputed, arguments.attention_backend, arguments.transformer_impl, arguments.vae_encode_bf16)
        result |= measure_step(arguments.config, arguments.rounds, arguments.warmup, options)
    elif arguments.what == "layers":
        result |= compare_layers(arguments.hidden, arguments.layers, arguments.tokens, arguments.rounds)
    else:
        llm = CONFIGS[arguments.config].arch.llm
        dtype = torch.bfloat16 if platform.has_gpu() else torch.float32  # of a step there
        rows = 8192 if platform.has_gpu() else 1024  # a product must be long beside its launch
        result["dtype"], result["rows"] = str(dtype).removeprefix("torch."), rows
        result["matmul_gflops"] = matmul_gflops(rows, llm.hidden_size, 2 * llm.intermediate_size, dtype=dtype)
    shutdown_distributed()
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
