# SPDX-License-Identifier: Apache-2.0
"""Time and memory of dry runs: single ranks of a model of released size in a world that this machine does not have.

    python -m benchmarks.dry_run                                  # BAGEL-7B-MoT, ranks 0, 8000 and 16383 of 16,384
    python -m benchmarks.dry_run --model qwen3-30b-a3b-mot        # 128 experts for each kind of token, divided over 8 ranks
    python -m benchmarks.dry_run --world 1024 --ranks 700

The parallel sizes are tensor 4 with sequence parallelism x pipeline 2, or pipeline 4 with expert parallelism 8 and full recomputation; the
rest is data. Packs hold 36,864 tokens, and the index 64 samples with pictures of 512 pixels. Each dry run is a process of its own, bound to
one core; its time (wall, and the processor's) and its memory include its imports. One line for each stage goes to the error output.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from megatron_bagel import platform  # noqa: E402

platform.install()

from benchmarks.record import report  # noqa: E402
from megatron_bagel.planning.models import MODELS  # noqa: E402

_TOKENS = 36864
#: Parallel sizes of each model, and how many ranks one of its replicas has.
_PARALLEL: dict[str, tuple[int, list[str]]] = {
    "bagel-7b-mot": (8, ["--tensor_model_parallel_size=4", "--sequence_parallel=True", "--pipeline_model_parallel_size=2"]),
    "qwen3-30b-a3b-mot": (4, ["--pipeline_model_parallel_size=4", "--expert_model_parallel_size=8", "--recompute_granularity=full"]),
}
_RESIDENT = re.compile(r"largest resident memory\D*([\d.]+) GiB")
_PROCESSOR = re.compile(r"process: user ([\d.]+) s, system ([\d.]+) s")
_PHASES = re.compile(r"^seconds: (.+)$", re.MULTILINE)


def make_world(folder: Path, model: str) -> list[str]:
    """Make data, an index and the configurations of ``model``. Return the flags of training that all ranks share."""
    arch, data = MODELS[model], folder / "data"
    command = [sys.executable, "-m", "megatron_bagel", "data"]
    _run([*command, "sample", str(data), "--t2i=24", "--edit=16", "--vlm=24", "--image-size", "512"])
    words = [f"--dataset_config_file={data / 'dataset.yaml'}", f"--tokenizer={data / 'tokenizer'}", f"--output={folder / 'index'}"]
    _run([*command, "build", *words])
    # SigLIP has 27 layers, of which BAGEL leaves out the last.
    vit = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 980}
    for name, sizes in (("llm", arch.llm.to_hf()), ("vit", vit)):
        path = data / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | sizes), encoding="utf-8")
    (folder / "ae.safetensors").touch()  # weights are not read
    settings = {
        "llm_path": data / "llm", "vit_path": data / "vit", "vae_path": folder / "ae.safetensors", "init_random": True,
        "dataset_config_file": data / "dataset.yaml", "index_dir": folder / "index", "tokenizer_path": data / "tokenizer",
        "max_latent_size": 64, "vit_max_num_patch_per_side": 70, "max_num_tokens": _TOKENS, "expected_num_tokens": _TOKENS - 4096,
        "max_num_tokens_per_sample": 16384, "results_dir": folder / "results", "checkpoint_dir": folder / "checkpoints", "bf16": True,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in settings.items()] + _PARALLEL[model][1]


def measure(shared: Sequence[str], world: int, replica: int, rank: int) -> dict[str, Any]:
    """Dry-run one rank of replicas of ``replica`` ranks. Raises RuntimeError with the end of its output when it fails."""
    fake = ["--dry_run", f"--fake_world_size={world}", f"--fake_rank={rank}", f"--global_batch_size={world // replica}"]
    start = time.monotonic()
    printed = _run([sys.executable, "-m", "megatron_bagel", "train", *shared, *fake])
    seconds = time.monotonic() - start
    resident, phases, processor = (pattern.search(printed) for pattern in (_RESIDENT, _PHASES, _PROCESSOR))
    if resident is None or phases is None or processor is None:
        raise RuntimeError(f"the dry run of rank {rank} told of no memory, phases or processor time:\n{printed[-2000:]}")
    by_phase = {name: float(value) for name, value in (phase.rsplit(" ", 1) for phase in phases.group(1).split(", "))}
    cpu_s = sum(map(float, processor.groups()))
    return {"seconds": seconds, "cpu_s": cpu_s, "resident_gib": float(resident.group(1)), "phase_seconds": by_phase}


def _run(command: Sequence[str]) -> str:
    """Return what a command printed; on Linux it runs on one core."""
    core = {min(os.sched_getaffinity(0))} if hasattr(os, "sched_setaffinity") else None
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, core),
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:5])} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def _say(stage: str) -> None:
    print(stage, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=_PARALLEL, default="bagel-7b-mot", help="default: %(default)s")
    parser.add_argument("--world", type=int, default=16384, help="ranks of the world, a multiple of 32 (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 8000, 16383], help="ranks to build (default: 0 8000 16383)")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    replica, _ = _PARALLEL[arguments.model]
    ranks = {}
    with tempfile.TemporaryDirectory() as folder:
        _say("data and index")
        shared = make_world(Path(folder), arguments.model)
        for rank in arguments.ranks:
            _say(f"rank {rank} of {arguments.world}")
            ranks[str(rank)] = measure(shared, arguments.world, replica, rank)
    result = {"model": arguments.model, "world": arguments.world, "parallel": _PARALLEL[arguments.model][1], "ranks": ranks}
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
