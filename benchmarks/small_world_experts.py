# SPDX-License-Identifier: Apache-2.0
"""What sparse experts are worth at equal active parameters: the quickstart's two lessons with dense MLPs, and with four experts of the same
width of which one serves a token, on the same data for the same number of steps.

    python -m benchmarks.small_world_experts OUT --output benchmarks/results/small-world-experts.json

The record has the marks of both, their held-out losses, the processor time of each run, and the share of tokens that each expert got in the
last logged steps of a lesson, by layer. A second call goes on where the first one stopped; its processor time is only its own.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from megatron_bagel import platform  # noqa: E402

platform.install()

from benchmarks.record import report  # noqa: E402
from megatron_bagel.checkpoint.hf.folder import HFFolder  # noqa: E402
from megatron_bagel.planning.models import active_parameters, parameters  # noqa: E402
from megatron_bagel.sample_world.exam import marks, read_lines  # noqa: E402
from megatron_bagel.sample_world.quickstart.folders import QuickstartFolders  # noqa: E402
from megatron_bagel.sample_world.quickstart.stages import Quickstart, QuickstartSettings  # noqa: E402

#: An expert has the dense MLP's width, so a token meets as many parameters, and the router's few.
EXPERTS = ("--num_experts", "4", "--moe_router_topk", "1", "--moe_router_pre_softmax", "True", "--moe_aux_loss_coeff", "0.01")
#: Steps whose loads are averaged.
LAST = 5


def learn(folders: QuickstartFolders, settings: QuickstartSettings) -> dict[str, Any]:
    """Run the stages that are not done yet, and return what the model reached."""
    began = _child_seconds()
    Quickstart(folders, settings, say=lambda line: print(f"{folders.out.name}: {line}", file=sys.stderr, flush=True)).run()
    results = {"marks": marks_of(folders), "held_out": held_out(folders.results), "cpu_s": _child_seconds() - began}
    return results | {"parameters": parameters_of(folders)}


def marks_of(folders: QuickstartFolders) -> dict[str, dict[str, float]]:
    """The share of right answers by kind of question, on pairs of colour and shape that training showed and on those it did not."""
    table: dict[str, dict[str, float]] = {}
    for (name, pairs), rights in marks(folders.exam, folders.generated).items():
        table.setdefault(name, {})[pairs] = float(np.mean(rights))
    return table


def held_out(results: Path) -> dict[str, float]:
    """The held-out losses after the last step, of the weights and of their average."""
    last = read_lines(results / "validation.jsonl")[-1]
    return {name: last[name] for name in ("model/mse", "ema/mse")}


def parameters_of(folders: QuickstartFolders) -> dict[str, int]:
    """The numbers of the exported model, and of the matrices that serve a token of each kind."""
    arch = HFFolder(folders.model).arch
    return {"all": parameters(arch), **{f"active_{kind}": active_parameters(arch, kind) for kind in ("und", "gen")}}


def load_shares(results: Path, kind: str) -> dict[str, list[float]]:
    """The share of a kind's tokens that each expert got in the last logged steps, by layer."""
    records = read_lines(results / "expert_load.jsonl")[-LAST:]
    load = np.sum([record[kind]["load"] for record in records], axis=0, dtype=np.float64)
    shares = load / load.sum(1, keepdims=True)
    return {f"layer {layer}": row.round(4).tolist() for layer, row in zip(records[-1][kind]["layers"], shares, strict=True)}


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _share_data(source: QuickstartFolders, target: QuickstartFolders) -> None:
    """Let the second run read the data of the first."""
    target.out.mkdir(parents=True, exist_ok=True)
    for ours, theirs in ((source.data, target.data), (source.index, target.index), (source.latents, target.latents)):
        if not theirs.exists():
            theirs.symlink_to(ours.resolve(), target_is_directory=True)


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The marks of all runs as Markdown, in percent of seen and held-out pairs."""
    names: Iterable[str] = dict.fromkeys(name for run in runs.values() for name in run["marks"])
    lines = ["| % of seen / held-out pairs | " + " | ".join(runs) + " |", "| --- |" + " --- |" * len(runs)]
    for name in names:
        cells = [" / ".join(f"{100 * run['marks'][name][pairs]:.0f}" for pairs in ("seen", "held out")) for run in runs.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and examine both, print one JSON object, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of both runs")
    parser.add_argument("--question-steps", type=int, help="of the first lesson (default: its settings')")
    parser.add_argument("--picture-steps", type=int, default=400, help="of the second lesson (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="that train (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="copy the drawing of the second lesson's loads here")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    steps = str(arguments.picture_steps)
    flags = ("--total_steps", steps, "--save_every", steps, "--eval_every", steps, "--eval_pictures", "0")
    runs: dict[str, Any] = {}
    folders = {name: QuickstartFolders((arguments.out / name).absolute()) for name in ("dense", "experts")}
    for name, model_flags in (("dense", ()), ("experts", EXPERTS)):
        if name == "experts":
            _share_data(folders["dense"], folders["experts"])
        settings = QuickstartSettings(arguments.seed, arguments.processes, arguments.question_steps, flags, model_flags)
        runs[name] = learn(folders[name], settings)
    sparse = folders["experts"]
    loads = {"understanding": load_shares(sparse.questions / "results", "understanding")}
    loads["generation"] = load_shares(sparse.results, "generation")
    if arguments.picture is not None:
        shutil.copyfile(sparse.results / "expert_load.png", arguments.picture)
    print(table(runs), file=sys.stderr)
    lessons = {"questions": sparse.questions / "results", "pictures": sparse.results}
    steps_of_lessons = {name: read_lines(folder / "metrics.jsonl")[-1]["step"] + 1 for name, folder in lessons.items()}
    result = {"steps": steps_of_lessons, "seed": arguments.seed, "flags_of_experts": list(EXPERTS), "runs": runs, "expert_shares": loads}
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
