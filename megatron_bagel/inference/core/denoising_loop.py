# SPDX-License-Identifier: Apache-2.0
"""The Euler steps of pictures, from noise (t = 1) to data (t = 0), with tensors that stay where they are.

All steps with the same guidance are the same operations on the same memory. The pictures are overwritten in place, embeddings of all
times are made before the first step, and the number of the step is counted on the device. So a step takes nothing from the host and
tells it nothing, and a GPU can replay it as a graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_bagel.inference.core.capture import WARM_UP, launched_because
from megatron_bagel.inference.core.context import Context, GuidedContext
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.guidance import guide, time_grid
from megatron_bagel.inference.core.image_sampling import ImageSampling

#: Fewer steps with the same guidance are launched. A capture costs the host about as much as launching a step, and building the graph
#: some more, so with the warm-up before it few steps remain that could repay this. Not measured: it has not run on a GPU.
LEAST_STEPS = 8

# The scales of text and image guidance of a step.
_Scales = tuple[float, float]


class DenoisingLoop:
    """The steps of one picture per context.

    Graphs hold the memory of a pass. They live as long as this object, which is that of the pictures.

    Attributes:
        x_t: The pictures, [tokens of all pictures, channels]; a step overwrites them.
        velocity: The guided velocity of the last step, of the same shape; the next step overwrites it.
        times: The time of each step.
    """

    def __init__(
        self,
        engine: Engine,
        contexts: Sequence[GuidedContext],
        grids: Sequence[tuple[int, int]],
        noise: Sequence[Tensor],
        sampling: ImageSampling,
    ) -> None:
        """Prepare the steps; ``generate_latents`` describes the arguments."""
        self._decoder, self._guidance = engine.decoder, sampling.guidance
        self._sizes = [rows * columns for rows, columns in grids]
        # Norms are taken over the tokens of each of these groups.
        self._norm_sizes = [sum(self._sizes)] if sampling.couple_batch else self._sizes
        self._position_ids = torch.cat([engine.latent_position_ids(*grid) for grid in grids])
        self.x_t = torch.cat([start.to(engine.device, torch.float32) for start in noise])
        self.velocity = torch.zeros_like(self.x_t)
        times = time_grid(sampling.num_timesteps, sampling.timestep_shift, engine.device)
        self.times: list[float] = times[:-1].tolist()
        self._lengths = times[:-1] - times[1:]
        # One by one: a product of several rows would round otherwise.
        self._time_embeddings = torch.cat([self._decoder.embed_times(time) for time in times[:-1].split(1)])
        self._step = torch.zeros(1, dtype=torch.long, device=engine.device)
        self._scales = [self._guidance.scales_at(time) for time in self.times]
        self._done = 0
        self._passes = {scales: engine.velocity_pass(*self._views(contexts, scales)) for scales in set(self._scales)}
        self._captured = {scales for scales, steps in Counter(self._scales).items() if steps >= LEAST_STEPS}
        if not sampling.capture or launched_because(engine) is not None:
            self._captured = set()
        self._graphs: dict[_Scales, torch.cuda.CUDAGraph] = {}
        self._launched: Counter[_Scales] = Counter()
        if self._captured:
            # The graphs run one at a time and leave nothing in their memory that is read later, so they share it.
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def step(self) -> None:
        """Make the next step."""
        scales = self._scales[self._done]
        if scales in self._captured:
            self._replay(scales)
        else:
            self._pass(scales)
        self._done += 1

    def _views(self, contexts: Sequence[GuidedContext], scales: _Scales) -> tuple[list[Context], list[int]]:
        """Return the contexts that guidance by ``scales`` compares, those of a view together, and the size of the picture of each."""
        text, images = self._guidance.needs_of(scales)
        views = [[context.main for context in contexts]]
        if text:
            views.append([context.without_text for context in contexts])
        if images:
            views.append([context.without_images for context in contexts])
        return [context for view in views for context in view], self._sizes * len(views)

    def _pass(self, scales: _Scales) -> None:
        """Make the step that ``_step`` says; one pass of the decoder computes all views of all contexts."""
        text, images = self._guidance.needs_of(scales)
        times = self._time_embeddings.index_select(0, self._step)
        pictures = self._decoder.embed_latents(self.x_t, times, self._position_ids).split(self._sizes)
        velocities = self._passes[scales](list(pictures) * (1 + text + images)).chunk(1 + text + images)
        groups = zip(*(view.split(self._norm_sizes) for view in velocities), strict=True)
        guided = [guide(v[0], v[1] if text else None, v[2] if images else None, scales, self._guidance) for v in groups]
        torch.cat(guided, out=self.velocity)
        self.x_t -= self.velocity * self._lengths.index_select(0, self._step)
        self._step += 1

    def _replay(self, scales: _Scales) -> None:
        """Make the step as a graph. The first steps of their kind are launched on the stream of the capture, which warms it up."""
        graph = self._graphs.get(scales)
        if graph is None and self._launched[scales] < WARM_UP:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._pass(scales)
            torch.cuda.current_stream().wait_stream(self._stream)
            self._launched[scales] += 1
            return
        if graph is None:
            graph = self._graphs[scales] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                self._pass(scales)
        graph.replay()
