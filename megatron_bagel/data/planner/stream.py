# SPDX-License-Identifier: Apache-2.0
"""The endless stream of candidates: groups drawn by weight, and each group's samples in a new order every epoch, once per epoch.

Everything is addressed by counters (draw number, position in a group's order). The stream's entire state is therefore one integer per
group and one for the draws. Candidates are rows of an int64 array with the columns below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_bagel.data.keyed_random import keyed_uniform
from megatron_bagel.data.planner.cost_model import SampleSource
from megatron_bagel.data.planner.mix import SourceRule, weights_now
from megatron_bagel.data.planner.permutation import permuted

SOURCE, INDEX, EPOCH, TOKENS, FULL_TOKENS, COST = range(6)
COLUMNS = 6
_CHUNK_BITS = 16  # candidates of a group are measured in runs of up to 2^16; in a large index each run touches every shard
_DRAW_BITS = 12  # groups are drawn in runs of 2^12
_MAX_LISTED = 1000  # skipped samples recorded by name; later ones are only counted
_STREAK_LIMITS = 64, 1_000_000  # bounds of the skips in a row that end a run; between them it is the source's size


class NoSampleLeft(ValueError):
    """Every sample has been drawn as often as it may. Every rank plans the same, so all of them meet this at the same step."""


@dataclass
class Skips:
    """Samples skipped while planning: their number per source, and the reasons of the first ones by (source name, index, epoch)."""

    counts: list[int]
    reasons: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def add(self, name: str, rows: np.ndarray, reason: str) -> None:
        """Count ``rows`` (of one source) and record the reason of the first ones."""
        self.counts[int(rows[0, SOURCE])] += len(rows)
        for row in rows[: _MAX_LISTED - len(self.reasons)]:
            self.reasons[name, int(row[INDEX]), int(row[EPOCH])] = f"{int(row[FULL_TOKENS])} tokens: {reason}"


class CandidateStream:
    """Weighted draws over sources. ``draws`` and ``positions`` (one per source) are the state."""

    def __init__(
        self, sources: Sequence[SampleSource], seed: int, max_tokens_per_sample: int, rules: Mapping[str, SourceRule] | None = None
    ) -> None:
        """Start the stream at the first draw; samples of more than ``max_tokens_per_sample`` tokens are skipped.

        ``rules`` by source name replace constant weights.

        Raises ValueError if there is no sample at all, or no positive weight.
        """
        for source in sources:
            if len(source) == 0:
                raise ValueError(f"dataset group {source.name!r} has no sample; build its index, or remove the group from the config")
            if source.weight < 0:
                raise ValueError(f"dataset group {source.name!r} has weight {source.weight}; weights are 0 or more")
        self.rules = [(rules or {}).get(source.name, SourceRule(((0, source.weight),))) for source in sources]
        if sum(source.weight for source in sources) <= 0:
            raise ValueError(
                "there is nothing to draw samples from: "
                + (f"give one of the groups {[s.name for s in sources]} a weight above 0" if sources else "no dataset group is configured")
            )
        self.sources = list(sources)
        self.seed = seed
        self.limit = max_tokens_per_sample
        self._chunks: dict[int, tuple[int, np.ndarray]] = {}
        self._draw_cache: tuple[int, list[float], np.ndarray] | None = None
        self.step = 0.0
        self.restart()

    def restart(self) -> None:
        """Return to the very first draw."""
        self.draws = 0
        self.positions = [0] * len(self.sources)
        self.streaks = [0] * len(self.sources)  # samples skipped in a row
        self.skips = Skips([0] * len(self.sources))

    @property
    def weights(self) -> list[float]:
        """Return the weight of every source at ``step``, the step that the next candidates are planned for; 0 if it is used up."""
        return weights_now(self.rules, self.step, self.positions, [len(source) for source in self.sources])

    @property
    def is_used_up(self) -> bool:
        """Return whether no source has a weight at ``step`` and samples left."""
        return sum(self.weights) <= 0

    def draw(self, count: int) -> np.ndarray:
        """Return up to ``count`` candidates of groups drawn by weight, [n, COLUMNS]; skipped ones are left out, so n may be 0."""
        source_numbers = self._draw_sources(count)
        if (source_numbers == source_numbers[0]).all():
            rows = self._advance(int(source_numbers[0]), count)
            usable = self._usable(rows) & self._is_wanted(rows)
            return rows if usable.all() else rows[usable]
        rows = np.empty((count, COLUMNS), dtype=np.int64)
        for number in range(len(self.sources)):
            is_source = source_numbers == number
            if hits := int(np.count_nonzero(is_source)):
                rows[is_source] = self._advance(number, hits)
        return rows[self._usable(rows) & self._is_wanted(rows)]

    def next_of(self, number: int) -> np.ndarray:
        """Return the next usable candidate of one source, [COLUMNS]."""
        while True:
            rows = self._advance(number, 1)
            if self._usable(rows)[0]:
                return rows[0]

    def measure_picks(self, picks: np.ndarray) -> np.ndarray:
        """Return full candidate rows for ``picks`` [n, 3] of (source, index, epoch), the form of a saved state."""
        rows = np.zeros((len(picks), COLUMNS), dtype=np.int64)
        rows[:, :3] = picks
        keys = (rows[:, SOURCE] << 40) + rows[:, EPOCH]
        has_one_key = len(keys) > 0 and bool((keys == keys[0]).all())  # as in most runs of one source
        for key in keys[:1].tolist() if has_one_key else np.unique(keys).tolist():
            is_key = slice(None) if has_one_key else keys == key
            measures = self.sources[key >> 40].measure(rows[is_key, INDEX], key & ((1 << 40) - 1))
            rows[is_key, TOKENS], rows[is_key, FULL_TOKENS], rows[is_key, COST] = measures.tokens, measures.full_tokens, measures.cost
        return rows

    def _draw_sources(self, count: int) -> np.ndarray:
        """Return the source numbers of the next ``count`` draws."""
        begin, self.draws = self.draws, self.draws + count
        weights = self.weights
        if sum(weights) <= 0:  # is_used_up
            raise NoSampleLeft(
                f"no sample is left to draw at step {self.step:.0f}: every dataset has weight 0 or has reached its max_epochs; raise them, "
                "or end the run earlier (--train_iters)"
            )
        return _slices(lambda chunk: self._draw_chunk(chunk, weights), begin, self.draws, _DRAW_BITS)

    def _advance(self, number: int, count: int) -> np.ndarray:
        """Return the next ``count`` rows of a source's order, usable or not."""
        bits = min(_CHUNK_BITS, len(self.sources[number]).bit_length())
        begin, self.positions[number] = self.positions[number], self.positions[number] + count
        return _slices(lambda chunk: self._chunk(number, chunk, bits), begin, self.positions[number], bits)

    def _draw_chunk(self, chunk: int, weights: list[float]) -> np.ndarray:
        """Return the source numbers of draws [chunk << _DRAW_BITS, (chunk + 1) << _DRAW_BITS). The latest run is cached."""
        if self._draw_cache is None or self._draw_cache[:2] != (chunk, weights):
            uniforms = keyed_uniform(self.seed, "group", np.arange(chunk << _DRAW_BITS, (chunk + 1) << _DRAW_BITS))
            cumulative = np.cumsum(weights) / sum(weights)
            last = max(number for number, weight in enumerate(weights) if weight > 0)
            source_numbers = np.searchsorted(cumulative, uniforms, side="right").clip(max=last)
            self._draw_cache = chunk, weights, source_numbers
        return self._draw_cache[2]

    def _chunk(self, number: int, chunk: int, bits: int) -> np.ndarray:
        """Return measured candidates at positions [chunk << bits, (chunk + 1) << bits) of a source. The latest run is cached."""
        cached = self._chunks.get(number)
        if cached is not None and cached[0] == chunk:
            return cached[1]
        source, size = self.sources[number], len(self.sources[number])
        positions = np.arange(chunk << bits, (chunk + 1) << bits)
        picks = np.empty((len(positions), 3), dtype=np.int64)
        picks[:, SOURCE], picks[:, EPOCH] = number, positions // size
        for epoch in range(int(positions[0]) // size, int(positions[-1]) // size + 1):
            is_epoch = picks[:, EPOCH] == epoch
            picks[is_epoch, INDEX] = permuted(positions[is_epoch] % size, size, self.seed, "order", source.name, epoch)
        rows = self.measure_picks(picks)
        self._chunks[number] = chunk, rows
        return rows

    def _is_wanted(self, rows: np.ndarray) -> np.ndarray:
        """Return which rows are within the epochs of their source, [n] bool."""
        limits = np.array([np.iinfo(np.int64).max if rule.max_epochs is None else rule.max_epochs for rule in self.rules])
        is_wanted: np.ndarray = rows[:, EPOCH] < limits[rows[:, SOURCE]]
        return is_wanted

    def _usable(self, rows: np.ndarray) -> np.ndarray:
        """Return which rows are short enough (and not empty), [n] bool. Counts the others and raises ValueError if none comes."""
        usable = (rows[:, FULL_TOKENS] <= self.limit) & (rows[:, TOKENS] > 0)
        if usable.all():
            for number in set(rows[:, SOURCE].tolist()):
                self.streaks[number] = 0
            return usable
        for number in np.unique(rows[:, SOURCE]):
            is_source = rows[:, SOURCE] == number
            bad_rows = rows[is_source & ~usable]
            if not len(bad_rows):
                self.streaks[number] = 0
                continue
            source = self.sources[number]
            self.skips.add(source.name, bad_rows, f"longer than {self.limit} tokens, or empty")
            good_rows = np.flatnonzero(usable[is_source])
            self.streaks[number] = int(is_source.sum()) - 1 - int(good_rows[-1]) if len(good_rows) else self.streaks[number] + len(bad_rows)
            if self.streaks[number] >= min(max(len(source), _STREAK_LIMITS[0]), _STREAK_LIMITS[1]):
                raise ValueError(
                    f"dataset group {source.name!r}: {self.streaks[number]} samples in a row are longer than {self.limit} tokens "
                    f"(or empty), the last one {source.describe(int(bad_rows[-1, INDEX]))} with {int(bad_rows[-1, FULL_TOKENS])} tokens; "
                    "raise --max_num_tokens_per_sample and --max_num_tokens, or shrink the images in the dataset configuration"
                )
        return usable


def _slices(run: Callable[[int], np.ndarray], begin: int, end: int, bits: int) -> np.ndarray:
    """Return entries [begin, end) of an endless array that ``run(k)`` returns in pieces of 2^bits."""
    parts, position = [], begin
    while position < end:
        offset = position & ((1 << bits) - 1)
        parts.append(run(position >> bits)[offset : offset + end - position])
        position += len(parts[-1])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
