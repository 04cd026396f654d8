"""The endless stream of candidates: groups drawn by weight, samples of a group in a fresh order every epoch, none twice in one.

Everything is addressed by counters (draw number; place in a group's order), so the stream's whole state is one integer per group
and one for the draws. Candidates travel as rows of an int64 array with the columns below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_bagel.data.keyed_random import keyed_uniform
from megatron_bagel.data.planner.cost_model import SampleSource
from megatron_bagel.data.planner.permutation import permuted

SOURCE, INDEX, EPOCH, TOKENS, FULL_TOKENS, COST = range(6)
COLUMNS = 6
_CHUNK_BITS = 16  # candidates of a group are measured in runs of up to 2^16: in a large index each run touches every shard
_DRAW_BITS = 12  # groups are drawn in runs of 2^12
_LISTED = 1000  # skipped samples kept by name; the rest are only counted
_HOPELESS = 64, 1_000_000  # at least and at most so many skipped in a row, in between once round the source, end the run


@dataclass
class Skips:
    """Samples left out while planning: how many of each source, and the first of them by (source name, index, epoch)."""

    counts: list[int]
    listed: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def add(self, name: str, rows: np.ndarray, reason: str) -> None:
        """Count ``rows`` (of one source) and list them with the reason while there is room."""
        self.counts[int(rows[0, SOURCE])] += len(rows)
        for row in rows[: _LISTED - len(self.listed)]:
            self.listed[name, int(row[INDEX]), int(row[EPOCH])] = f"{int(row[FULL_TOKENS])} tokens: {reason}"


class CandidateStream:
    """Weighted draws over sources. ``draws`` and ``places`` (one per source) are the state."""

    def __init__(self, sources: Sequence[SampleSource], seed: int, max_tokens_per_sample: int) -> None:
        """``max_tokens_per_sample`` is the length above which a sample is skipped.

        Raises ValueError when there is no sample at all, or no positive weight to draw by.
        """
        for source in sources:
            if len(source) == 0:
                raise ValueError(f"dataset group {source.name!r} has no sample: build its index, or take the group out of the config")
            if source.weight < 0:
                raise ValueError(f"dataset group {source.name!r} has weight {source.weight}; weights are 0 or more")
        total = sum(source.weight for source in sources)
        if total <= 0:
            raise ValueError(
                "there is nothing to draw samples from: "
                + (f"give one of the groups {[s.name for s in sources]} a weight above 0" if sources else "no dataset group is configured")
            )
        self.sources = list(sources)
        self.seed = seed
        self.limit = max_tokens_per_sample
        self._cumulative = np.cumsum([source.weight for source in sources]) / total
        self._chunks: dict[int, tuple[int, np.ndarray]] = {}
        self._draws_kept: tuple[int, np.ndarray] | None = None
        self.restart()

    def restart(self) -> None:
        """Back to the very first draw."""
        self.draws = 0
        self.places = [0] * len(self.sources)
        self.streaks = [0] * len(self.sources)  # skipped in a row
        self.skips = Skips([0] * len(self.sources))

    def draw(self, count: int) -> np.ndarray:
        """About ``count`` candidates of groups drawn by weight, [n, COLUMNS]; fewer when some are skipped, so n may be 0."""
        chosen = self._chosen(count)
        if (chosen == chosen[0]).all():
            rows = self._advance(int(chosen[0]), count)
            usable = self._usable(rows)
            return rows if usable.all() else rows[usable]
        rows = np.empty((count, COLUMNS), dtype=np.int64)
        for number in range(len(self.sources)):
            mine = chosen == number
            if hits := int(np.count_nonzero(mine)):
                rows[mine] = self._advance(number, hits)
        return rows[self._usable(rows)]

    def next_of(self, number: int) -> np.ndarray:
        """The next usable candidate of one source, [COLUMNS]."""
        while True:
            rows = self._advance(number, 1)
            if self._usable(rows)[0]:
                return rows[0]

    def measured(self, picks: np.ndarray) -> np.ndarray:
        """Full candidate rows for ``picks`` [n, 3] of (source, index, epoch), as kept in a saved state."""
        rows = np.zeros((len(picks), COLUMNS), dtype=np.int64)
        rows[:, :3] = picks
        keys = (rows[:, SOURCE] << 40) + rows[:, EPOCH]
        alone = len(keys) > 0 and bool((keys == keys[0]).all())  # as a run of one source mostly is
        for key in keys[:1].tolist() if alone else np.unique(keys).tolist():
            mine = slice(None) if alone else keys == key
            measures = self.sources[key >> 40].measure(rows[mine, INDEX], key & ((1 << 40) - 1))
            rows[mine, TOKENS], rows[mine, FULL_TOKENS], rows[mine, COST] = measures.tokens, measures.full_tokens, measures.cost
        return rows

    def _chosen(self, count: int) -> np.ndarray:
        """Source numbers of the next ``count`` draws."""
        begin, self.draws = self.draws, self.draws + count
        return _slices(self._drawn, begin, self.draws, _DRAW_BITS)

    def _advance(self, number: int, count: int) -> np.ndarray:
        """The next ``count`` rows of a source's order, usable or not."""
        bits = min(_CHUNK_BITS, len(self.sources[number]).bit_length())
        begin, self.places[number] = self.places[number], self.places[number] + count
        return _slices(lambda chunk: self._chunk(number, chunk, bits), begin, self.places[number], bits)

    def _drawn(self, chunk: int) -> np.ndarray:
        """Source numbers of draws [chunk << _DRAW_BITS, (chunk + 1) << _DRAW_BITS); the last run asked for is kept."""
        if self._draws_kept is None or self._draws_kept[0] != chunk:
            uniforms = keyed_uniform(self.seed, "group", np.arange(chunk << _DRAW_BITS, (chunk + 1) << _DRAW_BITS))
            chosen = np.searchsorted(self._cumulative, uniforms, side="right").clip(max=len(self.sources) - 1)
            self._draws_kept = chunk, chosen
        return self._draws_kept[1]

    def _chunk(self, number: int, chunk: int, bits: int) -> np.ndarray:
        """Measured candidates at places [chunk << bits, (chunk + 1) << bits) of a source; the last one asked for is kept."""
        kept = self._chunks.get(number)
        if kept is not None and kept[0] == chunk:
            return kept[1]
        source, size = self.sources[number], len(self.sources[number])
        places = np.arange(chunk << bits, (chunk + 1) << bits)
        picks = np.empty((len(places), 3), dtype=np.int64)
        picks[:, SOURCE], picks[:, EPOCH] = number, places // size
        for epoch in range(int(places[0]) // size, int(places[-1]) // size + 1):
            mine = picks[:, EPOCH] == epoch
            picks[mine, INDEX] = permuted(places[mine] % size, size, self.seed, "order", source.name, epoch)
        rows = self.measured(picks)
        self._chunks[number] = chunk, rows
        return rows

    def _usable(self, rows: np.ndarray) -> np.ndarray:
        """Which rows are short enough (and not empty), [n] bool; counts the others and gives up on a hopeless source."""
        usable = (rows[:, FULL_TOKENS] <= self.limit) & (rows[:, TOKENS] > 0)
        if usable.all():
            for number in set(rows[:, SOURCE].tolist()):
                self.streaks[number] = 0
            return usable
        for number in np.unique(rows[:, SOURCE]):
            mine = rows[:, SOURCE] == number
            bad = rows[mine & ~usable]
            if not len(bad):
                self.streaks[number] = 0
                continue
            source = self.sources[number]
            self.skips.add(source.name, bad, f"longer than {self.limit} tokens, or empty")
            good = np.flatnonzero(usable[mine])
            self.streaks[number] = int(mine.sum()) - 1 - int(good[-1]) if len(good) else self.streaks[number] + len(bad)
            if self.streaks[number] >= min(max(len(source), _HOPELESS[0]), _HOPELESS[1]):
                raise ValueError(
                    f"dataset group {source.name!r}: {self.streaks[number]} samples in a row are longer than {self.limit} tokens "
                    f"(or empty), the last being {source.describe(int(bad[-1, INDEX]))} with {int(bad[-1, FULL_TOKENS])} tokens; raise "
                    "--max_num_tokens_per_sample and --max_num_tokens, or shrink the images in the dataset configuration"
                )
        return usable


def _slices(run: Callable[[int], np.ndarray], begin: int, end: int, bits: int) -> np.ndarray:
    """Entries [begin, end) of an endless array that ``run(k)`` gives in pieces of 2^bits."""
    parts, place = [], begin
    while place < end:
        inside = place & ((1 << bits) - 1)
        parts.append(run(place >> bits)[inside : inside + end - place])
        place += len(parts[-1])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
