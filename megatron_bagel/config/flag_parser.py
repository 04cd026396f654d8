# SPDX-License-Identifier: Apache-2.0
"""The command line's parser, made from the dataclasses of flags.

transformers' HfArgumentParser makes the flags, as in the original: ``--x_y`` and ``--x-y``, unambiguous beginnings, and booleans as
``True`` / ``False`` or bare.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Sequence
from dataclasses import Field, field, fields, make_dataclass
from typing import Any, NoReturn, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from megatron_bagel.common import flag_names
from megatron_bagel.config.flag import Flag, default_of
from megatron_bagel.config.sections import ALIASES, SECTIONS, SETTINGS

#: Names that other trainers give to settings, in spellings that do not resemble this one's.
OTHER_NAMES = {
    "learning_rate": "lr", "peak_lr": "lr", "max_lr": "lr", "lr_scheduler_type": "lr_scheduler", "min_learning_rate": "min_lr",
    "max_steps": "total_steps", "num_steps": "total_steps", "num_train_steps": "total_steps", "max_iters": "total_steps",
    "warmup": "warmup_steps", "warmup_iters": "warmup_steps", "num_warmup_steps": "warmup_steps", "lr_warmup_steps": "warmup_steps",
    "batch_size": "global_batch_size", "train_batch_size": "global_batch_size", "output_dir": "results_dir", "log_dir": "results_dir",
    "save": "checkpoint_dir", "ckpt_dir": "checkpoint_dir", "load": "resume_from", "resume_from_checkpoint": "resume_from",
    "logging_steps": "log_every", "save_steps": "save_every", "eval_steps": "eval_every", "eval_interval": "eval_every",
    "gradient_clipping": "max_grad_norm", "grad_clip": "max_grad_norm", "adam_epsilon": "eps", "ema_decay": "ema",
    "dataloader_num_workers": "num_workers", "max_seq_length": "max_num_tokens", "max_length": "max_num_tokens",
    "tensor_parallel_size": "tensor_model_parallel_size", "tp": "tensor_model_parallel_size", "tp_size": "tensor_model_parallel_size",
    "pipeline_parallel_size": "pipeline_model_parallel_size", "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size", "cp_size": "context_parallel_size", "wandb_run_name": "wandb_name",
    "data_config": "dataset_config_file", "tokenizer": "tokenizer_path", "tokenizer_name_or_path": "tokenizer_path",
}  # fmt: skip


class FlagParser(HfArgumentParser):
    """A parser that raises ValueError where argparse prints its usage and exits. Its results hold only what was given."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with argparse's message."""
        raise ValueError(f"command line: {message}")

    def given_values(self, arguments: Sequence[str], source: str) -> dict[str, Any]:
        """Return the values of the settings that ``arguments`` gives, under the settings' own names.

        Args:
            arguments: Words of a command line.
            source: Where they come from, for error messages.

        Raises:
            ValueError: for an unknown flag (with near matches) and for a value of the wrong type.
        """
        words = _with_automatic_average(arguments)
        try:
            namespace, unknown_words = self.parse_known_args(words)
        except ValueError as error:
            raise ValueError(str(error).replace("command line", source, 1)) from None
        if unknown_words:
            raise ValueError(f"{source}: {unknown_flag(unknown_words[0], self._option_string_actions)}")
        if words != list(arguments) and not namespace.ema_warmup:
            raise ValueError(f"{source}: --ema auto warms up, and --ema_warmup False says not to; give a number to --ema or leave one out")
        return resolve_aliases(vars(namespace), source)


@functools.cache
def build_parser(command_flags: type | None = None, prog: str = "python -m megatron_bagel.train") -> FlagParser:
    """Return a parser with all flags of training, their aliases and ``--config``.

    No flag has a default in the parser: what is absent from its result was not given.

    Args:
        command_flags: Dataclass of the flags that a command has besides.
        prog: Name of the program in help and errors.
    """
    groups = [*SECTIONS.values(), *([command_flags] if command_flags is not None else [])]
    parser = FlagParser(
        [_with_help(group) for group in groups],
        prog=prog,
        description="Train a BAGEL model. Every flag is also a key of the YAML file given by --config; flags override the file.",
    )
    _add_aliases(parser)
    parser.add_argument("--config", help=f"YAML file with any of these settings, flat or under {':, '.join(SECTIONS)}:.")
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:  # HfArgumentParser wants a value after a flag of type bool | None
            action.nargs, action.const = "?", True
        if action.dest != "help":
            action.default = argparse.SUPPRESS
    return parser


def _with_automatic_average(arguments: Sequence[str]) -> list[str]:
    """Return the words with ``--ema auto`` spelled out: the default decay, which rises to its value with the steps done."""
    words, spelled_out = list(arguments), [f"--ema={default_of(SETTINGS['ema'])}", "--ema_warmup=True"]
    for position in reversed(range(len(words))):
        if words[position] == "--ema=auto":
            words[position : position + 1] = spelled_out
        elif words[position : position + 2] == ["--ema", "auto"]:
            words[position : position + 2] = spelled_out
    return words


def _with_help(group: type) -> type:
    """Return the same dataclass with metadata that argparse knows: the help text, with range and default."""
    hints = get_type_hints(group)
    settings: list[tuple[str, Any, Any]] = []
    for setting in fields(group):
        # HfArgumentParser takes other options from the metadata; a dataclass takes a list as default_factory only.
        has_list = isinstance(default_of(setting), list)
        default: dict[str, Any] = {"default_factory": setting.default_factory} if has_list else {"default": setting.default}
        settings.append((setting.name, hints[setting.name], field(**default, metadata={"help": help_text(setting)})))
    return make_dataclass(group.__name__, settings)


def help_text(setting: Field[Any]) -> str:
    """Return the text of ``--help`` for a setting: what the flag does, its range and its default."""
    rules, default = Flag.of(setting), default_of(setting)
    bounds = f" Must be {rules.range}." if rules.range else ""
    choices = f" Choose from {', '.join(rules.choices)}." if rules.choices else ""
    return f"{rules.help}{bounds}{choices} (default: {'none' if default in (None, []) else default})".replace("%", "%%")


def _add_aliases(parser: FlagParser) -> None:
    actions = {action.dest: action for action in parser._actions if not action.option_strings[0].startswith("--no_")}
    for alias, name in ALIASES.items():
        spellings = dict.fromkeys([f"--{alias}", f"--{alias.replace('_', '-')}"])
        action = actions[name]
        parser.add_argument(
            *spellings, dest=alias, type=action.type, choices=action.choices, help=f"Megatron's name of --{name}."
        )  # fmt: skip


#: Flags of Megatron-LM that have no counterpart, with the reason and what to take instead.
_ACTIVATION_OFFLOAD = (
    "Megatron-Core's offload of activations does not reach this decoder's layers (docs/fine_tuning.md). --recompute_granularity full "
    "saves the same memory"
)
WITHOUT_COUNTERPART = dict.fromkeys(
    ("cpu_offloading", "cpu_offloading_num_layers", "fine_grained_activation_offloading", "offload_modules"), _ACTIVATION_OFFLOAD
)


def unknown_flag(text: str, options: Iterable[str]) -> str:
    """Return a sentence that says that no flag of training takes ``text``, with the options that resemble it."""
    name = text.split("=", 1)[0].replace("-", "_").lstrip("_")
    if text.startswith("--") and name in WITHOUT_COUNTERPART:
        return f"there is no flag --{name}: {WITHOUT_COUNTERPART[name]}"
    return flag_names.unknown_flag(text, options, OTHER_NAMES)


def resolve_aliases(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Return ``values`` with aliases renamed to their settings. Raises ValueError where both are given with different values."""
    settings = {name: value for name, value in values.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        if alias not in values:
            continue
        if name in settings and settings[name] != values[alias]:
            raise ValueError(f"{source}: --{alias} {values[alias]} and --{name} {settings[name]} are one setting; give one of them")
        settings[name] = values[alias]
    return settings
