# SPDX-License-Identifier: Apache-2.0
"""Models on a hub: which files a command needs, and where they are on this machine once they are downloaded.

huggingface_hub downloads into its cache, or finds the files there. Its environment variables count: ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``,
``HF_HOME`` and ``HF_TOKEN``. The hub says which files a model has, so only needed ones are taken, and nothing in them is executed.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_bagel.checkpoint.hf.hub_errors import readable_hub_errors, unreachable
from megatron_bagel.common.folder_files import SMALL_FILES
from megatron_bagel.common.hub_names import HubName
from megatron_bagel.common.notices import notice
from megatron_bagel.common.safetensors_header import AUTOENCODER_FILE, index_files
from megatron_bagel.common.wording import listed, shorten
from megatron_bagel.config.architecture.weight_files import points_at_averages

_INDEX = ".safetensors.index.json"
#: What an adapter in PEFT's format consists of: small files, and the name of its weights without the ending.
ADAPTER_FILES = ("adapter_config.json", "base.json")
ADAPTER_WEIGHTS = ("adapter_model",)


@dataclass(frozen=True)
class HubRequest:
    """The files of a model on the hub that a setting needs.

    Attributes:
        flag: The setting that names the model, for messages.
        name: The model.
        files: Names of small files, which a model may lack.
        weights: Kinds of weights ("ema", "model", "adapter_model") of which the model must have at least one.
        first_only: Whether the first kind that the model has suffices. Otherwise all of ``weights`` that it has are taken.
        weights_name: The weight file, if it has another name.
        autoencoder: Whether ``ae.safetensors`` must be there ("needed"), is taken if it is there ("wanted"), or is not taken ("no").
    """

    flag: str
    name: HubName
    files: tuple[str, ...] = SMALL_FILES
    weights: tuple[str, ...] = ()
    first_only: bool = False
    weights_name: str | None = None
    autoencoder: Literal["needed", "wanted", "no"] = "no"


def commit_of(request: HubRequest) -> str:
    """Return the commit that the name means now. Without a connection it is the one in the cache, if there is one.

    Raises:
        ValueError: There is no such model or revision, its terms are not accepted, or neither hub nor cache can answer.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    name = request.name
    with readable_hub_errors(request.flag, name):
        if not constants.HF_HUB_OFFLINE:
            try:
                return str(hub.HfApi().model_info(name.repository, revision=name.revision).sha)
            except unreachable() as error:
                reason = error
            cached_commit = _cached_folder(name)
            if cached_commit is None:
                raise reason
            notice(f"{request.flag} {name}: the hub cannot be reached, so the files in the cache are used (commit {cached_commit.name})")
            return cached_commit.name
        return Path(hub.snapshot_download(name.repository, revision=name.revision, local_files_only=True, allow_patterns=[])).name


def download(request: HubRequest, commit: str) -> Path:
    """Return the folder with the needed files of ``commit``, after downloading those that this machine lacks.

    Raises:
        ValueError: The model lacks needed files, or they can neither be downloaded nor found in the cache.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    name = HubName(request.name.repository, commit)
    with readable_hub_errors(request.flag, request.name):
        sizes = None
        if not constants.HF_HUB_OFFLINE:
            try:
                info = hub.HfApi().model_info(name.repository, revision=commit, files_metadata=True)
                sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
            except unreachable():
                sizes = None
        if sizes is None:
            return _complete_in_cache(request, commit)
        folder = _download_small_files(request, commit, sizes)
        large_files = _large_files(request, sizes, folder)
        if large_files:
            _tell(request, [file for file in large_files if not (folder / file).exists()], sizes)
            hub.snapshot_download(name.repository, revision=commit, allow_patterns=[glob.escape(file) for file in large_files])
    return folder


def _download_small_files(request: HubRequest, commit: str, sizes: Collection[str]) -> Path:
    """Download JSON files, and make the cache remember what a branch means, for starts without a connection."""
    import huggingface_hub as hub

    files = [file for file in sizes if file in request.files or file.endswith(_INDEX)]
    patterns = [glob.escape(file) for file in files] or ["config.json"]
    repository, revision = request.name.repository, request.name.revision
    folder = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    if folder.name != commit:  # the branch has moved since
        folder = Path(hub.snapshot_download(repository, revision=commit, allow_patterns=patterns))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _large_files(request: HubRequest, names: Collection[str], folder: Path) -> list[str]:
    """Return the files of weights and autoencoder. Raises ValueError if ``names``, the files of the model, lack them."""
    files: list[str] = []
    if request.autoencoder == "needed" and AUTOENCODER_FILE not in names:
        raise ValueError(f"{request.flag}: {request.name} has no {AUTOENCODER_FILE}; it has {_weight_names(names)}")
    if request.autoencoder != "no" and AUTOENCODER_FILE in names:
        files.append(AUTOENCODER_FILE)
    if not request.weights:
        return files
    heads = [head for kind in request.weights if (head := _head_of(request, kind, names, folder)) is not None]
    if not heads:
        raise ValueError(
            f"{request.flag}: {request.name} has no {request.weights_name or listed(request.weights) + ' weights'} in safetensors; it has "
            f"{_weight_names(names)}. A file of another name is chosen with --weights_name"
        )
    for head in heads[:1] if request.first_only or request.weights_name else heads:
        parts = sorted(index_files(folder / head)) if head.endswith(_INDEX) else [head]
        missing_parts = [part for part in parts if part not in names]
        if missing_parts:
            raise ValueError(f"{request.flag}: {head} of {request.name} names files that the model does not have: {shorten(missing_parts)}")
        files += parts
    return files


def _head_of(request: HubRequest, kind: str, names: Collection[str], folder: Path) -> str | None:
    """Return the weight file of a kind, or the index of its parts, by the rules that reading a folder follows."""
    if request.weights_name is not None:
        return request.weights_name if request.weights_name in names else None
    candidates = (f"{kind}{_INDEX}", f"{kind}.safetensors")
    return next((file for file in candidates if file in names and not points_at_averages(folder / file)), None)


def _weight_names(names: Iterable[str]) -> str:
    return shorten(sorted(name for name in names if name.endswith((".safetensors", _INDEX, ".bin", ".pt", ".pth", ".gguf"))))


def _tell(request: HubRequest, files: Collection[str], sizes: dict[str, int]) -> None:
    from huggingface_hub import constants

    if files:
        amount = sum(sizes[file] for file in files) / 1e9
        notice(f"{request.flag} {request.name}: downloading {shorten(sorted(files))} ({amount:.2f} GB) to {constants.HF_HUB_CACHE}")


def _cached_folder(name: HubName) -> Path | None:
    import huggingface_hub as hub

    try:
        return Path(hub.snapshot_download(name.repository, revision=name.revision, local_files_only=True, allow_patterns=[]))
    except OSError:  # LocalEntryNotFoundError
        return None


def _complete_in_cache(request: HubRequest, commit: str) -> Path:
    """Return the folder in the cache if it has what is needed. Raises ValueError if it is incomplete."""
    folder = _cached_folder(HubName(request.name.repository, commit))
    if folder is None:
        raise ValueError(f"{request.flag}: the cache has no commit {commit} of {request.name}, and the hub is not asked or not reached")
    names = [file.name for file in folder.iterdir() if file.exists()]
    try:
        _large_files(request, names, folder)
    except ValueError as error:
        raise ValueError(f"{error}. This is what the cache holds ({folder}); start once with a connection to the hub") from error
    return folder
