# SPDX-License-Identifier: Apache-2.0
"""The parts of a GPU's day, most valuable first, at full size and at a size that a CPU finishes in seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Part:
    """One measurement or check.

    Attributes:
        name: Its name, which is part of the record's.
        seconds: Its limit. A part that takes longer is stopped, and its record keeps what it had written.
        command: What follows ``python``. A command with ``--output`` in its interface writes its own record.
        records: Whether the command takes ``--output``. Otherwise the record holds its exit status and the end of what it printed.
        resumes: Whether the command takes ``--resume`` too, and goes on with what a stopped or failed one had measured.
        needs: A package without which the part is left out.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    records: bool = True
    resumes: bool = False
    needs: str | None = None

    @property
    def least_seconds(self) -> float:
        """Return the time below which the part is not begun: a part that cannot go on later would leave nothing of use."""
        return 30 if self.resumes else self.seconds / 2


def _benchmark(name: str, *flags: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.{name}", *flags)


def _tests(name: str, seconds: float, needs: str | None = None) -> Part:
    return Part(f"tests-{name}", seconds, ("-m", "pytest", "-v", f"tests/gpu/test_gpu_{name.replace('-', '_')}.py"), False, needs=needs)


_TE = "transformer_engine"
_LONG = "plain,chunked_ce,constant_encoder,compiled_kernels"
_STEP = ("step_variants", "--config", "bench-7b-seventh")
PARTS = (
    # First whether the numbers are right, how fast the step is and where its time goes. Then what has not run on a GPU before what has.
    Part("goldens", 120, ("tools/verify_golden.py",), records=False),
    Part("step", 480, _benchmark(*_STEP, "--rounds", "6", "--warmup", "3", "--profile"), resumes=True),
    Part("matmul", 60, _benchmark("train_step", "rate", "--config", "bench-7b-seventh")),
    Part("goldens-compiled", 180, ("tools/verify_golden.py", "--fused-kernels", "compiled"), records=False),
    _tests("side-stream", 90),
    _tests("kernels", 240),
    Part("generation", 300, _benchmark("generate", "--config", "bagel-7b", "--side", "1024", "--steps", "24", "--tokens", "64")),
    _tests("generation", 300),
    Part("autoencoder-bf16", 300, _benchmark("autoencoder", "--rounds", "3", "--bf16", "--compile")),
    Part("step-long", 300, _benchmark(*_STEP, "--long", "36864", "--variants", f"{_LONG},all_local", "--rounds", "4"), resumes=True),
    Part("optimizer", 60, _benchmark("optimizer_pass", "--millions", "256")),
    Part("goldens-flex", 180, ("tools/verify_golden.py", "--attention-backend", "flex"), records=False),
    Part("autoencoder", 180, _benchmark("autoencoder", "--rounds", "3")),
    _tests("training", 480),
    _tests("attention", 300),
    _tests("transformer-engine", 240, _TE),
    _tests("offload", 240, _TE),  # Megatron-Core's optimizer in host memory asks for the package
    # All but two of the precisions are FP8, whose products are Transformer Engine's.
    Part("precisions", 480, _benchmark("precision_curves"), needs=_TE),
    Part("layers", 120, _benchmark("train_step", "layers", "--hidden", "3584", "--layers", "4", "--tokens", "16384")),
    Part("overhead", 120, _benchmark("overhead", "--config", "bench-53m")),
)

_TINY_COMMANDS: dict[str, tuple[str, ...]] = {
    "step": _benchmark("step_variants", "--config", "bench-tiny", "--rounds", "1", "--warmup", "1", "--profile"),
    "step-long": _benchmark("step_variants", "--config", "bench-tiny", "--long", "600", "--variants", "plain,chunked_ce", "--rounds", "1"),
    "matmul": _benchmark("train_step", "rate", "--config", "bench-tiny"),
    "autoencoder": _benchmark("autoencoder", "--width", "32", "--side", "32", "--images", "4", "--rounds", "1"),
    "autoencoder-bf16": _benchmark("autoencoder", "--width", "32", "--side", "32", "--images", "4", "--rounds", "1", "--bf16"),
    "generation": _benchmark("generate", "--config", "bench-tiny", "--side", "32", "--steps", "9", "--tokens", "2"),
    "optimizer": _benchmark("optimizer_pass", "--millions", "0.1", "--repeats", "1"),
    "precisions": _benchmark("precision_curves", "--tiny", "--precisions", "bf16; fp32"),
    "layers": _benchmark("train_step", "layers", "--hidden", "128", "--layers", "1", "--tokens", "128", "--rounds", "1"),
    "overhead": _benchmark("overhead", "--config", "bench-tiny", "--steps", "1", "--calls", "5"),
}
#: The parts with tiny sizes, without the two whose only size is the full one (the goldens by FlexAttention, and tests that need a GPU).
TINY = tuple(
    replace(part, seconds=300, command=_TINY_COMMANDS.get(part.name, part.command), needs=None)
    for part in PARTS
    if part.name in _TINY_COMMANDS or part.name in ("goldens", "goldens-compiled")
)
