# SPDX-License-Identifier: Apache-2.0
"""Uses a checkout of this project through its documented commands, in processes of their own. Nothing of it is imported here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COMMAND_TIMEOUT_S = 1800
#: Where checkouts keep the small autoencoder, the newest first.
_AUTOENCODERS = ("megatron_bagel/sample_world/assets/vae", "examples/quickstart/autoencoder")


class CommandFailed(Exception):
    """Says which command of the recorded checkout failed, and why."""


@dataclass(frozen=True)
class Checkout:
    """Runs the commands of one checkout."""

    path: Path
    python: str

    def run(self, arguments: Sequence[str | Path], log: Path) -> None:
        """Run one command in the checkout, its output appended to ``log``.

        Raises:
            CommandFailed: It ended with another status than 0 or took longer than ``COMMAND_TIMEOUT_S``.
        """
        command = [self.python, *map(str, arguments)]
        with log.open("a", encoding="utf-8") as output:
            output.write(f"$ {' '.join(command)}\n")
            output.flush()
            # A session of its own, so that the ranks of a launcher end with it.
            process = subprocess.Popen(
                command, cwd=self.path, env=self._environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(COMMAND_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise CommandFailed(f"{' '.join(command)} took longer than {COMMAND_TIMEOUT_S} s; its output is in {log}") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if status:
            tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
            raise CommandFailed(f"{' '.join(command)} ended with status {status}; the end of {log}:\n{tail}")

    def train(self, processes: int, arguments: Sequence[str], log: Path) -> None:
        """Train on one process, or on several under torchrun."""
        module = ["-m", "megatron_bagel.train", *arguments]
        if processes == 1:
            self.run(module, log)
        else:
            self.run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *module], log)

    def commit(self) -> str:
        """Return the commit that is checked out, and whether files differ from it."""
        head = self._git("rev-parse", "HEAD")
        return head + (" with changes" if self._git("status", "--porcelain", "--untracked-files=no") else "") if head else "unknown"

    def package_folder(self) -> Path:
        """Return where ``megatron_bagel`` is imported from when a command runs."""
        code = "import megatron_bagel; print(megatron_bagel.__path__[0])"
        answer = subprocess.run(
            [self.python, "-c", code], cwd=self.path, env=self._environment(), capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
        if answer.returncode:
            raise CommandFailed(f"{self.python} cannot import megatron_bagel in {self.path}:\n{answer.stderr}")
        return Path(answer.stdout.strip())

    def _git(self, *arguments: str) -> str:
        answer = subprocess.run(["git", *arguments], cwd=self.path, capture_output=True, text=True, check=False)
        return answer.stdout.strip() if answer.returncode == 0 else ""

    def _environment(self) -> dict[str, str]:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        return {**os.environ, **threads, "PYTHONPATH": str(self.path), "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}


def make_world(checkout: Checkout, world: Path) -> None:
    """Make sample data of every kind, its index, an autoencoder with its stored latents, and the configs of a small model."""
    world.mkdir(parents=True)
    log, data, autoencoder = world / "commands.log", world / "data", world / "autoencoder"
    samples = ["--t2i", "24", "--edit", "16", "--vlm", "16", "--text", "8", "--image-size", "32", "48x32"]
    sizes = ["--hidden-size", "64", "--layers", "4", "--vit-hidden-size", "32", "--vit-layers", "2", "--vit-patches-per-side", "10"]
    checkout.run(["data_tools/make_sample_data.py", data, *samples, *sizes], log)
    # Two key/value heads, so that tensor parallelism splits them.
    config = data / "llm/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 4, "num_key_value_heads": 2}))
    dataset: list[str | Path] = ["--dataset_config_file", data / "dataset.yaml"]
    checkout.run(["data_tools/build_index.py", *dataset, "--tokenizer", data / "tokenizer", "--output", world / "index"], log)
    kept = (checkout.path / folder for folder in _AUTOENCODERS)
    shutil.copytree(next(folder for folder in kept if folder.is_dir()), autoencoder)
    vae: list[str | Path] = ["--vae", autoencoder / "ae.safetensors", "--output", world / "latents"]
    checkout.run(["data_tools/cache_latents.py", world / "index", *dataset, *vae], log)
