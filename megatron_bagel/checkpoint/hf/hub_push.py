# SPDX-License-Identifier: Apache-2.0
"""Uploads an exported model folder to a hub as one commit, after every weight file has been checked.

The licence is named by whoever uploads. It is written into the uploaded model card, and the folder stays as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.hub_errors import readable_hub_errors
from megatron_bagel.checkpoint.hf.model_card import with_licence
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader
from megatron_bagel.common.files import read_text
from megatron_bagel.common.folder_files import SMALL_FILES
from megatron_bagel.common.hub_names import HubName

CARD = "README.md"
_OTHER_FILES = ("vae_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Licence:
    """The licence of a model: an identifier of the hub such as ``apache-2.0``, or "other" with a name and a link."""

    identifier: str
    name: str | None = None
    link: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.identifier):
            raise ValueError(f"--license {self.identifier}: give an identifier of the hub, such as apache-2.0 or cc-by-nc-4.0, or other")
        if self.identifier == "other" and not (self.name and self.link):
            raise ValueError("--license other: say which with --license-name and --license-link")
        if self.identifier != "other" and (self.name or self.link):
            raise ValueError(f"--license-name and --license-link belong to --license other, and {self.identifier} needs neither")


def pushed_files(folder: Path) -> list[Path]:
    """Return the files of an exported folder that are uploaded: weights, configs, tokenizer and card.

    Raises:
        ValueError: It is no exported folder, its card is missing, or a weight file is damaged.
    """
    model = HFFolder(folder)
    kinds = model.available_weights()
    if not kinds:
        raise ValueError(f"{folder} has no weights to upload; export a checkpoint with megatron-bagel convert megatron-to-hf first")
    if not (folder / CARD).is_file():
        raise ValueError(f"{folder} has no {CARD}, the model card that an export writes; export the checkpoint again, or write one")
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        SafetensorsReader(file, "none").keys()
    for kind in kinds:
        model.weights(kind)  # an index must not name a missing file
    small = [folder / name for name in (CARD, *SMALL_FILES, *_OTHER_FILES)]
    return [file for file in (*small, *sorted(folder.glob("*.safetensors.index.json")), *weights) if file.is_file()]


def push(folder: Path, name: HubName, licence: Licence, message: str, private: bool = False) -> str:
    """Upload a folder as one commit and return its address.

    Args:
        folder: An exported model folder.
        name: The model on the hub, which is made if it does not exist. Its revision is the branch to write, ``main`` without one.
        licence: The licence that the card states.
        message: What the commit says.
        private: Whether a model that is made now is visible to its owner alone.

    Raises:
        ValueError: The folder is not complete, or the hub refuses the upload.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    files, branch = pushed_files(folder), name.revision or "main"
    card = with_licence(read_text(folder / CARD, "model card"), licence.identifier, licence.name, licence.link)
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
    if hub.get_token() is None:
        raise ValueError("an upload needs a token with write access: log in with hf auth login, or set HF_TOKEN")
    operations: list[Any] = [hub.CommitOperationAdd(CARD, card.encode())]
    operations += [hub.CommitOperationAdd(file.name, str(file)) for file in files if file.name != CARD]
    with readable_hub_errors("--to", name):
        api = hub.HfApi()
        api.create_repo(name.repository, private=private, exist_ok=True)
        if branch != "main":
            api.create_branch(name.repository, branch=branch, exist_ok=True)
        commit = api.create_commit(name.repository, operations, commit_message=message, revision=branch)
    return str(commit.commit_url)
