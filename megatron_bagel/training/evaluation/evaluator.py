# SPDX-License-Identifier: Apache-2.0
"""Evaluates a run (``--eval_every``): held-out losses of the weights and of their average, then pictures and answers to fixed prompts.

Numbers go to ``validation.jsonl`` and the loggers, together with the time that the evaluation took. Pictures go to ``samples/`` in
results_dir, one sheet per dataset group, with the texts beside them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_bagel import platform
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.data.loading.build import layout_spec, stored_posterior, training_sources
from megatron_bagel.data.loading.held_out import held_out_samples
from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.data.loading.settings import DataSettings
from megatron_bagel.data.planner.group_source import GroupSource
from megatron_bagel.data.tokenizer import Tokenizer
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_io import load_autoencoder
from megatron_bagel.inference.core.image import decode_latents
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.layout.pack import PackImage, item_grid, sample_tokens
from megatron_bagel.training.evaluation.forward import evaluating
from megatron_bagel.training.evaluation.held_out_losses import WEIGHTS, HeldOutLosses
from megatron_bagel.training.evaluation.probes import Probe, encoded, read_probes
from megatron_bagel.training.evaluation.sampler import ProbeAnswers
from megatron_bagel.training.observability.contact_sheet import SheetRow, as_pixels
from megatron_bagel.training.observability.logging_sinks import RunLog
from megatron_bagel.training.step import StepSettings, Trainable


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Attributes:
        samples: The number of held-out samples of every dataset for the losses.
        pictures: The number of held-out samples of every dataset for pictures and answers.
        answer_tokens: The largest number of tokens in an answer.
        sampling: How pictures are sampled.
        autoencoder: The file of the autoencoder's weights, which a run with a latent cache reads only for pictures.
    """

    samples: int
    pictures: int
    answer_tokens: int
    sampling: ImageSampling
    autoencoder: Path


@dataclass(frozen=True)
class ProbeResult:
    """The answer to a probe: a picture, uint8 [H, W, 3], or a text. ``number`` is the probe's index among all probes."""

    number: int
    picture: np.ndarray | None = None
    text: str | None = None


class Evaluation:
    """Evaluates a run on its held-out rows. It is built once and run at each evaluation."""

    def __init__(
        self, settings: EvaluationSettings, data: DataSettings, arch: BagelArch, tokenizer: Tokenizer, packs_per_pass: int
    ) -> None:
        """Choose the held-out samples and the probes.

        Args:
            settings: The settings of the evaluation.
            data: The settings of the run's data.
            arch: The model.
            tokenizer: The tokenizer of the run.
            packs_per_pass: The number of packs that are in memory at the same time.

        Raises:
            ValueError: There are no held-out rows.
        """
        self.tokenizer, self.arch, self.packs_per_pass, self.seed = tokenizer, arch, packs_per_pass, data.seed
        self.sources: list[GroupSource] = training_sources(data, arch, tokenizer, "validation")
        self.reader = PackReader(self.sources, layout_spec(arch, tokenizer), data.seed, stored_posterior(data, arch))
        limits = data.packs.max_num_tokens, data.packs.max_num_tokens_per_sample
        self.losses = HeldOutLosses(self.sources, self.reader, settings.samples, *limits)
        self.sampling, self.max_answer_tokens, self.autoencoder_file = settings.sampling, settings.answer_tokens, settings.autoencoder
        self.probes = self._choose(settings.pictures, min(limits), data.packs.max_num_tokens)

    def run(self, trainable: Trainable, settings: StepSettings, log: RunLog, step: int) -> dict[str, float]:
        """Evaluate after ``step`` optimizer steps, log the numbers, and return them by name on every rank. Collective over the world."""
        start_time = time.perf_counter()
        numbers: dict[str, float] = {}
        for weights in WEIGHTS:
            means = self.losses.measure(trainable, settings, weights == "ema", self.packs_per_pass)
            numbers |= {f"{weights}/{name}": value for name, value in means.items()}
        numbers["seconds_losses"] = time.perf_counter() - start_time
        if self.probes:
            start_time = time.perf_counter()
            results = self.answers(trainable, settings)
            numbers["seconds_samples"] = time.perf_counter() - start_time
            if dist.get_rank() == 0:
                self._show(log, step, results)
        log.log_validation(step, numbers)
        return numbers

    def answers(self, trainable: Trainable, settings: StepSettings) -> list[ProbeResult]:
        """Answer the probes with the averaged weights. Return all answers on rank 0 and some of them on other ranks. Collective."""
        group = parallel_state.get_data_parallel_group()
        replica, replicas = dist.get_rank(group), dist.get_world_size(group)
        numbers = list(range(replica, len(self.probes), replicas))
        with evaluating(trainable, averaged=True):
            answered = self._answer(trainable, settings, numbers + self._joined(numbers))
        results = [result for result in answered if result.number in numbers]
        if replicas == 1:
            return results
        gathered: list[list[ProbeResult]] | None = [[] for _ in range(replicas)] if replica == 0 else None
        dist.gather_object(results, gathered, dst=dist.get_global_rank(group, 0), group=group)
        return sorted((result for part in gathered or [results] for result in part), key=lambda result: result.number)

    def _choose(self, count: int, limit: int, capacity: int) -> list[Probe]:
        """Return ``count`` probes of every dataset. Their rows are not those of the losses, if the dataset has enough rows."""
        probes: list[Probe] = []
        for number, source in enumerate(self.sources):
            for indexes in held_out_samples(source, count, limit, purpose="probe").values() if count else ():
                candidates = [probe for index in indexes for probe in Probe.each(source.sample(int(index), 0), number, int(index))]
                probes += [probe for probe in candidates if self._fits(probe, capacity)]
        return probes

    def _fits(self, probe: Probe, capacity: int) -> bool:
        """Return whether the probe with its longest answer fits into a pack of ``capacity`` tokens."""
        if probe.draws:
            return True
        return sample_tokens(probe.answering(self.max_answer_tokens, 0), self.reader.spec) <= capacity

    def _joined(self, numbers: Sequence[int]) -> list[int]:
        """Return a probe of each kind that is not among ``numbers``, if replicas share experts: they pass together for every kind."""
        if parallel_state.get_expert_model_parallel_world_size() == 1:
            return []
        first: dict[bool, int] = {}
        for number, probe in enumerate(self.probes):
            first.setdefault(probe.draws, number)
        own_kinds = {self.probes[number].draws for number in numbers}
        return [number for draws, number in first.items() if draws not in own_kinds]

    def _answer(self, trainable: Trainable, settings: StepSettings, numbers: Sequence[int]) -> list[ProbeResult]:
        """Answer the probes with the given ``numbers``. Pictures are decoded on one rank of the replica."""
        probes = [self.probes[number] for number in numbers]
        number_of = {probe.name: number for number, probe in zip(numbers, probes, strict=True)}
        encoded_probes = []
        for members, loaded in read_probes(probes, self.reader, settings.seq_length):
            (features,) = trainable.image_encoder.encode([loaded])
            encoded_probes += encoded(members, loaded.pack, features)
        channels = self.arch.latent_token_dim if self.arch.autoencoder is not None else 1
        answers = ProbeAnswers(trainable, settings, self.reader.spec, self.tokenizer, channels, self.seed)
        picture_probes = [encoded_probe for encoded_probe in encoded_probes if encoded_probe.probe.draws]
        text_probes = [encoded_probe for encoded_probe in encoded_probes if not encoded_probe.probe.draws]
        latents = answers.pictures(picture_probes, self.sampling)
        texts = answers.texts(text_probes, self.max_answer_tokens)
        results = []
        for encoded_probe, ids in zip(text_probes, texts, strict=True):
            results.append(ProbeResult(number_of[encoded_probe.probe.name], text=self.tokenizer.decode(ids)))
        autoencoder = self._autoencoder(trainable) if picture_probes and _decodes() else None
        if autoencoder is not None:
            for encoded_probe, tokens in zip(picture_probes, latents, strict=True):
                grid = item_grid(encoded_probe.probe.target, self.reader.spec)
                picture = decode_latents(autoencoder, tokens, grid, self.arch.latent_patch_size)
                results.append(ProbeResult(number_of[encoded_probe.probe.name], picture=picture))
        return results

    def _autoencoder(self, trainable: Trainable) -> AutoEncoder | None:
        """Return the run's autoencoder. A run with a latent cache has none: it is read from its file, or None if there is no file."""
        if isinstance(trainable.image_encoder.autoencoder, AutoEncoder):
            return trainable.image_encoder.autoencoder
        if not self.autoencoder_file.is_file():
            return None
        return load_autoencoder(self.autoencoder_file, self.arch.autoencoder).to(platform.device())

    def _show(self, log: RunLog, step: int, results: Sequence[ProbeResult]) -> None:
        """Log the results: one contact sheet per dataset group, and the texts with their truth."""
        rows: dict[str, list[SheetRow]] = {}
        texts: list[dict[str, Any]] = []
        for result in results:
            probe = self.probes[result.number]
            prompt = probe.prompt(self.tokenizer.decode)
            if result.picture is not None:
                rows.setdefault(probe.group, []).append(SheetRow(prompt, self._pictures(probe, result.picture)))
            if result.text is not None:
                truth = self.tokenizer.decode([int(token) for token in probe.target.token_ids])
                texts.append({"probe": probe.name, "prompt": prompt, "answer": result.text, "truth": truth})
        log.log_samples(step, rows, texts)

    def _pictures(self, probe: Probe, sampled: np.ndarray) -> tuple[tuple[str, np.ndarray], ...]:
        """Return the pictures of a probe with their captions: its conditions, the sampled picture, and the picture in the data."""
        conditions = [item for item in probe.conditions if item.kind == "vae"]
        return (
            *(("given", self._pixels(probe, item.image, item.height, item.width)) for item in conditions),
            ("made", sampled),
            ("data", self._pixels(probe, probe.target.image, probe.target.height, probe.target.width)),
        )

    def _pixels(self, probe: Probe, image: int, height: int, width: int) -> np.ndarray:
        pack_image = PackImage("vae", 0, image, height, width, False, 0, 0)
        return as_pixels(self.sources[probe.source].picture(probe.index, pack_image))


def _decodes() -> bool:
    """Return whether this rank decodes pictures: the first rank of its model-parallel groups does, as rank 0 of the world is one."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
        and parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    )
