# SPDX-License-Identifier: Apache-2.0
"""Whether a run goes on as the run that its checkpoint was saved by: settings, data and tokenizer, compared at every resume.

What must match refuses the start. What may change is said in the log. The class of a setting stands in its flag (``config/flag.py``).
Checkpoints of earlier versions have only the flags, which are compared as far as they tell what was in effect.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_bagel.common.json_files import as_stored
from megatron_bagel.config.flag import FREE, MUST_MATCH, Flag
from megatron_bagel.config.resolve import ResolvedSizes
from megatron_bagel.config.sections import SETTINGS
from megatron_bagel.data.loading.fingerprint import LATER_DEFAULTS

#: Key in the state that a run continues with.
FINGERPRINT = "fingerprint"


@dataclass(frozen=True)
class Differences:
    """Sentences about what differs from the checkpoint: what refuses the start, and what the log says."""

    refused: list[str]
    said: list[str]


def run_fingerprint(record: Mapping[str, Any], sizes: ResolvedSizes, tokenizer: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies a run, as checkpoints keep it.

    Args:
        record: The configuration by sections.
        sizes: What follows from it on the ranks of the run.
        tokenizer: Fingerprint of the tokenizer.
        data: Fingerprint of the data, ``data/loading/fingerprint.py``.
    """
    in_effect = {
        "bf16": sizes.bf16,
        "global_batch_size": sizes.global_batch_size,
        "use_distributed_optimizer": sizes.use_distributed_optimizer,
        "attention_backend": sizes.attention_backend,
    }
    settings = {name: value for name, value in _flat(record).items() if Flag.of(SETTINGS[name]).on_resume != FREE}
    return as_stored({"settings": {**settings, **in_effect}, "tokenizer": tokenizer, "data": data})


def saved_fingerprint(run_state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint in a checkpoint's state, or what the flags in a checkpoint of an earlier version tell."""
    if FINGERPRINT in run_state:
        return run_state[FINGERPRINT]
    flags = _flat(run_state.get("config", {}))
    settings = {name: value for name, value in flags.items() if Flag.of(SETTINGS[name]).on_resume != FREE}
    if flags.get("sharding_strategy") == "NO_SHARD":
        settings["use_distributed_optimizer"] = False
    # A flag without a value, or "auto", does not say what was in effect.
    unknown = [name for name in ("bf16", "global_batch_size") if settings.get(name) is None]
    return {"settings": {name: value for name, value in settings.items() if name not in (*unknown, "attention_backend")}}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], restarted_groups: Collection[str] = ()) -> Differences:
    """Compare two fingerprints as far as both have a part. ``restarted_groups`` begin their order again, so it need not match."""
    result = Differences([], [])
    _compare_settings(saved.get("settings", {}), current["settings"], result)
    if "tokenizer" in saved and saved["tokenizer"] != current["tokenizer"]:
        result.refused.append("the tokenizer (--tokenizer_path) gives other ids than the checkpoint's")
    for name, group in current["data"].items():
        if name in saved.get("data", {}):
            _compare_group(name, saved["data"][name], group, name in restarted_groups, result)
    return result


def _compare_settings(saved: Mapping[str, Any], current: Mapping[str, Any], result: Differences) -> None:
    for name, value in current.items():
        if name in saved and saved[name] != value and name in SETTINGS:
            sentence = f"--{name} is {_word(value)}, and {_word(saved[name])} in the checkpoint"
            (result.refused if Flag.of(SETTINGS[name]).on_resume == MUST_MATCH else result.said).append(sentence)


def _compare_group(name: str, saved: Mapping[str, Any], current: Mapping[str, Any], restarted: bool, result: Differences) -> None:
    saved_rows, rows = ([dataset[:2] for dataset in group["datasets"]] for group in (saved, current))
    saved_total, total = (sum(number for _, number in datasets) for datasets in (saved_rows, rows))
    saved_names, names = ([key for key, _ in datasets] for datasets in (saved_rows, rows))
    # A group of another size is refused by the planner, which knows the samples.
    if not restarted and (saved_names != names or (saved_rows != rows and saved_total == total)):
        result.refused.append(
            f"dataset group {name!r} has the datasets {_counted(rows)}, and {_counted(saved_rows)} in the checkpoint: its position is "
            "one in another order (set resume_data_status: False for this group to restart its order)"
        )
    digests = {key: digest for key, _, digest in saved["datasets"]}
    result.said.extend(
        f"dataset {key} has another content than in the checkpoint"
        for key, _, digest in current["datasets"]
        if digests.get(key, digest) != digest
    )
    result.said.extend(
        f"dataset group {name!r}: {key} is {value}, and {saved_value} in the checkpoint"
        for key, saved_value, value in _changed_settings(saved["settings"], current["settings"])
    )


def _changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (key, value in the checkpoint, value now) of the settings of a group that differ, in words."""
    defaults = as_stored(LATER_DEFAULTS)
    for key in dict.fromkeys([*current, *(key for key in saved if key in defaults)]):
        if key == "weight_points" or not (key in saved or key in defaults):
            continue  # told with the weight; or a setting of which the checkpoint says nothing
        if key == "weight":
            before, now = _weight(saved), _weight(current)
        else:
            before, now = (_word(settings.get(key, defaults.get(key))) for settings in (saved, current))
        if before != now:
            yield key, before, now


def _weight(settings: Mapping[str, Any]) -> str:
    """Return the weight of a group, or its schedule, in words."""
    points = settings.get("weight_points")
    if not points:
        return f"{settings['weight']}"
    (_, first), *later = points
    return ", ".join([f"{first:g} at step 0", *(f"{weight:g} from step {step} on" for step, weight in later)])


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a configuration by their names; names of other versions are left out."""
    parts = [part for part in record.values() if isinstance(part, Mapping)]
    return {name: value for part in parts for name, value in part.items() if name in SETTINGS}


def _counted(datasets: list[list[Any]]) -> str:
    return ", ".join(f"{key.rpartition('/')[2]} ({rows})" for key, rows in datasets)


def _word(value: Any) -> str:
    return "not given" if value in (None, [], [None]) else f"{value}"
