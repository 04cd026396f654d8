# SPDX-License-Identifier: Apache-2.0
"""The dataset YAML of BAGEL's guide as typed objects; an unknown key is an error that names the nearest known one.

The original looks up a dataset's location in a Python file. Here the YAML contains it, in a section ``dataset_info`` of the same
shape (group → name → ``data_dir``, ``jsonl_path``, ``parquet_info_path``), or it follows from ``--data-root`` and the guide's folders.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_bagel.common.paths import expanded_path
from megatron_bagel.common.yaml_files import read_yaml
from megatron_bagel.data.sources.files import is_file, is_folder, join, list_files
from megatron_bagel.data.sources.hub_files import HUB_KEYS, check_hub_keys
from megatron_bagel.data.sources.mix_settings import Points, parse_dataset_weights, parse_max_epochs, parse_weight, product, shares
from megatron_bagel.data.sources.row_settings import parse_columns, parse_form, per_dataset
from megatron_bagel.data.sources.video import FrameSampler
from megatron_bagel.data.transforms import TransformArgs

T2I, EDIT, VLM, TEXT, INTERLEAVED = "t2i_pretrain", "unified_edit", "vlm_sft", "text", "interleaved"
GROUPS = (T2I, EDIT, VLM, TEXT, INTERLEAVED)
_GROUP_KEYS = (
    "dataset_names", "weight", "is_mandatory", "num_used_data", "image_transform_args", "vit_image_transform_args",
    "frame_sampler_args", "shuffle_lines", "shuffle_seed", "resume_data_status", "data_dir", "jsonl_path", "parquet_info_path",
    "format", "columns", "share_max_pixels", "dataset_weights", "max_epochs", "hub", "hub_files",
)  # fmt: skip
_LOCATION_KEYS = ("data_dir", "jsonl_path", "parquet_info_path")
# The original's Python table also carries these unused counts; they may stay when the table is copied.
_INFO_KEYS = (*_LOCATION_KEYS, *HUB_KEYS, "format", "columns", "num_files", "num_total_samples")


@dataclass(frozen=True)
class DatasetLocation:
    """Location of a dataset: the folder of parquet files or of images, and the files beside it (None: not needed or not given).

    Each is a local path or a URL, see files.py. ``hub`` names a dataset on the hub, whose files ``hub_files`` are read (hub_files.py).
    """

    data_dir: str | None = None
    jsonl_path: str | None = None
    parquet_info_path: str | None = None
    hub: str | None = None
    hub_files: str | None = None


@dataclass(frozen=True)
class DatasetEntry:
    """One dataset of a group. ``num_used_data`` counts files (parquet, tar) or lines (jsonl); None selects all.

    ``form`` names the form of its rows (``forms.FORMS``), and ``columns`` are (our name, name in the files) of its columns.
    """

    name: str
    num_used_data: int | None
    location: DatasetLocation
    form: str = ""
    columns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class GroupConfig:
    """One top-level entry of the YAML: datasets of one kind that share a weight and their image transforms.

    ``image_transform`` is for the VAE in the T2I, editing and interleaved groups and for the ViT in the VLM group;
    ``vit_image_transform`` is for the ViT in the editing and interleaved groups. ``share_max_pixels`` lets the ViT pictures of an
    interleaved sample share ``max_pixels``, as those of the VLM group do. ``shuffle_lines`` and ``shuffle_seed`` choose the lines that
    ``num_used_data`` selects.

    ``weight_points`` are (step, weight) of a weight that changes over steps; ``weight`` is then the largest. ``dataset_weights`` gives each
    dataset a stream of its own, and ``max_epochs`` limits the epochs of the streams.
    ``frame_sampler`` chooses the frames of videos in the index (VLM group). ``resume_data_status`` False restarts the group's data
    when a run resumes.
    """

    name: str
    datasets: tuple[DatasetEntry, ...]
    weight: float = 0.0
    is_mandatory: bool = False
    image_transform: TransformArgs | None = None
    vit_image_transform: TransformArgs | None = None
    frame_sampler: FrameSampler | None = None
    shuffle_lines: bool = False
    shuffle_seed: int = 0
    resume_data_status: bool = True
    share_max_pixels: bool = False
    weight_points: Points = ()
    dataset_weights: tuple[Points, ...] = ()
    max_epochs: tuple[int | None, ...] = ()
    part: str = ""

    @property
    def source_name(self) -> str:
        """Return the name of its stream of samples: that of the group, and of the dataset where each has a stream of its own."""
        return f"{self.name}/{self.part}" if self.part else self.name

    @property
    def points(self) -> Points:
        """Return its weight as points (step, weight)."""
        return self.weight_points or ((0, self.weight),)

    def parts(self) -> list[GroupConfig]:
        """Return the groups of one stream each: the group itself, or one per dataset where datasets have weights."""
        if not self.dataset_weights:
            return [self]
        limits = self.max_epochs or (None,) * len(self.datasets)
        parts = []
        for entry, share, limit in zip(self.datasets, shares(self.dataset_weights), limits, strict=True):
            points = product(self.points, share)
            weight = max(value for _, value in points)
            parts.append(
                replace(
                    self, datasets=(entry,), part=entry.name, weight=weight, weight_points=points, dataset_weights=(), max_epochs=(limit,)
                )
            )  # fmt: skip
        return parts

    @property
    def makes_images(self) -> bool:
        """Return whether its samples have pictures for the autoencoder: they draw some, or see some."""
        return self.name in (T2I, EDIT) or (self.name == INTERLEAVED and self.image_transform is not None)

    @property
    def has_separate_vit(self) -> bool:
        """Return whether its vision tower has a transform of its own."""
        return self.name in (EDIT, INTERLEAVED)


def load_groups(path: str | Path, data_root: str | Path | None = None) -> list[GroupConfig]:
    """Read the dataset YAML at ``path``; relative locations start at ``data_root``, or else at the YAML's folder.

    Raises ValueError naming file, group and key for anything unknown, missing or of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no dataset config at {path} (--dataset_config_file)")
    content = read_yaml(path, "--dataset_config_file")
    return parse_groups(content, str(path), str(path.parent), None if data_root is None else str(data_root))


def parse_groups(content: Any, label: str, base: str | Path, data_root: str | Path | None = None) -> list[GroupConfig]:
    """Parse the groups of a loaded YAML. ``label`` names it in errors; relative locations start at ``data_root`` or else ``base``."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{label}: expected groups ({', '.join(GROUPS)}) with their settings")
    content, base, data_root = dict(content), str(base), None if data_root is None else str(data_root)
    info = content.pop("dataset_info", None) or {}
    _refuse_unknown(content, GROUPS, f"{label}: dataset group")
    _refuse_unknown(info, GROUPS, f"{label}, dataset_info: dataset group")
    groups = [_parse_group(name, keys, info.get(name) or {}, f"{label}, group {name}", base, data_root) for name, keys in content.items()]
    if not groups:
        raise ValueError(f"{label}: no dataset group ({', '.join(GROUPS)})")
    if not any(group.weight > 0 or group.is_mandatory for group in groups):
        raise ValueError(f"{label}: every group has weight 0 and none is mandatory, so no sample would ever be drawn; set a weight")
    return groups


def _parse_group(name: str, keys: Any, info: Mapping[str, Any], label: str, base: str, data_root: str | None) -> GroupConfig:
    if not isinstance(keys, dict):
        raise ValueError(f"{label}: expected settings such as dataset_names, got {keys!r}")
    _refuse_unknown(keys, _GROUP_KEYS, f"{label}: key")
    names = keys.get("dataset_names")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n and "/" not in n for n in names):
        raise ValueError(f"{label}: dataset_names must be a list of names, got {names!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"{label}: dataset_names lists a name twice: {names}")
    _refuse_unknown(info, names, f"{label}, dataset_info: dataset")
    num_used = _num_used_data(keys.get("num_used_data"), names, label)
    locations = _dataset_locations(name, names, keys, info, label, base, data_root)
    forms, columns = _row_settings(name, names, keys, info, label)
    points = parse_weight(keys.get("weight", 0.0), f"{label}: weight")
    dataset_weights = parse_dataset_weights(keys.get("dataset_weights"), names, label)
    if keys.get("is_mandatory") and (dataset_weights or keys.get("max_epochs") is not None):
        raise ValueError(f"{label}: a mandatory group is in every pack, so it has neither dataset_weights nor max_epochs; remove a key")
    needs_vae, needs_vit = name in (T2I, EDIT, VLM), name == EDIT
    if "share_max_pixels" in keys and name != INTERLEAVED:
        raise ValueError(f"{label}: share_max_pixels belongs to the group {INTERLEAVED}; remove the key")
    return GroupConfig(
        name=name,
        datasets=tuple(DatasetEntry(*entry) for entry in zip(names, num_used, locations, forms, columns, strict=True)),
        weight=max(weight for _, weight in points),
        weight_points=points if len(points) > 1 else (),
        dataset_weights=dataset_weights,
        max_epochs=parse_max_epochs(keys.get("max_epochs"), names, bool(dataset_weights), label),
        is_mandatory=_boolean(keys.get("is_mandatory", False), f"{label}: is_mandatory"),
        image_transform=_transform(keys, "image_transform_args", needs_vae, label),
        vit_image_transform=_transform(keys, "vit_image_transform_args", needs_vit, label),
        frame_sampler=_frame_sampler(name, keys.get("frame_sampler_args"), f"{label}, frame_sampler_args"),
        shuffle_lines=_boolean(keys.get("shuffle_lines", False), f"{label}: shuffle_lines"),
        shuffle_seed=int(_number(keys.get("shuffle_seed", 0), f"{label}: shuffle_seed")),
        resume_data_status=_boolean(keys.get("resume_data_status", True), f"{label}: resume_data_status"),
        share_max_pixels=_boolean(keys.get("share_max_pixels", False), f"{label}: share_max_pixels"),
    )


def _row_settings(
    group: str, names: list[str], keys: Mapping[str, Any], info: Mapping[str, Any], label: str
) -> tuple[list[str], list[tuple[tuple[str, str], ...]]]:
    """Return the forms and the renamed columns of the datasets' rows."""
    forms = [parse_form(value, group == INTERLEAVED, label) for value in per_dataset("format", names, keys, info, label)]
    return forms, [parse_columns(value, label) for value in per_dataset("columns", names, keys, info, label)]


def _dataset_locations(
    group: str, names: list[str], keys: Mapping[str, Any], info: Mapping[str, Any], label: str, base: str, data_root: str | None
) -> list[DatasetLocation]:
    root = data_root if data_root is not None else base
    known_keys = (*_LOCATION_KEYS, *HUB_KEYS)
    parallel = {key: _parallel_list(keys[key], names, f"{label}: {key}") for key in known_keys if key in keys}
    locations = []
    for i, name in enumerate(names):
        dataset_info = info.get(name) or {}
        _refuse_unknown(dataset_info, _INFO_KEYS, f"{label}, dataset_info of {name}: key")
        settings = {key: value[i] for key, value in parallel.items()} | {
            key: dataset_info[key] for key in known_keys if dataset_info.get(key)
        }
        if wrong_keys := [key for key, value in settings.items() if not isinstance(value, str)]:
            raise ValueError(f"{label}: {wrong_keys[0]} of {name} must be a path or URL, got {settings[wrong_keys[0]]!r}")
        if hub := {key: settings.pop(key) for key in HUB_KEYS if key in settings}:
            check_hub_keys(hub, settings, group != TEXT, f"{label}: {name}")
            location = DatasetLocation(**hub)
        elif settings:
            location = DatasetLocation(
                **{key: join(root, expanded_path(value, f"{label}: {key} of {name}")) for key, value in settings.items()}
            )
        elif data_root is not None:
            location = guide_location(group, name, data_root)
        else:
            location = DatasetLocation()  # a finished index needs no location, and building one checks for it
        locations.append(location)
    return locations


def guide_location(group: str, name: str, root: str) -> DatasetLocation:
    """Return the location of dataset ``name`` of ``group`` below ``root``, by the folders of BAGEL's guide."""
    if group == T2I:
        own_folder = join(root, f"t2i/{name}")
        return DatasetLocation(data_dir=own_folder if is_folder(own_folder) else join(root, "t2i"))
    if group == EDIT:
        info = join(root, f"editing/parquet_info/{name}.json")
        return DatasetLocation(data_dir=join(root, f"editing/{name}"), parquet_info_path=info if is_file(info) else None)
    if group == INTERLEAVED and is_folder(own_folder := join(root, f"interleaved/{name}")):
        return DatasetLocation(data_dir=own_folder)
    folder = join(root, {VLM: "vlm", TEXT: "text", INTERLEAVED: "interleaved"}[group])
    jsonl = join(folder, f"{name}.jsonl")
    if not is_file(jsonl) and is_folder(folder):
        similar = [path for path in list_files(folder, ".jsonl") if path.rsplit("/", 1)[-1].startswith(name)]
        jsonl = similar[0] if len(similar) == 1 else jsonl
    images = join(folder, "images")
    has_images = group == VLM or (group == INTERLEAVED and is_folder(images))
    return DatasetLocation(data_dir=images if has_images else None, jsonl_path=jsonl)


def _refuse_unknown(mapping: Any, known_keys: Iterable[str], key_kind: str) -> None:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{key_kind}s expected as a mapping, got {mapping!r}")
    known_keys = list(known_keys)
    for key in mapping:
        if key not in known_keys:
            closest = difflib.get_close_matches(str(key), known_keys, n=1, cutoff=0.4)
            hint = f"did you mean {closest[0]!r}? " if closest else ""
            raise ValueError(f"{key_kind} {key!r} is unknown; {hint}Known: {', '.join(known_keys)}")


def _transform(keys: Mapping[str, Any], key: str, needed: bool, label: str) -> TransformArgs | None:
    args = keys.get(key)
    if args is None:
        if needed:
            raise ValueError(f"{label}: {key} is missing (image_stride, max_image_size, min_image_size)")
        return None
    _refuse_unknown(args, [f.name for f in fields(TransformArgs)], f"{label}, {key}: key")
    missing_names = [name for name in ("image_stride", "max_image_size", "min_image_size") if name not in args]
    if missing_names:
        raise ValueError(f"{label}, {key}: {', '.join(missing_names)} missing")
    values: dict[str, Any] = {}
    for name, value in args.items():
        if name in ("image_mean", "image_std"):
            if not isinstance(value, list) or not all(isinstance(x, int | float) for x in value):
                raise ValueError(f"{label}, {key}: {name} must be a list of 3 numbers, got {value!r}")
            values[name] = tuple(float(x) for x in value)
        elif not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{label}, {key}: {name} must be a whole number, got {value!r}")
        else:
            values[name] = value
    try:
        return TransformArgs(**values)
    except ValueError as error:
        raise ValueError(f"{label}, {key}: {error}") from error


def _frame_sampler(group: str, args: Any, label: str) -> FrameSampler | None:
    if args is None:
        return None
    if group != VLM:
        raise ValueError(f"{label}: only the group {VLM} has videos; remove the key")
    _refuse_unknown(args, [f.name for f in fields(FrameSampler)], f"{label}: key")
    for name, value in args.items():
        expected_type = str if name == "sample" else int
        if not isinstance(value, expected_type) or isinstance(value, bool):
            raise ValueError(f"{label}: {name} must be a {'word' if expected_type is str else 'whole number'}, got {value!r}")
    if "max_num_frames" not in args:
        raise ValueError(f"{label}: max_num_frames is missing")
    try:
        return FrameSampler(**args)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def _num_used_data(value: Any, names: list[str], label: str) -> list[int | None]:
    if value is None:
        return [None] * len(names)
    counts = _parallel_list(value, names, f"{label}: num_used_data")
    for count in counts:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{label}: num_used_data must be whole numbers of at least 1, got {value!r}")
    return list(counts)


def _parallel_list(value: Any, names: list[str], setting: str) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if len(values) != len(names):
        raise ValueError(f"{setting} needs one entry per dataset name ({len(names)}), got {value!r}")
    return values


def _number(value: Any, setting: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{setting} must be a number of at least 0, got {value!r}")
    return value


def _boolean(value: Any, setting: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{setting} must be true or false, got {value!r}")
    return value
