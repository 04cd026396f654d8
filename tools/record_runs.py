"""Records what a checkout computes: 20 steps of seven small runs on the CPU, with their metrics, checkpoints and exported model folders.

    python tools/record_runs.py before --repo OLD_CHECKOUT
    python tools/record_runs.py after
    python tools/compare_runs.py before after --bitwise

    python tools/record_runs.py continued --continue-from before     # the same runs from step 10 on, from the files of "before"
    python tools/compare_runs.py before continued --bitwise

The checkout is used through its documented commands only, in processes of their own, so any two commits can be recorded by one
script. Seeds are fixed and every process has one thread: two recordings of one commit on one machine are equal to the last bit.

OUT holds ``recording.json`` (what was run), ``world/`` (data, index, latents, autoencoder) and a folder for each case with
``metrics.jsonl``, ``checkpoints/0000010``, ``checkpoints/0000020``, ``export/`` (model folder, fp32, averages and weights) and
``commands.log``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STEPS, KEPT_STEP = 20, 10
COMMAND_TIMEOUT_S = 600
RECORDING = "recording.json"

TRAINING_FLAGS: dict[str, object] = {
    "init_random": True,
    "vit_max_num_patch_per_side": 10,
    "max_latent_size": 4,
    "max_num_tokens": 192,
    "expected_num_tokens": 160,
    "max_num_tokens_per_sample": 128,
    "num_workers": 0,
    "lr": 1e-3,
    "warmup_steps": 5,
    "total_steps": STEPS,
    "log_every": 1,
    "save_every": KEPT_STEP,
    "global_batch_size": 4,
    # Gradients of these runs are longer, so clipping is part of what is recorded.
    "max_grad_norm": 0.5,
    "ema": 0.9,
    "auto_resume": True,
}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


class CommandFailed(Exception):
    """A command of the recorded checkout ended with an error; the text says which and why."""


@dataclass(frozen=True)
class Case:
    """A run to record.

    Attributes:
        processes: How many ranks it has.
        flags: Flags besides ``TRAINING_FLAGS``.
        stops: Steps at which a process ends and the next one resumes, the last step included.
        latent_cache: Whether it trains from stored latents.
    """

    processes: int
    flags: Mapping[str, object] = field(default_factory=dict)
    stops: tuple[int, ...] = (STEPS,)
    latent_cache: bool = False


CASES = {
    "one-process": Case(1),
    "tp2-sp-pp2": Case(4, {**TP2_SP, **PP2}),
    "pp2-vpp2": Case(2, {**PP2, "virtual_pipeline_model_parallel_size": 2}),
    "cp3": Case(3, {"context_parallel_size": 3}),
    "dp2-overlap": Case(2, OVERLAP),
    "latent-cache": Case(1, latent_cache=True),
    # The numbers of dp2-overlap, interrupted: the two cases of one recording must be equal as well.
    "resume": Case(2, {**OVERLAP, "num_workers": 1}, stops=(KEPT_STEP, STEPS)),
}


@dataclass(frozen=True)
class Checkout:
    """A checkout of the project whose commands are run."""

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
            try:
                status = subprocess.run(
                    command, cwd=self.path, env=self._environment(), stdout=output, stderr=subprocess.STDOUT, timeout=COMMAND_TIMEOUT_S
                ).returncode
            except subprocess.TimeoutExpired:
                raise CommandFailed(f"{' '.join(command)} took longer than {COMMAND_TIMEOUT_S} s; its output is in {log}") from None
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
        """The commit checked out and whether files differ from it, for the record."""
        head = self._git("rev-parse", "HEAD")
        return head + (" with changes" if self._git("status", "--porcelain", "--untracked-files=no") else "") if head else "unknown"

    def package_folder(self) -> Path:
        """Where ``megatron_bagel`` is imported from when a command runs."""
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
    """Sample data of every kind, its index, an autoencoder with its stored latents, and the configs of a small model."""
    world.mkdir(parents=True)
    log, data, autoencoder = world / "commands.log", world / "data", world / "autoencoder"
    samples = ["--t2i", "24", "--edit", "16", "--vlm", "16", "--text", "8", "--image-size", "32", "48x32"]
    sizes = ["--hidden-size", "64", "--layers", "4", "--vit-hidden-size", "32", "--vit-layers", "2", "--vit-patches-per-side", "10"]
    checkout.run(["data_tools/make_sample_data.py", data, *samples, *sizes], log)
    # Two key/value heads, so that tensor parallelism splits them.
    config = data / "llm/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 4, "num_key_value_heads": 2}))
    dataset = ["--dataset_config_file", data / "dataset.yaml"]
    checkout.run(["data_tools/build_index.py", *dataset, "--tokenizer", data / "tokenizer", "--output", world / "index"], log)
    shutil.copytree(checkout.path / "examples/quickstart/autoencoder", autoencoder)
    vae = ["--vae", autoencoder / "ae.safetensors", "--output", world / "latents"]
    checkout.run(["data_tools/cache_latents.py", world / "index", *dataset, *vae], log)


def training_arguments(case: Case, world: Path, folder: Path, total_steps: int) -> list[str]:
    """The flags of a case's run up to ``total_steps``."""
    flags: dict[str, object] = {
        **TRAINING_FLAGS,
        "llm_path": world / "data/llm",
        "vit_path": world / "data/vit",
        "vae_path": world / "autoencoder/ae.safetensors",
        "dataset_config_file": world / "data/dataset.yaml",
        "index_dir": world / "index",
        "results_dir": folder,
        "checkpoint_dir": folder / "checkpoints",
        **({"latent_cache": world / "latents"} if case.latent_cache else {}),
        **case.flags,
        "total_steps": total_steps,
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def record_case(checkout: Checkout, case: Case, world: Path, folder: Path) -> None:
    """Train, and export the last checkpoint. Where ``folder`` holds a checkpoint already, the run continues from it."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "commands.log"
    kept = (folder / "checkpoints" / f"{KEPT_STEP:07d}").is_dir()
    for stop in case.stops:
        if not (kept and stop == KEPT_STEP):
            checkout.train(case.processes, training_arguments(case, world, folder, stop), log)
    checkpoint, output = folder / "checkpoints" / f"{STEPS:07d}", folder / "export"
    weights = ["--dtype", "fp32", "--weights", "both"]
    checkout.run(["tools/checkpoint_convert/megatron_to_hf.py", "--checkpoint", checkpoint, "--output", output, *weights], log)


def take_over(source: Path, folder: Path) -> None:
    """Copy what a run of another recording had left after ``KEPT_STEP`` steps: that checkpoint, and the metrics as they were written."""
    step = f"{KEPT_STEP:07d}"
    shutil.copytree(source / "checkpoints" / step, folder / "checkpoints" / step)
    # Steps after the checkpoint are removed from it by the run that resumes.
    shutil.copy(source / "metrics.jsonl", folder / "metrics.jsonl")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="record_runs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, metavar="OUT", help="folder to make; it must not exist, or be empty")
    p.add_argument("--repo", type=Path, default=Path(__file__).resolve().parent.parent, help="checkout to record (default: this one)")
    p.add_argument("--python", default=sys.executable, help="interpreter with the project's dependencies (default: %(default)s)")
    p.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    p.add_argument(
        "--continue-from", type=Path, metavar="RECORDING",
        help=f"use the data, the index and the checkpoints of step {KEPT_STEP} of another recording, instead of making them",
    )  # fmt: skip
    return p


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ValueError for folders that cannot be used."""
    out, repo, source = arguments.out, arguments.repo, arguments.continue_from
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT {out} exists and is not empty; remove it or name another folder")
    if not (repo / "megatron_bagel/train.py").is_file():
        raise ValueError(f"--repo {repo} is not a checkout of this project: it has no megatron_bagel/train.py")
    if source is None:
        return
    if not (source / RECORDING).is_file():
        raise ValueError(f"--continue-from {source} is not a complete recording: it has no {RECORDING}")
    for name in arguments.cases:
        checkpoint = source / name / "checkpoints" / f"{KEPT_STEP:07d}"
        if not checkpoint.is_dir():
            raise ValueError(f"--continue-from {source} has no checkpoint {checkpoint}; record the case {name} there first")


def record(arguments: argparse.Namespace) -> None:
    """Make the whole recording. ``recording.json`` is written last, so a folder without it is not complete."""
    out, checkout = arguments.out.resolve(), Checkout(arguments.repo.resolve(), arguments.python)
    source = arguments.continue_from.resolve() if arguments.continue_from is not None else None
    package = checkout.package_folder()
    if package != checkout.path / "megatron_bagel":
        raise ValueError(f"--python {arguments.python} imports megatron_bagel from {package}, not from --repo {checkout.path}")
    seconds: dict[str, float] = {}
    if source is None:
        world = out / "world"
        seconds["world"] = timed("world", lambda: make_world(checkout, world))
    else:
        # A recording that continued another one has no world of its own.
        world = Path(json.loads((source / RECORDING).read_text(encoding="utf-8"))["world"])
    for name in arguments.cases:
        if source is not None:
            take_over(source / name, out / name)
        seconds[name] = timed(name, lambda name=name: record_case(checkout, CASES[name], world, out / name))
    record = {
        "commit": checkout.commit(), "cases": list(arguments.cases), "world": str(world),
        "continued_from": str(source) if source is not None else None, "seconds": seconds,
    }  # fmt: skip
    (out / RECORDING).write_text(json.dumps(record, indent=1) + "\n")


def timed(name: str, work: Callable[[], None]) -> float:
    """Do ``work``, and print and return the seconds it took."""
    began = time.monotonic()
    work()
    seconds = round(time.monotonic() - began, 1)
    print(f"{name}: {seconds} s", flush=True)
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Record. Exit status: 0 done, 1 a command of the checkout failed, 2 arguments that cannot be used."""
    arguments = parser().parse_args(argv)
    try:
        check_arguments(arguments)
        record(arguments)
    except ValueError as error:
        print(f"record_runs: {error}", file=sys.stderr)
        return 2
    except CommandFailed as error:
        print(f"record_runs: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
