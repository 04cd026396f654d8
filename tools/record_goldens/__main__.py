# SPDX-License-Identifier: Apache-2.0
"""Records a set of goldens from a checkout of the original BAGEL, on a CPU in fp32: ``tools/record_goldens/README.md``.

    python -m tools.record_goldens --reference ../Bagel --output goldens                           the set of tests/goldens again
    python -m tools.record_goldens --reference ../Bagel --output goldens --check tests/goldens     and compares it with that set
    python -m tools.record_goldens --reference ../Bagel --output wide --seed 7 --set llm.hidden_size=256 llm.num_hidden_layers=6

Sizes are those of ``--template`` but for ``--set``. Raw data and tokenizer are the template's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
#: How far two sets may be apart that were made by the same code. Convolutions of another kind of processor round by more: README.md.
TOLERANCE = 1e-6


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(prog="record_goldens", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reference = os.environ.get("MEGATRON_BAGEL_REFERENCE")
    p.add_argument("--reference", type=Path, default=reference and Path(reference), metavar="DIR",
                   help="a checkout of the original (default: the variable MEGATRON_BAGEL_REFERENCE)")  # fmt: skip
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the set, which must not exist")
    p.add_argument("--template", type=Path, default=ROOT / "tests" / "goldens", metavar="DIR",
                   help="set whose raw data, tokenizer and sizes are used (default: tests/goldens)")  # fmt: skip
    p.add_argument("--seed", type=int, default=1234, help="seed of the weights (default: %(default)s, that of tests/goldens)")
    p.add_argument("--set", nargs="+", default=[], metavar="PART.NAME=VALUE", dest="overrides",
                   help="other sizes: llm, vit, ae or top, and a name of its settings; VALUE is JSON")  # fmt: skip
    p.add_argument("--check", type=Path, metavar="DIR", help="compare the new set with this one")
    p.add_argument("--tolerance", type=float, default=TOLERANCE, help="of --check (default: %(default)g)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 recorded (and equal, with --check), 1 not equal, 2 something for the caller to change."""
    arguments = parser().parse_args(argv)
    try:
        with said_in(arguments.output.with_suffix(".log")):
            record(arguments)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"{error}: the original needs the packages of tools/record_goldens/requirements.txt", file=sys.stderr)
        return 2
    return report(arguments.output, arguments.check, arguments.tolerance) if arguments.check else 0


@contextlib.contextmanager
def said_in(path: Path) -> Iterator[None]:
    """Send what the original prints, a traceback for each row that it leaves out, to a file within the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield


def record(arguments: argparse.Namespace) -> None:
    """Write a whole set."""
    if arguments.reference is None:
        raise ValueError("--reference: give a checkout of the original BAGEL, or set MEGATRON_BAGEL_REFERENCE")
    if arguments.output.exists():
        raise ValueError(f"--output {arguments.output}: it exists; give a folder that does not")
    import torch

    from tools.record_goldens.data import DataSource
    from tools.record_goldens.files import GoldenFolder
    from tools.record_goldens.images import record_images
    from tools.record_goldens.inference import InferenceRecorder
    from tools.record_goldens.model import ModelSettings, ModelSource
    from tools.record_goldens.modules import record_modules
    from tools.record_goldens.original import Original
    from tools.record_goldens.packing import record_data
    from tools.record_goldens.training import TrainingRecorder

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    settings = ModelSettings.of_folder(arguments.template / "hf", dict(override(text) for text in arguments.overrides))
    original = Original(arguments.reference.resolve())
    folder = GoldenFolder(arguments.output.resolve())
    shutil.copytree(arguments.template / "raw_data", folder.root / "raw_data")
    models = ModelSource(original, settings, folder)
    _say("model and tokenizer")
    models.record(arguments.seed, arguments.template)
    data = DataSource(original, models, folder)
    try:
        _say("data sets, packing, transforms")
        record_data(data, folder)
        record_images(original, folder)
    finally:
        data.close()
    _say("training")
    TrainingRecorder(original, models, folder).record()
    _say("generation and modules")
    InferenceRecorder(original, models, folder).record()
    record_modules(original, models, folder)
    _say(f"the set is in {arguments.output}")


def override(text: str) -> tuple[str, Any]:
    """Return name and value of ``PART.NAME=VALUE``. Raises ValueError for another form."""
    name, equals, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"--set {text}: expected PART.NAME=VALUE with a JSON value, as in llm.hidden_size=256") from error


def report(recorded: Path, other: Path, tolerance: float = TOLERANCE) -> int:
    """Print the largest difference of every file that two sets share. Exit status 1 if one is above the tolerance."""
    from tools.record_goldens.files import compare_sets

    # Larger sets and other machines apart, names_shapes_7b.json is an assumption about the released size, which no run records.
    differences = [one for one in compare_sets(recorded, other) if one.file != "names_shapes_7b.json"]
    apart = [one for one in differences if one.largest > tolerance]
    for one in sorted(differences, key=lambda each: -each.largest):
        print(f"{'APART' if one in apart else 'ok':6}{one.largest:9.1e}  {one.file}{f'  {one.place}' if one.largest else ''}")
    print(f"{len(differences)} files, {len(apart)} more than {tolerance:g} apart")
    return 1 if apart else 0


def _say(text: str) -> None:
    print(text, file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    sys.exit(main())
