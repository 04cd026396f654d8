# SPDX-License-Identifier: Apache-2.0
"""Samples pictures and texts from a model in training. Each sampling step is one pass of the training path, with any parallel sizes.

There are no caches. The model reads a picture's conditions again in every step, and a text again for every token. In exchange,
sampling needs no code of its own for any parallelism. All ranks of a replica obtain the same answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_bagel.data.keyed_random import keyed_normal
from megatron_bagel.data.tokenizer import Tokenizer
from megatron_bagel.inference.core.guidance import guide, time_grid
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.layout.cp_partition import context_orders
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.order import TokenOrder
from megatron_bagel.layout.pack import LayoutSpec, Pack, build_pack, item_grid
from megatron_bagel.model.attention.context_parallel import CPContext
from megatron_bagel.model.batch import Features, MicroBatch, Times, make_microbatch
from megatron_bagel.training.evaluation.forward import Collector, forward_only, microbatch_multiple, most_of_replicas
from megatron_bagel.training.evaluation.probes import EncodedProbe, condition_features, in_packs
from megatron_bagel.training.step import StepSettings, Trainable


@dataclass
class _Template:
    """A pack that passes through the model many times with other latents or tokens. ``members`` are the indexes of its samples."""

    members: list[int]
    pack: Pack
    order: TokenOrder
    features: Features
    batch: MicroBatch


@dataclass
class ProbeAnswers:
    """Answers the probes of one replica. A latent token has ``channels`` numbers. Every public method is collective over the replica.

    Replicas that share experts call each method together, and pass equally often.
    """

    trainable: Trainable
    settings: StepSettings
    spec: LayoutSpec
    tokenizer: Tokenizer
    channels: int
    seed: int

    def pictures(self, probes: Sequence[EncodedProbe], sampling: ImageSampling) -> list[Tensor]:
        """Return the latent tokens [tokens, channels] of each probe's picture.

        They come from Euler steps under guidance, starting from noise that is keyed by the probe's name.
        """
        if not probes:
            return []
        guidance = sampling.guidance
        count = 1 if guidance.text_scale <= 1 else 2 if guidance.img_scale <= 1 else 3
        views = [view for probe in probes for view in probe.probe.views()[:count]]
        templates = self._prepare(views, [probe for probe in probes for _ in range(count)])
        sizes = [_picture_tokens(view, self.spec) for view in views[::count]]
        x = [self._noise(probe, size) for probe, size in zip(probes, sizes, strict=True)]
        times = time_grid(sampling.num_timesteps, sampling.timestep_shift, self.settings.device)
        for t, dt in zip(times[:-1].tolist(), (times[:-1] - times[1:]).tolist(), strict=True):
            velocities = self._velocities(templates, [x[view // count] for view in range(len(views))], t)
            scales = guidance.scales_at(t)
            text, images = guidance.needs(t)
            for number in range(len(x)):
                v = velocities[number * count : (number + 1) * count]
                x[number] = x[number] - dt * guide(v[0], v[1] if text else None, v[2] if images else None, scales, guidance)
        return x

    def texts(self, probes: Sequence[EncodedProbe], max_tokens: int) -> list[list[int]]:
        """Return the token ids of each probe's answer by greedy sampling, at most ``max_tokens`` of them."""
        if not probes:
            return []
        fill = self.tokenizer.eos
        templates = self._prepare([probe.probe.answering(max_tokens, fill) for probe in probes], probes)
        ids: list[list[int]] = [[] for _ in probes]
        unfinished = set(range(len(probes)))
        for step in range(max_tokens):
            for number, token in enumerate(self._next_tokens(templates, ids, step, len(probes))):
                if number in unfinished and token == fill:
                    unfinished.remove(number)
                elif number in unfinished:
                    ids[number].append(token)
            if not most_of_replicas(len(unfinished), self.settings.device):
                break
        return ids

    def _prepare(self, samples: Sequence[Sample], probes: Sequence[EncodedProbe]) -> list[_Template]:
        """Pack the samples, each with the features of its probe, and lay the packs out for this rank."""
        group = parallel_state.get_context_parallel_group()
        device = self.settings.device
        templates = []
        for members in in_packs(samples, self.spec, self.settings.seq_length):
            pack = build_pack([samples[member] for member in members], self.spec)
            orders = context_orders(pack, group.size(), self.settings.slots(pack.sequence_length))
            cp_context, order = CPContext(group.rank(), group, orders, self.settings.cp_comm_type), orders[group.rank()]
            features = condition_features(pack, [probes[member] for member in members], self.channels, device)
            batch = make_microbatch(pack, order, features, self.settings.backend, device, cp_context)
            templates.append(_Template(members, pack, order, features, replace(batch, predict=True)))
        return templates

    def _pass(self, templates: Sequence[_Template], batches: Sequence[MicroBatch], collect: Collector) -> list[Tensor]:
        """Pass a batch of each template, repeating the last one up to a number that schedule and replicas take; drop the repetitions."""
        passes = most_of_replicas(len(batches), self.settings.device)
        missing = passes + -passes % microbatch_multiple(self.trainable) - len(batches)
        outputs = forward_only(self.trainable, [*batches, *([batches[-1]] * missing)], self.settings, collect)
        return outputs[: len(templates)]

    def _velocities(self, templates: Sequence[_Template], x: Sequence[Tensor], t: float) -> list[Tensor]:
        """Return the velocity [tokens, channels] of each sample at time ``t``, float32, on every rank."""
        batches = []
        for template in templates:
            latents, times = template.features.latents.clone(), template.features.timesteps.clone()
            start = 0
            for image in template.pack.images_of("vae"):
                if image.noised:
                    latents[start : start + image.tokens] = x[template.members[image.sample]]
                    times[start : start + image.tokens] = t
                start += image.tokens
            local_rows = torch.from_numpy(template.order.vae_rows)
            # Latents and noise are equal, so every mixture of them is x_t itself, whatever t is.
            x_t = latents[local_rows.to(latents.device)]
            local_times = vars(Times.of(times[local_rows], latents.device))
            batches.append(replace(template.batch, latents=x_t, noise=x_t, **local_times))
        outputs = self._pass(templates, batches, lambda batch, logits, velocity: velocity)
        num_tokens = sum(len(template.pack.mse_positions) for template in templates)
        velocities = torch.zeros(num_tokens, self.channels, device=self.settings.device)
        start = 0
        for template, velocity in zip(templates, outputs, strict=False):
            local_tokens = np.flatnonzero(template.order.slots[template.pack.mse_positions] >= 0)
            velocities[start + torch.from_numpy(local_tokens).to(velocities.device)] = velocity
            start += len(template.pack.mse_positions)
        _to_every_rank(velocities)
        return list(velocities.split([len(x[member]) for template in templates for member in template.members]))

    def _next_tokens(self, templates: Sequence[_Template], ids: Sequence[Sequence[int]], step: int, count: int) -> list[int]:
        """Return the likeliest token after ``step`` tokens of each sample's answer, on every rank."""
        inputs = [self._answer_input(template, ids, step) for template in templates]
        batches = [batch for batch, _ in inputs]
        local_rows = {id(batch): rows for batch, rows in inputs}
        limit = len(self.tokenizer)

        def likeliest(batch: MicroBatch, logits: Tensor, velocity: Tensor) -> Tensor:
            rows = torch.from_numpy(local_rows[id(batch)]).to(logits.device)
            tokens = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
            tokens[rows >= 0] = gather_from_tensor_model_parallel_region(logits[rows[rows >= 0]])[:, :limit].argmax(-1)
            return tokens

        outputs = self._pass(templates, batches, likeliest)
        next_tokens = torch.zeros(count, dtype=torch.long, device=self.settings.device)
        for template, tokens in zip(templates, outputs, strict=False):
            next_tokens[torch.tensor(template.members, device=next_tokens.device)] = tokens
        _to_every_rank(next_tokens)
        return next_tokens.tolist()

    def _answer_input(self, template: _Template, ids: Sequence[Sequence[int]], step: int) -> tuple[MicroBatch, np.ndarray]:
        """Return a microbatch with ``step`` tokens of each answer, and the row of this rank's logits that predicts each next token.

        The row is -1 if another context-parallel rank has it.
        """
        pack, order = template.pack, template.order
        token_ids = pack.text_ids.copy()
        sample_of = pack.sample_numbers(pack.ce_positions)
        # Token n + 1 is predicted at the position of token n.
        predicting = np.array([np.flatnonzero(sample_of == sample)[step] for sample in range(len(template.members))])
        text_rows = np.searchsorted(pack.text_positions, pack.ce_positions)
        for sample, member in enumerate(template.members):
            answer_rows = text_rows[sample_of == sample][1 : 1 + step]
            token_ids[answer_rows] = (list(ids[member]) + [self.tokenizer.eos] * step)[:step]
        is_local = order.slots[pack.ce_positions] >= 0
        local_rows = np.where(is_local[predicting], np.cumsum(is_local)[predicting] - 1, -1)
        text_ids = torch.from_numpy(token_ids[order.text_rows]).to(self.settings.device)
        return replace(template.batch, text_ids=text_ids), local_rows

    def _noise(self, probe: EncodedProbe, tokens: int) -> Tensor:
        return keyed_normal((tokens, self.channels), self.seed, "probe", probe.probe.name).to(self.settings.device)


def _picture_tokens(sample: Sample, spec: LayoutSpec) -> int:
    """Return the number of latent tokens in the picture that a view ends with."""
    rows, columns = item_grid(sample.items[-1], spec)
    return rows * columns


def _to_every_rank(values: Tensor) -> None:
    """Sum ``values`` over the context-parallel ranks of the last stage, and send the sum to the other stages."""
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(values, group=parallel_state.get_context_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(values, src=last, group=parallel_state.get_pipeline_model_parallel_group())
