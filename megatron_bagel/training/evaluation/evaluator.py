"""What ``--eval_every`` does: held-out losses of the weights and of their average, then pictures and answers to fixed prompts.

Numbers go to ``validation.jsonl`` and the loggers, pictures to ``samples/`` in results_dir as one sheet per dataset group, texts
beside them. What it cost is written with it.
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
from megatron_bagel.inference.core.image import ImageSampling, decode_latents
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
    """What an evaluation measures and shows.

    Attributes:
        samples: held-out samples of every dataset that losses are measured on.
        pictures: held-out samples of every dataset that are drawn or answered.
        answer_tokens: most tokens of an answer.
        sampling: how pictures are drawn.
        autoencoder: the file of the autoencoder's weights, which a run with a latent cache reads for the pictures alone.
    """

    samples: int
    pictures: int
    answer_tokens: int
    sampling: ImageSampling
    autoencoder: Path


@dataclass(frozen=True)
class ProbeResult:
    """What came of a probe: a picture, uint8 [H, W, 3], or a text; ``number`` is its place among all probes."""

    number: int
    picture: np.ndarray | None = None
    text: str | None = None


class Evaluation:
    """Everything of a run that is validated on; made once, run at each evaluation."""

    def __init__(self, settings: EvaluationSettings, data: DataSettings, arch: BagelArch, tokenizer: Tokenizer, at_once: int) -> None:
        """``at_once`` packs are held in memory together. Raises ValueError without held-out rows."""
        self.tokenizer, self.arch, self.at_once, self.seed = tokenizer, arch, at_once, data.seed
        self.sources: list[GroupSource] = training_sources(data, arch, tokenizer, "validation")
        self.reader = PackReader(self.sources, layout_spec(arch, tokenizer), data.seed, stored_posterior(data, arch))
        limits = data.packs.max_num_tokens, data.packs.max_num_tokens_per_sample
        self.losses = HeldOutLosses(self.sources, self.reader, settings.samples, *limits)
        self.sampling, self.most_tokens, self.autoencoder_file = settings.sampling, settings.answer_tokens, settings.autoencoder
        self.probes = self._choose(settings.pictures, min(limits), data.packs.max_num_tokens)

    def run(self, trainable: Trainable, settings: StepSettings, log: RunLog, step: int) -> dict[str, float]:
        """Evaluate after ``step`` optimizer steps and log it; the numbers, by name, on every rank. Collective over the world."""
        began = time.perf_counter()
        numbers: dict[str, float] = {}
        for weights in WEIGHTS:
            means = self.losses.measure(trainable, settings, weights == "ema", self.at_once)
            numbers |= {f"{weights}/{name}": value for name, value in means.items()}
        numbers["seconds_losses"] = time.perf_counter() - began
        if self.probes:
            began = time.perf_counter()
            results = self.answers(trainable, settings)
            numbers["seconds_samples"] = time.perf_counter() - began
            if dist.get_rank() == 0:
                self._show(log, step, results)
        log.log_validation(step, numbers)
        return numbers

    def answers(self, trainable: Trainable, settings: StepSettings) -> list[ProbeResult]:
        """Every probe answered by the averaged weights, on rank 0; elsewhere those of its own data-parallel group. Collective."""
        group = parallel_state.get_data_parallel_group()
        replica, replicas = dist.get_rank(group), dist.get_world_size(group)
        with evaluating(trainable, averaged=True):
            mine = self._answer(trainable, settings, list(range(replica, len(self.probes), replicas)))
        if replicas == 1:
            return mine
        gathered: list[list[ProbeResult]] | None = [[] for _ in range(replicas)] if replica == 0 else None
        dist.gather_object(mine, gathered, dst=dist.get_global_rank(group, 0), group=group)
        return sorted((result for part in gathered or [mine] for result in part), key=lambda result: result.number)

    def _choose(self, count: int, limit: int, capacity: int) -> list[Probe]:
        """``count`` probes of every dataset, other rows than the losses are measured on where there are enough of them."""
        probes: list[Probe] = []
        for number, source in enumerate(self.sources):
            for indexes in held_out_samples(source, count, limit, purpose="probe").values() if count else ():
                found = [Probe.of(source.sample(int(index), 0), number, int(index)) for index in indexes]
                probes += [probe for probe in found if probe is not None and self._fits(probe, capacity)]
        return probes

    def _fits(self, probe: Probe, capacity: int) -> bool:
        if probe.draws:
            return True
        return sample_tokens(probe.answering(self.most_tokens, 0), self.reader.spec) <= capacity

    def _answer(self, trainable: Trainable, settings: StepSettings, numbers: Sequence[int]) -> list[ProbeResult]:
        chosen = [self.probes[number] for number in numbers]
        place = {probe.name: number for number, probe in zip(numbers, chosen, strict=True)}
        ready = []
        for probes, loaded in read_probes(chosen, self.reader, settings.seq_length):
            (features,) = trainable.image_encoder.encode([loaded])
            ready += encoded(probes, loaded.pack, features)
        channels = self.arch.latent_token_dim if self.arch.autoencoder is not None else 1
        answers = ProbeAnswers(trainable, settings, self.reader.spec, self.tokenizer, channels, self.seed)
        drawing, writing = ([each for each in ready if each.probe.draws == draws] for draws in (True, False))
        latents = answers.pictures(drawing, self.sampling)
        texts = answers.texts(writing, self.most_tokens)
        results = [ProbeResult(place[each.probe.name], text=self.tokenizer.decode(ids)) for each, ids in zip(writing, texts, strict=True)]
        autoencoder = self._autoencoder(trainable) if drawing and _decodes() else None
        if autoencoder is not None:
            for each, tokens in zip(drawing, latents, strict=True):
                grid = item_grid(each.probe.wanted, self.reader.spec)
                picture = decode_latents(autoencoder, tokens, grid, self.arch.latent_patch_size)
                results.append(ProbeResult(place[each.probe.name], picture=picture))
        return results

    def _autoencoder(self, trainable: Trainable) -> AutoEncoder | None:
        """The run's own. A run with a latent cache holds none: it is read for these pictures, or None where its weights are not there."""
        if isinstance(trainable.image_encoder.autoencoder, AutoEncoder):
            return trainable.image_encoder.autoencoder
        if not self.autoencoder_file.is_file():
            return None
        return load_autoencoder(self.autoencoder_file, self.arch.autoencoder).to(platform.device())

    # ------------------------------------------------------------------ showing
    def _show(self, log: RunLog, step: int, results: Sequence[ProbeResult]) -> None:
        rows: dict[str, list[SheetRow]] = {}
        texts: list[dict[str, Any]] = []
        for result in results:
            probe = self.probes[result.number]
            prompt = probe.prompt(self.tokenizer.decode)
            if result.picture is not None:
                rows.setdefault(probe.group, []).append(SheetRow(prompt, self._pictures(probe, result.picture)))
            if result.text is not None:
                truth = self.tokenizer.decode([int(token) for token in probe.wanted.token_ids])
                texts.append({"probe": probe.name, "prompt": prompt, "answer": result.text, "truth": truth})
        log.log_samples(step, rows, texts)

    def _pictures(self, probe: Probe, made: np.ndarray) -> tuple[tuple[str, np.ndarray], ...]:
        given = [item for item in probe.given if item.kind == "vae"]
        return (
            *(("given", self._pixels(probe, item.image, item.height, item.width)) for item in given),
            ("made", made),
            ("data", self._pixels(probe, probe.wanted.image, probe.wanted.height, probe.wanted.width)),
        )

    def _pixels(self, probe: Probe, image: int, height: int, width: int) -> np.ndarray:
        wanted = PackImage("vae", 0, image, height, width, False, 0, 0)
        return as_pixels(self.sources[probe.source].picture(probe.index, wanted))


def _decodes() -> bool:
    """Whether this rank is first in its model-parallel groups, as rank 0 of the world is: such ranks decode pictures."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
        and parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    )
