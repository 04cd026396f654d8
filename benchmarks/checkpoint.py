# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in numbers, as JSON: memory and speed of converting, times of saving, loading and resharding, stall of a background save.

    python -m benchmarks.checkpoint convert --gigabytes 8 --folder DISK     synthetic released folder -> checkpoint -> folder
    python -m benchmarks.checkpoint saves --config bench-53m --folder DISK  one training state: saved, loaded, loaded on other layouts

Conversion is compared with copying the same weight file on the same disk, fsync included, files read from the page cache both times; its
memory is the peak resident size of the converter's process. The folder's autoencoder is a small one. All files are removed in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import report
from megatron_bagel import platform

ROOT = Path(__file__).resolve().parent.parent


def synthetic_folder(folder: Path, gigabytes: float) -> int:
    """A model folder of about so many GB in bf16, real names and proportions, random bits; returns the bytes of its weights."""
    from megatron_bagel.checkpoint.hf.folder import WeightFile, write_folder
    from megatron_bagel.checkpoint.hf.weight_map import WeightMap
    from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch
    from megatron_bagel.encoders.autoencoder import AutoEncoder
    from megatron_bagel.encoders.autoencoder_io import save_autoencoder
    from megatron_bagel.model.positions import sincos_2d
    from megatron_bagel.sample_world.tokenizer_training import train_tokenizer

    # Qwen2.5-3B's width with its embedding; small targets get a narrow model, so that there are still layers.
    wide = gigabytes >= 2
    width, inner, vocabulary = (2048, 11008, 151936) if wide else (512, 1408, 20000)
    vit = ViTArch(1152, 4304, 27, 16, image_size=980) if wide else ViTArch(128, 352, 4, 4, image_size=224)
    arch = BagelArch(
        LLMArch(width, inner, 1, width // 128, 2, vocabulary), vit, AutoencoderArch(ch=32), max_latent_size=64,
        vit_max_num_patch_per_side=vit.image_size // vit.patch_size,
    )  # fmt: skip
    sizes = [WeightFile(torch.zeros, "bf16").bytes(WeightMap(_deep(arch, layers))) for layers in (1, 2)]
    arch = _deep(arch, max(1, round((gigabytes * 1e9 - sizes[0]) / (sizes[1] - sizes[0])) + 1))
    weight_map = WeightMap(arch)
    noise = torch.randn(1 << 20).bfloat16()

    def value(name: str) -> torch.Tensor:
        shape = weight_map.entries[name].shape
        return noise.repeat(-(-torch.Size(shape).numel() // noise.numel()))[: torch.Size(shape).numel()].view(shape)

    train_tokenizer(["a few words"], folder.parent / "tokenizer", 300)
    save_autoencoder(AutoEncoder(AutoencoderArch(ch=32)), folder.parent / "ae" / "ae.safetensors")
    files = {"ema": WeightFile(value)}
    write_folder(folder, arch, files, sincos_2d, folder.parent / "tokenizer", folder.parent / "ae" / "ae.safetensors")
    return files["ema"].bytes(weight_map)


def _deep(arch: Any, layers: int) -> Any:
    return replace(arch, llm=replace(arch.llm, num_hidden_layers=layers))


#: The start of a measured process: at its end it says the most memory it held. What the kernel tells a parent (wait4) will not do: there
#: a process counts as large as its parent was when it started it.
_SAY_PEAK = """
import atexit, pathlib, resource, runpy
def say_peak():
    status = pathlib.Path("/proc/self/status")
    lines = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")] if status.exists() else []
    print("peak bytes", int(lines[0]) * 1024 if lines else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
atexit.register(say_peak)
"""


def run_measured(code: str, arguments: Sequence[str] = ()) -> dict[str, float]:
    """Wall seconds, processor seconds and peak resident bytes of a Python process. Raises RuntimeError with its output when it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", _SAY_PEAK + code, *arguments]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read()
    if process.returncode:
        raise RuntimeError(f"{code} {' '.join(arguments)} failed: {said[-2000:]}")
    peak = next(int(line.split()[2]) for line in said.splitlines() if line.startswith("peak bytes "))
    return {"wall_s": time.perf_counter() - start, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": peak}


def _module(name: str) -> str:
    """Code that runs a module as `python -m` does."""
    return f"runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"


def copy_seconds(source: Path, target: Path) -> float:
    """Seconds to copy a file and sync it to disk."""
    os.sync()  # nothing of what was written before waits any more
    start = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def measure_conversion(gigabytes: float, folder: Path) -> dict[str, Any]:
    """Both directions against a copy. The start of an interpreter with torch and Megatron-Core is measured apart."""
    source = folder / "hf"
    size = synthetic_folder(source, gigabytes)
    start = run_measured("from megatron_bagel import platform; platform.install(); import megatron_bagel.checkpoint.convert")
    copies = [copy_seconds(source / "ema.safetensors", folder / "copied")]
    arguments = ["--model", str(source), "--output", str(folder / "checkpoint")]
    os.sync()
    to_megatron = run_measured(_module("tools.checkpoint_convert.hf_to_megatron"), arguments)
    copies.append(copy_seconds(source / "ema.safetensors", folder / "copied"))
    arguments = ["--checkpoint", str(folder / "checkpoint"), "--output", str(folder / "back")]
    os.sync()
    to_hf = run_measured(_module("tools.checkpoint_convert.megatron_to_hf"), arguments)
    copies.append(copy_seconds(source / "ema.safetensors", folder / "copied"))
    copying = statistics.median(copies)
    compared = [str(source / "ema.safetensors"), str(folder / "back/ema.safetensors")]
    same = run_measured(_module("benchmarks.checkpoint"), ["same", *compared])
    result: dict[str, Any] = {"weight_bytes": size, "copy_s": copies, "start_s": start["wall_s"], "start_peak_bytes": start["peak_bytes"]}
    for name, measured in (("hf_to_megatron", to_megatron), ("megatron_to_hf", to_hf)):
        working = measured["wall_s"] - start["wall_s"]
        result[name] = {**measured, "speed_of_copying": copying / measured["wall_s"], "speed_of_copying_without_start": copying / working}
    return {**result, "equal_after_both": bool(same)}


def same_files(first: Path, second: Path) -> None:
    """Raise ValueError when two safetensors files differ in a name, type or bit."""
    from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader

    left, right = SafetensorsReader(first), SafetensorsReader(second)
    if set(left.keys()) != set(right.keys()):
        raise ValueError("the files hold different tensors")
    for name in left.keys():  # noqa: SIM118
        if left.spec(name) != right.spec(name) or not torch.equal(left.get(name), right.get(name)):
            raise ValueError(f"tensor {name} differs")


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _trained(config_name: str, tensor: int, pipeline: int) -> Any:
    """A training state with optimizer moments on this rank's share of a named configuration."""
    from megatron.core import parallel_state

    from benchmarks.named_configs import CONFIGS
    from megatron_bagel.checkpoint.dist.state import Trained
    from megatron_bagel.checkpoint.hf.initial_weights import initialise
    from megatron_bagel.checkpoint.hf.weight_map import WeightMap
    from megatron_bagel.config.megatron_arguments import MegatronArguments
    from megatron_bagel.config.transformer_config import transformer_config
    from megatron_bagel.model.build import build_decoder
    from megatron_bagel.parallel.kv_sharing import initialize_kv_sharing
    from megatron_bagel.training.optim.ema import ShardedEma
    from megatron_bagel.training.optim.optimizer import OptimizerSettings, build_optimizer, optimizer_step, wrap_ddp

    arch = replace(CONFIGS[config_name].arch, vit=None)
    config = transformer_config(arch.llm, MegatronArguments(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline))
    initialize_kv_sharing(arch.llm.num_key_value_heads)
    decoder = build_decoder(arch, config, parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage())
    initialise([decoder], WeightMap(arch), 1)
    settings = OptimizerSettings(lr=1e-4)
    wrapped = wrap_ddp(config, [decoder], settings)
    optimizer = build_optimizer(wrapped, settings)
    trained = Trained({"decoder": wrapped[0]}, arch, optimizer, ShardedEma({"decoder": wrapped[0]}, optimizer, 0.99))
    for parameter in decoder.parameters():
        parameter.main_grad.fill_(1e-3)
    optimizer_step(optimizer)
    return trained


def rank_main(job: str, config_name: str, folder: Path, tensor: int, pipeline: int) -> dict[str, Any]:
    """What every rank of a launched group does: "save" in both ways, or "load". Collective."""
    platform.install()
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from megatron_bagel.checkpoint.dist.load import load_checkpoint
    from megatron_bagel.checkpoint.dist.saver import Saver, SaveSettings
    from megatron_bagel.platform.launch.process_group import init_distributed, shutdown_distributed

    init_distributed()
    parallel_state.initialize_model_parallel(tensor, pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    trained = _trained(config_name, tensor, pipeline)
    found: dict[str, Any] = {}
    if job == "save":
        waiting, background = (Saver(folder / name, SaveSettings(name == "background", keep_last=2)) for name in ("waiting", "background"))
        found["save_s"] = [_timed(lambda step=step: waiting.save(step, trained, {})) for step in range(1, 4)]
        stalls, ends = [], []
        for step in range(1, 4):
            start = time.perf_counter()
            background.save(step, trained, {})
            stalls.append(time.perf_counter() - start)
            background.finish()
            ends.append(time.perf_counter() - start)
        found |= {"background_stall_s": stalls, "background_until_published_s": ends}
        found["bytes"] = sum(path.stat().st_size for path in (folder / "waiting" / "0000003").iterdir())
    else:
        found["load_s"] = [_timed(lambda: load_checkpoint(folder / "waiting" / "0000003", trained)) for _ in range(2)]
    dist.barrier()
    first = dist.get_rank() == 0
    shutdown_distributed()
    return found if first else {}


def measure_saves(config_name: str, folder: Path) -> dict[str, Any]:
    """One state saved by one process, then loaded on several layouts."""
    result: dict[str, Any] = {"config": config_name}
    for job, name, tensor, pipeline in (
        ("save", "one", 1, 1), ("load", "one", 1, 1), ("load", "tp2", 2, 1), ("load", "pp2", 1, 2),
    ):  # fmt: skip
        ranks = tensor * pipeline
        rank = ["-m", "benchmarks.checkpoint", "rank", job, config_name, str(folder), str(tensor), str(pipeline)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        done = subprocess.run([sys.executable, *launcher, *rank], capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
        if done.returncode:
            raise RuntimeError(f"{job} on {name} failed: {done.stderr[-2000:]}")
        numbers = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
        result |= numbers if job == "save" else {f"load_on_{name}_s": numbers["load_s"]}
    return result


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoint", description=__doc__, formatter_class=raw)
    modes = parser.add_subparsers(dest="mode", required=True)
    convert = modes.add_parser("convert", help="memory and speed of converting")
    convert.add_argument("--gigabytes", type=float, default=8.0, help="size of the weights in bf16; three times as much disk is used")
    saves = modes.add_parser("saves", help="times of saving, loading and resharding")
    saves.add_argument("--config", default="bench-53m", help="named configuration of benchmarks/named_configs.py; its decoder is used")
    for mode in (convert, saves):
        mode.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
        mode.add_argument("--output", "--out", type=Path, help="write a record of this run (benchmarks/record.py) here")
    same = modes.add_parser("same", help="whether two weight files are equal (used by convert)")
    same.add_argument("files", nargs=2, type=Path)
    rank = modes.add_parser("rank", help="one rank of a measurement (started by saves)")
    for name, kind in (("job", str), ("config", str), ("folder", Path), ("tensor", int), ("pipeline", int)):
        rank.add_argument(name, type=kind)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the JSON, return it."""
    args = parse_arguments(argv)
    if args.mode == "same":
        same_files(*args.files)
        return {}
    if args.mode == "rank":
        found = rank_main(args.job, args.config, args.folder, args.tensor, args.pipeline)
        if found:
            print(json.dumps(found))
        return found
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        where = Path(folder).resolve()  # the measured processes start in another folder
        result = measure_conversion(args.gigabytes, where) if args.mode == "convert" else measure_saves(args.config, where)
    report(result, args.output)
    return result


if __name__ == "__main__":
    main()
