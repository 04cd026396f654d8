# SPDX-License-Identifier: Apache-2.0
"""The models on a hub that flags name: which files each flag needs, and the flags with folders of this machine in their place."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bagel.checkpoint.hf.hub import ADAPTER_FILES, ADAPTER_WEIGHTS, HubRequest
from megatron_bagel.common.folder_files import AUTOENCODER_CONFIG_FILES
from megatron_bagel.common.hub_names import HubName, hub_name
from megatron_bagel.common.notices import notice
from megatron_bagel.common.safetensors_header import AUTOENCODER_FILE
from megatron_bagel.config.architecture.weight_files import WEIGHT_KINDS
from megatron_bagel.config.parser import Config
from megatron_bagel.config.paths import HUB_SETTINGS
from megatron_bagel.config.sections import SECTION_OF

if TYPE_CHECKING:
    from megatron_bagel.assembly.hub_models import HubFolder


def names_on_hub(config: Config) -> dict[str, HubName]:
    """Return the models on the hub that a run's given settings name, by setting. Settings that this run does not read are left out."""
    unread = {"llm_path", "vit_path", "vae_path"} if config.training.finetune_from_hf else {"model_path"}
    names = {setting: config.value_of(setting) for setting in HUB_SETTINGS if setting in config.given and setting not in unread}
    return {setting: name for setting, text in names.items() if text and (name := hub_name(text)) is not None}


def with_hub_folders(config: Config, weights: bool = True) -> Config:
    """Return the settings with folders in place of models on the hub, which are downloaded. Collective if ranks have met.

    Args:
        config: Settings of a run.
        weights: Whether weights are needed. A plan needs configs alone.

    Raises:
        ValueError: A model does not exist, lacks needed files, or cannot be downloaded.
    """
    names = names_on_hub(config)
    if not names:
        return config
    from megatron_bagel.assembly.hub_models import hub_folders

    requests = {setting: request for setting, request in _requests(config, names, weights) if setting in names}
    folders = dict(zip(requests, hub_folders(list(requests.values())), strict=True))
    sections: dict[str, dict[str, str]] = {}
    for setting, folder in folders.items():
        notice(f"--{setting} {names[setting]} is commit {folder.name.revision}, in {folder.path}")
        sections.setdefault(SECTION_OF[setting], {})[setting] = str(_path_of(setting, folder))
    changed = {section: replace(getattr(config, section), **values) for section, values in sections.items()}
    return replace(config, **changed, hub_names={setting: str(folder.name) for setting, folder in folders.items()})


def _requests(config: Config, names: Mapping[str, HubName], weights: bool) -> Iterator[tuple[str, HubRequest]]:
    """Yield the request of every setting that names a model on the hub."""
    training = config.training
    has_images = training.visual_gen and config.data.latent_cache is None
    from_parts = weights and training.resume_from is None and not config.model.init_random
    pretrained = ("model",) if from_parts else ()
    for setting, name in names.items():
        request = HubRequest(f"--{setting}", name)
        if setting in ("model_path", "vae_path"):
            files = AUTOENCODER_CONFIG_FILES if setting == "vae_path" else request.files
            yield setting, replace(request, files=files, autoencoder="needed" if weights and has_images else "no")
        elif setting in ("llm_path", "vit_path"):
            yield setting, replace(request, weights=pretrained if setting == "llm_path" or training.visual_und else ())
        elif setting == "resume_from":
            if not training.resume_model_only:
                raise ValueError(
                    f"--resume_from {name} is a model on the hub: it has weights, but no optimizer state, step or data position to "
                    "resume. Pass --resume_model_only True to start from its weights"
                )
            kinds = (("ema",) if training.finetune_from_ema else ("model", "ema")) if weights else ()
            yield setting, replace(request, weights=kinds, weights_name=training.weights_name)
        elif setting == "lora_base":
            yield setting, replace(request, weights=WEIGHT_KINDS if weights else (), weights_name=training.weights_name)
        else:
            yield setting, request


def with_local_folders(arguments: Namespace, requests: Mapping[str, HubRequest]) -> tuple[Namespace, dict[str, str]]:
    """Replace models on a hub by folders of this machine. This is for commands of one process.

    Args:
        arguments: Values of the command line.
        requests: What each argument that may name a model needs, by attribute. The names in the requests do not count.

    Returns:
        The arguments, and the models with their commits by attribute.

    Raises:
        ValueError: A model does not exist, lacks needed files, or cannot be downloaded.
    """
    texts = {attribute: str(value) for attribute in requests if (value := getattr(arguments, attribute)) is not None}
    names = {attribute: name for attribute, text in texts.items() if (name := hub_name(text)) is not None}
    if not names:
        return arguments, {}
    from megatron_bagel.assembly.hub_models import hub_folders

    folders = dict(zip(names, hub_folders([replace(requests[attribute], name=name) for attribute, name in names.items()]), strict=True))
    paths = {attribute: _path_of(attribute, folder) for attribute, folder in folders.items()}
    return Namespace(**{**vars(arguments), **paths}), {attribute: str(folder.name) for attribute, folder in folders.items()}


def needs(flag: str, **files: Any) -> HubRequest:
    """Return the request of a flag, for ``with_local_folders``; ``files`` are attributes of ``HubRequest``."""
    return HubRequest(flag, HubName(""), **files)


def needs_autoencoder(flag: str) -> HubRequest:
    """Return the request of a flag that names an autoencoder."""
    return needs(flag, files=AUTOENCODER_CONFIG_FILES, autoencoder="needed")


def needs_adapter(flag: str) -> HubRequest:
    """Return the request of a flag that names an adapter in PEFT's format."""
    return needs(flag, files=ADAPTER_FILES, weights=ADAPTER_WEIGHTS)


def _path_of(setting: str, folder: HubFolder) -> Path:
    """Return the path that a setting takes: the folder, or the file of the autoencoder."""
    return folder.path / AUTOENCODER_FILE if setting in ("vae_path", "vae", "autoencoder") else folder.path
