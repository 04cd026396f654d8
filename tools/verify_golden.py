# SPDX-License-Identifier: Apache-2.0
"""Holds this code against numbers recorded from the original: every training case, generation case and module, one line each.

    python tools/verify_golden.py                                 tests/goldens, or --goldens DIR
    python tools/verify_golden.py --attention-backend flex        on a GPU: the kernel that training uses there
    python tools/verify_golden.py --fused-kernels compiled        the elementwise kernels by torch.compile

It computes on the GPU where there is one. Exit status 0 only if every case is within the tolerances of the goldens: 1e-4 relative
on losses and norms, 2e-5 + 1e-4 relative on elements, fp32. Sizes and settings come from the goldens, so a set recorded from another model
serves as well.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # started as a script, only this file's own folder is on the path

from megatron_bagel import platform  # noqa: E402

# Before anything of Megatron-Core is imported.
platform.install()

import torch  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402

from megatron_bagel.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_bagel.model.kernels.choice import KernelsName  # noqa: E402
from megatron_bagel.platform.device import device_name  # noqa: E402
from megatron_bagel.platform.launch.process_group import init_distributed, shutdown_distributed  # noqa: E402
from tools.golden_cases import TrainCases  # noqa: E402
from tools.golden_common import CaseResult  # noqa: E402
from tools.golden_infer import run_infer_cases  # noqa: E402
from tools.golden_model import GoldenModel  # noqa: E402
from tools.golden_modules import run_module_cases  # noqa: E402
from tools.golden_train import train_results  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="verify_golden.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--goldens", type=Path, default=ROOT / "tests" / "goldens", help="folder of recorded numbers (default: %(default)s)")
    p.add_argument(
        "--attention-backend",
        choices=("sdpa", "flex", "flex_flash", "dense"),
        default="sdpa",
        help="of the training cases (default: %(default)s)",
    )
    p.add_argument(
        "--fused-kernels",
        choices=get_args(KernelsName),
        default="eager",
        help="elementwise kernels of the decoder, in all cases (default: %(default)s)",
    )
    return p


def all_cases(goldens: Path, backend: str, fused_kernels: KernelsName = "eager") -> Iterator[CaseResult]:
    """Modules, training, generation; needs Megatron-Core's groups of one process."""
    model = GoldenModel(goldens, fused_kernels)
    training = TrainCases(goldens, model, backend)
    parts = training.parts
    yield from run_module_cases(goldens, model, parts)
    yield from train_results(training)
    tokenizer = load_tokenizer(model.folder.path, add_special=False)
    yield from run_infer_cases(
        goldens,
        SimpleNamespace(
            decoder=parts.decoder, vision_tower=parts.tower, autoencoder=model.autoencoder, tokenizer=tokenizer, arch=model.arch
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all within tolerance, 1 some case is not, 2 the goldens cannot be read."""
    arguments, started = parser().parse_args(argv), time.monotonic()
    goldens = arguments.goldens
    if not (goldens / "train" / "expected.json").is_file():
        print(f"--goldens {goldens}: there is no train/expected.json in it", file=sys.stderr)
        return 2
    if arguments.attention_backend.startswith("flex") and not platform.has_gpu():
        print(f"--attention-backend {arguments.attention_backend} has no backward pass on a CPU; use sdpa or dense", file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = False  # convolutions on a GPU would round to ten bits
    results = []
    init_distributed()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron-Core's, about what a GPU would do
            for result in all_cases(goldens, arguments.attention_backend, arguments.fused_kernels):
                print(result.line(), flush=True)
                results.append(result)
    except (ValueError, OSError) as error:
        print(f"--goldens {goldens}: {error}", file=sys.stderr)
        return 2
    finally:
        shutdown_distributed()
    failed = [result.name for result in results if not result.ok]
    left_out = sum(result.detail.startswith("not covered") for result in results)
    verdict = f"{len(failed)} not within tolerance: {', '.join(failed)}" if failed else "all within tolerance"
    print(f"{len(results) - left_out} cases in {time.monotonic() - started:.0f} s on {device_name()}, {verdict}; {left_out} not covered")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
