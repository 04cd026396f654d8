# SPDX-License-Identifier: Apache-2.0
"""Plans the next run of packs together: how many, from which candidates, in which order.

A block is as long as the data allow: up to 1024 packs, but short enough that no dataset group goes through much of an epoch in it,
which would mix epochs. Packs of similar cost are neighbours, so that a step, a slice of the sequence, holds packs of one cost. This
holds even if a single long document makes a pack more expensive than all others, which no packing can prevent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_bagel.data.planner.cost_model import COST_UNIT
from megatron_bagel.data.planner.pack_many import BlockPacking, Load
from megatron_bagel.data.planner.permutation import permuted
from megatron_bagel.data.planner.stream import COLUMNS, COST, EPOCH, SOURCE, TOKENS, CandidateStream

AGE = COLUMNS  # column of a waiting candidate: blocks it has waited
_MAX_WAIT = 4  # blocks a candidate may wait before it is assigned ahead of all others
_MAX_REFUSALS = 32  # packs that may refuse a candidate once it goes first
MAX_PACKS = 1024
_MAX_CANDIDATES = 1 << 15
_EPOCH_SHARE = 8  # a block takes at most one eighth of a group's epoch, if the window permits
_SLACK = 32  # candidates beyond the packs' tokens, as one part in this many; the packs are filled from them
_MAX_TRIES = 16  # candidates of a mandatory group tried for one pack
_SAME_COST = 0.01  # packs whose costs differ by less than this share stay in random order


@dataclass(frozen=True)
class BlockSettings:
    """``capacity`` and ``expected`` are tokens of a pack; at least ``window`` candidates stay to choose from.

    ``max_packs`` limits the length of a block.
    """

    capacity: int
    expected: int
    window: int
    seed: int
    max_packs: int = MAX_PACKS


@dataclass(frozen=True)
class Block:
    """Packs in sequence order: pack i is ``rows[bounds[i]:bounds[i + 1]]`` [n, COLUMNS]; ``waiting`` [w, COLUMNS + 1] remains."""

    rows: np.ndarray
    bounds: np.ndarray
    waiting: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def sums(self) -> np.ndarray:
        """Return (tokens, cost) of every pack, int64 [packs, 2]."""
        totals = np.cumsum(np.concatenate([np.zeros((1, 2), dtype=np.int64), self.rows[:, [TOKENS, COST]]]), axis=0)
        sums: np.ndarray = np.diff(totals[self.bounds], axis=0)
        return sums


def no_candidates() -> np.ndarray:
    """Return an empty table of waiting candidates."""
    return np.empty((0, COLUMNS + 1), dtype=np.int64)


def plan_block(stream: CandidateStream, waiting: np.ndarray, number: int, settings: BlockSettings) -> Block:
    """Plan block ``number`` (from 0) of the sequence from new candidates of ``stream`` and those ``waiting`` (oldest first).

    Raises ValueError if the mandatory groups cannot fit into one pack.
    """
    mandatory = [number for number, source in enumerate(stream.sources) if source.is_mandatory]
    waiting = _draw_candidates(stream, waiting, settings)
    tokens = waiting[:, TOKENS]
    reserve = 0 if stream.is_used_up else _reserve(tokens, settings)
    count = int((tokens.sum() - reserve) // settings.capacity)
    limits = [len(stream.sources[source]) // _EPOCH_SHARE for source in mandatory]
    count = max(1, min(count, settings.max_packs, *limits))
    mandatory_rows, returned = _mandatory_rows(stream, mandatory, count, settings)
    waiting = np.concatenate([waiting, returned])
    packing = _pack(stream, waiting, mandatory_rows, count, settings)
    pack_of = packing.pack_of
    pack_of, waiting = _skip_hopeless(stream, waiting, pack_of, settings.capacity - mandatory_rows[:, :, TOKENS].sum(axis=1))
    rows = np.concatenate([mandatory_rows.reshape(-1, COLUMNS), waiting[pack_of >= 0, :COLUMNS]])
    packs = np.concatenate([np.repeat(np.arange(count), len(mandatory)), pack_of[pack_of >= 0]])
    waiting_rows = waiting[pack_of < 0]
    waiting_rows[:, AGE] += 1
    rows, bounds = _in_sequence(rows, packs, count, number, settings.seed)
    return Block(rows, bounds, waiting_rows)


def _draw_candidates(stream: CandidateStream, waiting: np.ndarray, settings: BlockSettings) -> np.ndarray:
    """Draw until candidates for a block wait, and in any case for one pack beyond the reserve. A stream that ends gives its last ones."""
    min_count = min(_MAX_CANDIDATES, max(settings.window, _epoch_part(stream)))
    max_total = int(settings.max_packs * (1 + 1 / _SLACK) + 1) * settings.capacity
    while True:
        count, total = len(waiting), int(waiting[:, TOKENS].sum())
        missing_tokens = settings.capacity + _reserve(waiting[:, TOKENS], settings) - total
        is_enough = missing_tokens <= 0 and (count >= min_count or total >= max_total)
        if is_enough or (count and stream.is_used_up):
            return waiting
        mean = total / count if count else settings.capacity
        num_draws = int(np.ceil(max(missing_tokens / mean, min(min_count - count, (max_total - total) / mean), 1)))
        waiting = np.concatenate([waiting, _with_age_zero(stream.draw(min(num_draws, _MAX_CANDIDATES)))])


def _with_age_zero(rows: np.ndarray) -> np.ndarray:
    """Add the age column to candidates that have not waited yet."""
    return np.column_stack([rows, np.zeros(len(rows), dtype=np.int64)])


def _epoch_part(stream: CandidateStream) -> int:
    """Return the number of candidates in which no group goes through more than its share of an epoch."""
    weights = stream.weights
    candidates = (len(source) * sum(weights) / weight for source, weight in zip(stream.sources, weights, strict=True) if weight > 0)
    return int(min(candidates, default=0)) // _EPOCH_SHARE


def _reserve(tokens: np.ndarray, settings: BlockSettings) -> int:
    """Return the tokens that stay waiting when the block is packed: the window, a pack, and the slack of a large block."""
    window = int(tokens[len(tokens) - min(settings.window, len(tokens)) :].sum())
    return max(settings.capacity, window, int(tokens.sum()) // (_SLACK + 1))


def _mandatory_rows(stream: CandidateStream, mandatory: list[int], count: int, settings: BlockSettings) -> tuple[np.ndarray, np.ndarray]:
    """Return one candidate of every mandatory group for each pack [count, groups, COLUMNS], and those that must wait."""
    rows = np.empty((count, len(mandatory), COLUMNS), dtype=np.int64)
    returned = [no_candidates()]
    for pack in range(count if mandatory else 0):
        for _ in range(_MAX_TRIES):
            fitting_rows, unfit_rows = _fitting_set(stream, mandatory, settings.capacity)
            returned += [_with_age_zero(row[None]) for row in unfit_rows]
            if fitting_rows is not None:
                rows[pack] = fitting_rows
                break
        else:
            names = ", ".join(stream.sources[number].name for number in mandatory)
            raise ValueError(
                f"no samples of the mandatory groups {names} found that fit together into --max_num_tokens {settings.capacity}; "
                "raise it, or lower --max_num_tokens_per_sample or the image sizes in the dataset configuration"
            )
    return rows, np.concatenate(returned)


def _fitting_set(stream: CandidateStream, mandatory: list[int], room: int) -> tuple[np.ndarray | None, list[np.ndarray]]:
    """Return one candidate of every mandatory group within ``room`` tokens (None without success), and those that did not fit."""
    fitting_rows, unfit_rows = [], []
    for number in mandatory:
        for _ in range(_MAX_TRIES):
            row = stream.next_of(number)
            if row[TOKENS] <= room:
                fitting_rows.append(row)
                room -= int(row[TOKENS])
                break
            unfit_rows.append(row)
        else:
            return None, unfit_rows + fitting_rows
    return np.array(fitting_rows), unfit_rows


def _pack(stream: CandidateStream, waiting: np.ndarray, mandatory_rows: np.ndarray, count: int, settings: BlockSettings) -> BlockPacking:
    """Assign due candidates up to the expected length of the packs, and fill the packs with any that wait."""
    tokens = waiting[:, TOKENS]
    # A nearly full pack leaves no choice of a last sample, so room for one and a half samples stays free.
    target = min(settings.expected, settings.capacity - 3 * int(tokens.mean()) // 2)
    packing = BlockPacking(_load(waiting), _load(mandatory_rows.sum(axis=1)), settings.capacity)
    ages = waiting[:, AGE]
    for age in np.unique(ages[ages >= _MAX_WAIT])[::-1]:  # the oldest first, or a short one might never get a turn
        packing.assign_first(np.flatnonzero(ages == age))
    begun_tokens = int(mandatory_rows[:, :, TOKENS].sum())
    # Samples too long to fill a gap are due ahead of their turn; the short ones behind them fill the packs instead.
    is_ahead = (np.cumsum(tokens) <= count * settings.capacity - begun_tokens) & (tokens > settings.capacity - target)
    is_in_turn = np.cumsum(np.where(is_ahead, 0, tokens)) <= count * target - begun_tokens - int(tokens[is_ahead].sum())
    packing.assign_due(np.flatnonzero(is_ahead | is_in_turn))
    packing.close()
    return packing


def _load(rows: np.ndarray) -> Load:
    return Load(rows[:, TOKENS], rows[:, COST] // COST_UNIT - rows[:, TOKENS])


def _skip_hopeless(
    stream: CandidateStream, waiting: np.ndarray, pack_of: np.ndarray, free_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Skip and list candidates that many packs refused although they went first; they would wait forever.

    ``free_tokens`` [packs] is what the block's mandatory samples leave of each pack.
    """
    max_wait = _MAX_WAIT - 1 + max(1, _MAX_REFUSALS // len(free_tokens))
    is_hopeless = (pack_of < 0) & (waiting[:, AGE] >= max_wait) & (waiting[:, TOKENS] > free_tokens.max())
    for row in waiting[is_hopeless]:
        stream.skips.add(stream.sources[int(row[SOURCE])].name, row[None], "leaves no room for the mandatory groups")
    return pack_of[~is_hopeless], waiting[~is_hopeless]


def _in_sequence(rows: np.ndarray, packs: np.ndarray, count: int, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows in the packs' final order, and each pack's bounds among them.

    Similar packs are neighbours: the cost ascends in even blocks and descends in odd ones, which also holds across blocks.
    """
    costs = np.bincount(packs, rows[:, COST], count)
    shuffled = permuted(np.arange(count), count, seed, "packs", number)
    cost_level = np.rint(costs[shuffled] / (costs.mean() * _SAME_COST))
    order = shuffled[np.argsort(cost_level if number % 2 == 0 else -cost_level, kind="stable")]
    position = np.empty(count, dtype=np.int64)
    position[order] = np.arange(count)
    sorting = np.argsort(position[packs], kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(position[packs], minlength=count))])
    return rows[sorting], bounds


def picks(rows: np.ndarray) -> np.ndarray:
    """Return (source, index, epoch) of candidates [n, 3], the form of a saved state."""
    return rows[:, SOURCE : EPOCH + 1]
