# SPDX-License-Identifier: Apache-2.0
"""Time and memory of dry runs: single ranks of BAGEL-7B-MoT in a world that this machine does not have.

    python -m benchmarks.dry_run                                  # ranks 0, 8000 and 16383 of 16,384
    python -m benchmarks.dry_run --world 1024 --ranks 700

The parallel sizes are tensor 4 with sequence parallelism x pipeline 2; the rest is data. Packs hold 36,864 tokens, and the index 64 samples
with pictures of 512 pixels. Each dry run is a process of its own, bound to one core; its time and memory include its imports.
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

from benchmarks.record import report  # noqa: E402

_TOKENS = 36864
#: Sizes of the released model, written over those of the sample's configurations.
_LLM = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064,
}  # fmt: skip
_VIT = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 980}
_PARALLEL = ["--tensor_model_parallel_size=4", "--sequence_parallel=True", "--pipeline_model_parallel_size=2"]
_RESIDENT = re.compile(r"largest resident memory\D*([\d.]+) GiB")


def make_world(folder: Path) -> list[str]:
    """Make data, an index and the configurations. Return the flags of training that all ranks share."""
    data = folder / "data"
    command = [sys.executable, "-m", "megatron_bagel", "data"]
    _run([*command, "sample", str(data), "--t2i=24", "--edit=16", "--vlm=24", "--image-size", "512"])
    words = [f"--dataset_config_file={data / 'dataset.yaml'}", f"--tokenizer={data / 'tokenizer'}", f"--output={folder / 'index'}"]
    _run([*command, "build", *words])
    for name, sizes in (("llm", _LLM), ("vit", _VIT)):
        path = data / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | sizes), encoding="utf-8")
    (folder / "ae.safetensors").touch()  # weights are not read
    settings = {
        "llm_path": data / "llm", "vit_path": data / "vit", "vae_path": folder / "ae.safetensors", "init_random": True,
        "dataset_config_file": data / "dataset.yaml", "index_dir": folder / "index", "tokenizer_path": data / "tokenizer",
        "max_latent_size": 64, "vit_max_num_patch_per_side": 70, "max_num_tokens": _TOKENS, "expected_num_tokens": _TOKENS - 4096,
        "max_num_tokens_per_sample": 16384, "results_dir": folder / "results", "checkpoint_dir": folder / "checkpoints", "bf16": True,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in settings.items()] + _PARALLEL


def measure(shared: Sequence[str], world: int, rank: int) -> dict[str, float]:
    """Dry-run one rank. Raises RuntimeError with the end of its output when it fails."""
    fake = ["--dry_run", f"--fake_world_size={world}", f"--fake_rank={rank}", f"--global_batch_size={world // 8}"]
    start = time.monotonic()
    printed = _run([sys.executable, "-m", "megatron_bagel", "train", *shared, *fake])
    resident = _RESIDENT.search(printed)
    if resident is None:
        raise RuntimeError(f"the dry run of rank {rank} told of no memory:\n{printed[-2000:]}")
    return {"seconds": time.monotonic() - start, "resident_gib": float(resident.group(1))}


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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=16384, help="ranks of the world, a multiple of 8 (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 8000, 16383], help="ranks to build (default: 0 8000 16383)")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        shared = make_world(Path(folder))
        ranks = {str(rank): measure(shared, arguments.world, rank) for rank in arguments.ranks}
    result = {"world": arguments.world, "ranks": ranks}
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
