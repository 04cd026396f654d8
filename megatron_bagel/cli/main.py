# SPDX-License-Identifier: Apache-2.0
"""``megatron-bagel COMMAND [flags]``: finds a command by its words, and imports only that one."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from megatron_bagel import __version__
from megatron_bagel.cli.usage import short_name


@dataclass(frozen=True)
class Command:
    """A module below ``megatron_bagel.cli`` with a ``main(arguments, prog)``, and one line that says what it does."""

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "train": Command("train", "Train a model, alone or under torchrun."),
    "plan": Command("plan", "Predict memory and time of a run, or find parallel sizes that fit."),
    "generate": Command("generate", "Generate pictures and answers from a trained model."),
    "evaluate": Command("evaluate", "Answer the questions of a benchmark for its scorer."),
    "quickstart": Command("quickstart", "Make data, train a small model, examine it: everything once."),
    "data build": Command("data.build", "Build the index that training reads."),
    "data merge": Command("data.merge", "Merge the parts that several jobs built into one index."),
    "data verify": Command("data.verify", "Check every byte of an index."),
    "data inspect": Command("data.inspect", "Show an index, one of its samples, or a pack."),
    "data stats": Command("data.stats", "Count an index, and predict the share of every dataset in both losses."),
    "data sample": Command("data.sample", "Make a small training set from nothing."),
    "data latents": Command("data.latents", "Store the autoencoder's output for every image to generate."),
    "data tokenizer": Command("data.tokenizer", "Train a tokenizer on text files."),
    "convert hf-to-megatron": Command("convert.hf_to_megatron", "Convert a model folder to a training checkpoint."),
    "convert megatron-to-hf": Command("convert.megatron_to_hf", "Convert a training checkpoint to a model folder."),
    "convert adapter": Command("convert.adapter", "Export, import or merge an adapter (LoRA)."),
    "convert init": Command("convert.init_from_pretrained", "Make a first checkpoint from pretrained LLM, ViT and autoencoder."),
    "convert upcycle": Command("convert.upcycle", "Turn a dense model folder into one with sparse experts."),
    "convert push": Command("convert.push", "Upload a model folder to a hub, with its model card."),
    "convert inspect": Command("convert.inspect_checkpoint", "Show, compare or verify training checkpoints."),
}
GROUPS = {"data": "Commands for index, sample data, latents and tokenizer.", "convert": "Commands for checkpoints and model folders."}


def main(arguments: Sequence[str] | None = None, prog: str = "megatron-bagel") -> int:
    """Run the command that the first words name with the words after them.

    Args:
        arguments: Words of the command line, without the program's name. None takes those of this process.
        prog: Name of the program in help and errors.

    Returns:
        The command's exit status, or 2 for words that name no command.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(f"megatron-bagel {__version__}")
        return 0
    group = words.pop(0) if words and words[0] in GROUPS else ""
    name = f"{group} {words[0]}".strip() if words else group
    if name in COMMANDS:
        module = import_module(f"megatron_bagel.cli.{COMMANDS[name].module}")
        return int(module.main(words[1:], prog=f"{prog} {name}"))
    program = f"{prog} {group}".rstrip()
    if not words or words[0] in ("-h", "--help"):
        print(overview(program, group), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    print(f"{short_name(prog)}: {unknown(words[0], group)}; see {program} --help", file=sys.stderr)
    return 2


def overview(program: str, group: str) -> str:
    """Return the help text that lists all commands, or those of a group."""
    prefix = f"{group} ".lstrip()
    summaries = {name.removeprefix(prefix): command.summary for name, command in COMMANDS.items() if name.startswith(prefix)}
    width = max(map(len, summaries))
    title = GROUPS.get(group, "Training and generation with BAGEL-style multimodal models on Megatron-Core.")
    lines = [f"usage: {program} COMMAND [flags]", "", title, ""]
    lines += [f"  {name:<{width}}  {summary}" for name, summary in summaries.items()]
    lines += ["", f"{program} COMMAND --help lists the flags of a command."]
    return "\n".join(lines if group else [*lines, f"{program} --version prints the version."])


def unknown(word: str, group: str) -> str:
    """Return an error text for a word that names no command, with the commands whose names resemble it."""
    candidates = [name for name in COMMANDS if name.startswith(f"{group} ")] if group else [*COMMANDS, *GROUPS]
    # Outside its group, the last word of a command matches as well: "build" means "data build".
    spellings = {spelling for name in candidates for spelling in (name, name.split()[-1])}
    matches = set(difflib.get_close_matches(word, spellings, n=3, cutoff=0.6))
    suggestions = ", ".join(name for name in candidates if {name, name.split()[-1]} & matches)
    return f"there is no command '{f'{group} {word}'.strip()}'" + (f"; did you mean {suggestions}" if suggestions else "")
