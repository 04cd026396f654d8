# SPDX-License-Identifier: Apache-2.0
"""One training step under every option, each beside the plain step in the same process.

    python -m benchmarks.step_variants --config bench-7b-seventh
    python -m benchmarks.step_variants --config bench-7b-seventh --long 36864 --variants plain,chunked_ce
    python -m benchmarks.step_variants --config bench-tiny --profile

The plain step is measured first and last, so that a change of the machine shows. ``memory`` compares the peak with the formulas of
``megatron_bagel plan``, ``predicted`` the seconds. With ``--profile`` each variant also tells its kernels by time, their launches and the
share of time in which none ran. A variant that cannot run here has the reason under ``refused``. ``step_s`` is the sum of the parts, and
the clock waits for the device after each of them; ``step_without_laps_s`` is a step without these waits, as in a run.

With ``--output`` the record is written before and after each variant, so that a run which is stopped leaves what it measured. ``--resume``
measures what such a record lacks. The variant that was being measured when the program ended comes last then.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

import torch

from megatron_bagel import platform

platform.install()

from benchmarks.kernels import kernel_profile  # noqa: E402
from benchmarks.measure import NoLaps, Stopwatch, seconds_each  # noqa: E402
from benchmarks.named_configs import CONFIGS, BenchConfig, bench_pack, filled_pack  # noqa: E402
from benchmarks.predicted import predictions  # noqa: E402
from benchmarks.record import read_record, report, write_record  # noqa: E402
from benchmarks.step import BenchStep, StepOptions, step_figures  # noqa: E402
from megatron_bagel.layout.pack import Pack  # noqa: E402
from megatron_bagel.platform.device import device_name, reset_peak_memory, synchronize  # noqa: E402
from megatron_bagel.platform.launch.process_group import init_distributed, shutdown_distributed  # noqa: E402

#: What may be changed in a step, by name.
VARIANTS: dict[str, StepOptions] = {
    "plain": StepOptions(),
    "sdpa": StepOptions(backend="sdpa"),
    "transformer_engine": StepOptions(transformer_impl="transformer_engine"),
    "stored_latents": StepOptions(stored_latents=True),
    "vae_bf16": StepOptions(vae_bf16=True),
    "vae_split_norm": StepOptions(vae_kernels="split_norm"),
    "vae_channels_last": StepOptions(vae_kernels="channels_last", vae_bf16=True),
    "vae_compiled": StepOptions(vae_kernels="compiled", vae_bf16=True),
    "overlap_vae": StepOptions(overlap_vae=True),
    "chunked_ce": StepOptions(ce_chunk_tokens=1024),
    "constant_encoder": StepOptions(vit_chunk_tokens=4096),
    "flex_flash": StepOptions(backend="flex_flash"),
    "compiled_kernels": StepOptions(fused_kernels="compiled"),
    "magi": StepOptions(backend="magi"),
    "one_pass": StepOptions(one_pass=True),
    "one_pass_bf16": StepOptions(one_pass=True, optimizer_state_dtype="bf16"),
    "recompute": StepOptions(recompute_layers=1),
    "all": StepOptions(
        transformer_impl="transformer_engine", vae_kernels="channels_last", vae_bf16=True, ce_chunk_tokens=1024, stored_latents=True
    ),
    "all_local": StepOptions(fused_kernels="compiled", one_pass=True, ce_chunk_tokens=1024, stored_latents=True),
}
_END = "plain, at the end"


def measured(config: BenchConfig, pack: Pack, options: StepOptions, rounds: int, warmup: int, profiled: bool) -> dict[str, Any]:
    """The figures of one variant."""
    reset_peak_memory()
    held = torch.cuda.memory_allocated() if platform.has_gpu() else 0  # of earlier variants: it would count in this one's peak
    torch.manual_seed(1234)  # the same weights for every variant
    step, watch = BenchStep(config.arch, pack, options), Stopwatch(warmup)
    losses = [step.run(watch) for _ in range(warmup + rounds)]
    figures = step_figures(step, watch, losses)
    figures |= predictions(config.arch, pack, step.backend, options, figures)
    figures |= {"step_without_laps_s": seconds_each(lambda: step.run(NoLaps()), rounds), "held_before_bytes": held}
    if profiled:
        figures["profile"] = kernel_profile(lambda: step.run(NoLaps()))
    return figures


def release_memory() -> None:
    """Free what the last variant held; its optimizer is part of reference cycles."""
    gc.collect()
    if platform.has_gpu():
        torch.cuda.empty_cache()


def labels(variants: Sequence[str], earlier: Mapping[str, Any]) -> list[str]:
    """What is left to measure after ``earlier`` figures: plain is measured twice, and what the program ended in comes last."""
    wanted = [*variants, *([_END] if len(variants) > 1 and variants[0] == "plain" else [])]
    left, ended_in = [label for label in wanted if label not in earlier.get("variants", {})], earlier.get("measuring")
    return [label for label in left if label != ended_in] + [label for label in left if label == ended_in]


def earlier_figures(output: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a record to go on with. Raises ValueError if it is of another config, pack or device."""
    if not output.exists():
        return {}
    figures = read_record(output).figures
    if different := [name for name, value in result.items() if name in figures and figures[name] != value]:
        raise ValueError(f"{output} was measured with another {' and '.join(different)}; leave out --resume to measure everything again")
    return figures


def refusal(error: Exception) -> str:
    """What an error says and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:500]} ({Path(frame.filename).name}:{frame.lineno})"


def measure(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure each variant into ``result``, and write the record before and after each."""
    config = CONFIGS[arguments.config]
    pack = filled_pack(config, arguments.long) if arguments.long else bench_pack(config)
    result["tokens"] = pack.sequence_length
    earlier = earlier_figures(arguments.output, result) if arguments.resume else {}
    variants = result["variants"] = dict(earlier.get("variants", {}))

    def write() -> None:
        if arguments.output:
            write_record(arguments.output, result)

    for label in labels(arguments.variants, earlier):
        result["measuring"] = label
        write()
        try:
            options = VARIANTS["plain" if label == _END else label]
            figures = measured(config, pack, options, arguments.rounds, arguments.warmup, arguments.profile)
        except Exception as error:  # whatever one variant fails with, the others are measured
            figures = {"refused": refusal(error)}
        plain = variants.get("plain", {}).get("step_s")
        if plain and "step_s" in figures:
            figures["times_as_fast_as_plain"] = plain / figures["step_s"]
        variants[label] = figures
        del result["measuring"]
        write()
        synchronize()  # an error of the device would make every later variant fail: a new process has to go on
        release_memory()


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=sorted(CONFIGS), default="bench-53m")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--long", type=int, default=0, metavar="TOKENS", help="a pack filled to this many tokens instead of the named one")
    parser.add_argument("--rounds", type=int, default=5, help="measured repetitions; medians are reported")
    parser.add_argument("--warmup", type=int, default=2, help="repetitions before the measured ones")
    parser.add_argument("--profile", action="store_true", help="also profile one step of each variant")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0 keeps torch's choice")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    parser.add_argument("--resume", action="store_true", help="measure only what the record of --output lacks")
    arguments = parser.parse_args(argv)
    arguments.variants = arguments.variants.split(",")
    if unknown := [name for name in arguments.variants if name not in VARIANTS]:
        parser.error(f"unknown variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    if arguments.rounds < 1 or arguments.warmup < 0:
        parser.error("--rounds must be at least 1 and --warmup at least 0")
    if arguments.resume and arguments.output is None:
        parser.error("--resume needs --output, the record to go on with")
    return arguments


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    from megatron.core import parallel_state, tensor_parallel

    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # Otherwise torch would run a function eagerly once it had been compiled too often, and the figures would not be the compiled one's.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    init_distributed()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    result: dict[str, Any] = {"config": arguments.config, "device": device_name(), "threads": torch.get_num_threads()}
    measure(arguments, result)
    shutdown_distributed()
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
