"""Pictures and texts from a model in training, wherever its layers and tokens lie: each step is one pass of the training path.

Nothing is cached. A picture's conditions are read anew in every step, and a text is read anew for every token, in exchange for which
generation needs no code of its own for any layout. All ranks of a replica come to the same answers.
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
from megatron_bagel.inference.core.image import ImageSampling
from megatron_bagel.layout.cp_partition import context_orders
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.order import TokenOrder
from megatron_bagel.layout.pack import LayoutSpec, Pack, build_pack, item_grid
from megatron_bagel.model.attention.context_parallel import CPContext
from megatron_bagel.model.batch import Features, MicroBatch, make_microbatch
from megatron_bagel.training.evaluation.forward import Collector, forward_only, microbatch_multiple
from megatron_bagel.training.evaluation.probes import EncodedProbe, condition_features, in_packs
from megatron_bagel.training.step import StepSettings, Trainable


@dataclass
class _Template:
    """A pack that is passed many times with other latents or tokens. ``members`` number the rows (views, answers) it holds."""

    members: list[int]
    pack: Pack
    order: TokenOrder
    features: Features
    batch: MicroBatch


@dataclass
class ProbeAnswers:
    """Answers the probes of one replica. ``channels`` are those of a latent token. Every method is collective over the replica."""

    trainable: Trainable
    settings: StepSettings
    spec: LayoutSpec
    tokenizer: Tokenizer
    channels: int
    seed: int

    def pictures(self, probes: Sequence[EncodedProbe], sampling: ImageSampling) -> list[Tensor]:
        """Latent tokens [tokens, channels] of each probe's picture, by Euler steps under guidance from noise keyed by its name."""
        if not probes:
            return []
        guidance = sampling.guidance
        count = 1 if guidance.text_scale <= 1 else 2 if guidance.img_scale <= 1 else 3
        rows = [view for each in probes for view in each.probe.views()[:count]]
        templates = self._prepare(rows, [each for each in probes for _ in range(count)])
        sizes = [_picture_tokens(row, self.spec) for row in rows[::count]]
        x = [self._noise(each, size) for each, size in zip(probes, sizes, strict=True)]
        times = time_grid(sampling.num_timesteps, sampling.timestep_shift, self.settings.device)
        for t, dt in zip(times[:-1].tolist(), (times[:-1] - times[1:]).tolist(), strict=True):
            velocities = self._velocities(templates, [x[row // count] for row in range(len(rows))], t)
            scales = guidance.scales_at(t)
            text, images = guidance.needs(t)
            for number in range(len(x)):
                v = velocities[number * count : (number + 1) * count]
                x[number] = x[number] - dt * guide(v[0], v[1] if text else None, v[2] if images else None, scales, guidance)
        return x

    def texts(self, probes: Sequence[EncodedProbe], most_tokens: int) -> list[list[int]]:
        """Token ids of each probe's answer, the likeliest token each time, at most ``most_tokens`` of them."""
        if not probes:
            return []
        fill = self.tokenizer.eos
        templates = self._prepare([each.probe.answering(most_tokens, fill) for each in probes], probes)
        ids: list[list[int]] = [[] for _ in probes]
        open_ = set(range(len(probes)))
        for step in range(most_tokens):
            for number, token in enumerate(self._next_tokens(templates, ids, step, len(probes))):
                if number in open_ and token == fill:
                    open_.remove(number)
                elif number in open_:
                    ids[number].append(token)
            if not open_:
                break
        return ids

    # ------------------------------------------------------------------ passes
    def _prepare(self, rows: Sequence[Sample], owners: Sequence[EncodedProbe]) -> list[_Template]:
        """Packs of the rows, laid out for this rank; filled up with repetitions to what the schedule takes."""
        group = parallel_state.get_context_parallel_group()
        device = self.settings.device
        templates = []
        for members in in_packs(rows, self.spec, self.settings.seq_length):
            pack = build_pack([rows[member] for member in members], self.spec)
            orders = context_orders(pack, group.size(), self.settings.slots(pack.sequence_length))
            place = CPContext(group.rank(), group, orders, self.settings.cp_comm_type)
            features = condition_features(pack, [owners[member] for member in members], self.channels, device)
            batch = make_microbatch(pack, orders[place.rank], features, self.settings.backend, device, place)
            templates.append(_Template(members, pack, orders[place.rank], features, replace(batch, predict=True)))
        return templates

    def _pass(self, templates: Sequence[_Template], batches: Sequence[MicroBatch], collect: Collector) -> list[Tensor]:
        missing = -len(batches) % microbatch_multiple(self.trainable)
        outputs = forward_only(self.trainable, [*batches, *([batches[-1]] * missing)], self.settings, collect)
        return outputs[: len(templates)]

    def _velocities(self, templates: Sequence[_Template], x: Sequence[Tensor], t: float) -> list[Tensor]:
        """Velocity [tokens, channels] of each row at time ``t``, float32, on every rank."""
        batches = []
        for each in templates:
            latents, times = each.features.latents.clone(), each.features.timesteps.clone()
            start = 0
            for image in each.pack.images_of("vae"):
                if image.noised:
                    latents[start : start + image.tokens] = x[each.members[image.sample]]
                    times[start : start + image.tokens] = t
                start += image.tokens
            here = torch.from_numpy(each.order.vae_rows).to(latents.device)
            # Latents and noise alike: between them lies x_t itself, whatever t is.
            moved = latents[here]
            batches.append(replace(each.batch, latents=moved, noise=moved, timesteps=times[here]))
        outputs = self._pass(templates, batches, lambda batch, logits, velocity: velocity)
        whole = torch.zeros(sum(len(each.pack.mse_positions) for each in templates), self.channels, device=self.settings.device)
        first = 0
        for each, velocity in zip(templates, outputs, strict=False):
            own = torch.from_numpy(np.flatnonzero(each.order.slots[each.pack.mse_positions] >= 0)).to(whole.device)
            whole[first + own] = velocity
            first += len(each.pack.mse_positions)
        _to_every_rank(whole)
        return list(whole.split([len(row) for each in templates for row in (x[member] for member in each.members)]))

    def _next_tokens(self, templates: Sequence[_Template], ids: Sequence[Sequence[int]], step: int, count: int) -> list[int]:
        """The likeliest token after ``step`` tokens of each row's answer, on every rank."""
        batches, wanted = [], {}
        for each in templates:
            tokens = each.pack.text_ids.copy()
            owner = each.pack.sample_numbers(each.pack.ce_positions)
            # The place in the text where token n + 1 is predicted is the one that holds token n.
            places = np.array([np.flatnonzero(owner == row)[step] for row in range(len(each.members))])
            slots = np.searchsorted(each.pack.text_positions, each.pack.ce_positions)
            for row, member in enumerate(each.members):
                answer = slots[owner == row][1 : 1 + step]
                tokens[answer] = (list(ids[member]) + [self.tokenizer.eos] * step)[:step]
            here = each.order.slots[each.pack.ce_positions] >= 0
            local = np.where(here[places], np.cumsum(here)[places] - 1, -1)
            put = torch.from_numpy(tokens[each.order.text_rows]).to(self.settings.device)
            batches.append(replace(each.batch, text_ids=put))
            wanted[id(batches[-1])] = local
        limit = len(self.tokenizer)

        def likeliest(batch: MicroBatch, logits: Tensor, velocity: Tensor) -> Tensor:
            local = torch.from_numpy(wanted[id(batch)]).to(logits.device)
            found = torch.zeros(len(local), dtype=torch.long, device=logits.device)
            rows = logits[local[local >= 0]]
            found[local >= 0] = gather_from_tensor_model_parallel_region(rows)[:, :limit].argmax(-1)
            return found

        outputs = self._pass(templates, batches, likeliest)
        whole = torch.zeros(count, dtype=torch.long, device=self.settings.device)
        for each, found in zip(templates, outputs, strict=False):
            whole[torch.tensor(each.members, device=whole.device)] = found
        _to_every_rank(whole)
        return whole.tolist()

    def _noise(self, each: EncodedProbe, tokens: int) -> Tensor:
        return keyed_normal((tokens, self.channels), self.seed, "probe", each.probe.name).to(self.settings.device)


def _picture_tokens(sample: Sample, spec: LayoutSpec) -> int:
    """Latent tokens of the picture that a view ends with."""
    rows, columns = item_grid(sample.items[-1], spec)
    return rows * columns


def _to_every_rank(values: Tensor) -> None:
    """Sum what the context-parallel ranks of the last stage found, and hand it to the other stages."""
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(values, group=parallel_state.get_context_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(values, src=last, group=parallel_state.get_pipeline_model_parallel_group())
