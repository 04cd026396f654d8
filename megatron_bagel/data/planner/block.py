"""The next stretch of packs, planned together: how many, from which candidates, in which order.

A block is as long as the data allow: up to 1024 packs, but never so long that a dataset group goes through much of an epoch in
it, which would mix epochs. Packs that cost like each other lie side by side, so that a step, which is a slice of the sequence,
holds packs of one cost even where a single long document makes a pack dearer than all others (no packing can undo that).
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
_PATIENCE = 4  # blocks a candidate may wait before it is placed ahead of all others
_CHANCES = 32  # packs a candidate may be refused by once it goes first
_MAX_PACKS = 1024
_MAX_CANDIDATES = 1 << 15
_EPOCH_SHARE = 8  # a block takes at most this part (one eighth) of a group's epoch, where the window lets it
_SLACK = 32  # candidates beyond the packs' own tokens, as one part in this many: what closes the packs is chosen from them
_TRIES = 16  # candidates of a mandatory group tried for one pack
_SAME_COST = 0.01  # packs whose costs differ by less than this share stay in random order


@dataclass(frozen=True)
class BlockSettings:
    """``capacity`` and ``expected`` tokens of a pack; at least ``window`` candidates are left to choose from."""

    capacity: int
    expected: int
    window: int
    seed: int


@dataclass(frozen=True)
class Block:
    """Packs in sequence order: pack i holds ``rows[bounds[i]:bounds[i + 1]]`` [n, COLUMNS]. ``waiting`` [w, COLUMNS + 1] is left."""

    rows: np.ndarray
    bounds: np.ndarray
    waiting: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def sums(self) -> list[list[int]]:
        """[tokens, cost] of every pack."""
        totals = np.cumsum(np.concatenate([np.zeros((1, 2), dtype=np.int64), self.rows[:, [TOKENS, COST]]]), axis=0)
        return np.diff(totals[self.bounds], axis=0).tolist()


def no_candidates() -> np.ndarray:
    """An empty table of waiting candidates."""
    return np.empty((0, COLUMNS + 1), dtype=np.int64)


def plan_block(stream: CandidateStream, waiting: np.ndarray, number: int, settings: BlockSettings) -> Block:
    """Block ``number`` (from 0) of the sequence: draws candidates from ``stream`` and packs them with those ``waiting`` (oldest first).

    Raises ValueError when the mandatory groups cannot fit into a pack together.
    """
    mandatory = [number for number, source in enumerate(stream.sources) if source.is_mandatory]
    waiting = _refill(stream, waiting, settings)
    tokens = waiting[:, TOKENS]
    count = int((tokens.sum() - _reserve(tokens, settings)) // settings.capacity)
    limits = [len(stream.sources[source]) // _EPOCH_SHARE for source in mandatory]
    count = max(1, min(count, _MAX_PACKS, *limits))
    begun, put_back = _mandatory_rows(stream, mandatory, count, settings)
    waiting = np.concatenate([waiting, put_back])
    packing = _pack(stream, waiting, begun, count, settings)
    pack_of = packing.pack_of
    pack_of, waiting = _leave_out_stuck(stream, waiting, pack_of, settings.capacity - begun[:, :, TOKENS].sum(axis=1))
    rows = np.concatenate([begun.reshape(-1, COLUMNS), waiting[pack_of >= 0, :COLUMNS]])
    packs = np.concatenate([np.repeat(np.arange(count), len(mandatory)), pack_of[pack_of >= 0]])
    left = waiting[pack_of < 0]
    left[:, AGE] += 1
    rows, bounds = _in_sequence(rows, packs, count, number, settings.seed)
    return Block(rows, bounds, left)


def _refill(stream: CandidateStream, waiting: np.ndarray, settings: BlockSettings) -> np.ndarray:
    """Draw until a block's worth of candidates waits, and in any case a pack's worth beyond the reserve."""
    wanted = min(_MAX_CANDIDATES, max(settings.window, _epoch_part(stream)))
    most = int(_MAX_PACKS * (1 + 1 / _SLACK) + 1) * settings.capacity
    while True:
        count, total = len(waiting), int(waiting[:, TOKENS].sum())
        short = settings.capacity + _reserve(waiting[:, TOKENS], settings) - total
        if short <= 0 and (count >= wanted or total >= most):
            return waiting
        mean = total / count if count else settings.capacity
        missing = int(np.ceil(max(short / mean, min(wanted - count, (most - total) / mean), 1)))
        waiting = np.concatenate([waiting, _fresh(stream.draw(min(missing, _MAX_CANDIDATES)))])


def _fresh(rows: np.ndarray) -> np.ndarray:
    """Candidates that have not waited yet."""
    return np.column_stack([rows, np.zeros(len(rows), dtype=np.int64)])


def _epoch_part(stream: CandidateStream) -> int:
    """Candidates in which no group goes through more than its part of an epoch."""
    weights = sum(source.weight for source in stream.sources)
    return int(min(len(s) * weights / s.weight for s in stream.sources if s.weight > 0)) // _EPOCH_SHARE


def _reserve(tokens: np.ndarray, settings: BlockSettings) -> int:
    """Tokens that stay waiting when the block is packed: the window, a pack, and the slack of a large block."""
    window = int(tokens[len(tokens) - min(settings.window, len(tokens)) :].sum())
    return max(settings.capacity, window, int(tokens.sum()) // (_SLACK + 1))


def _mandatory_rows(stream: CandidateStream, mandatory: list[int], count: int, settings: BlockSettings) -> tuple[np.ndarray, np.ndarray]:
    """One candidate of every mandatory group for each pack [count, groups, COLUMNS], and the ones that did not fit, which wait."""
    rows = np.empty((count, len(mandatory), COLUMNS), dtype=np.int64)
    put_back = [no_candidates()]
    for pack in range(count if mandatory else 0):
        for _ in range(_TRIES):
            chosen, unfit = _fitting_set(stream, mandatory, settings.capacity)
            put_back += [_fresh(row[None]) for row in unfit]
            if chosen is not None:
                rows[pack] = chosen
                break
        else:
            names = ", ".join(stream.sources[number].name for number in mandatory)
            raise ValueError(
                f"no samples of the mandatory groups {names} found that fit together into --max_num_tokens {settings.capacity}; "
                "raise it, or lower --max_num_tokens_per_sample or the image sizes in the dataset configuration"
            )
    return rows, np.concatenate(put_back)


def _fitting_set(stream: CandidateStream, mandatory: list[int], room: int) -> tuple[np.ndarray | None, list[np.ndarray]]:
    """One candidate of every mandatory group within ``room`` tokens (None when none is found), and those that did not fit."""
    chosen, unfit = [], []
    for number in mandatory:
        for _ in range(_TRIES):
            row = stream.next_of(number)
            if row[TOKENS] <= room:
                chosen.append(row)
                room -= int(row[TOKENS])
                break
            unfit.append(row)
        else:
            return None, unfit + chosen
    return np.array(chosen), unfit


def _pack(stream: CandidateStream, waiting: np.ndarray, begun: np.ndarray, count: int, settings: BlockSettings) -> BlockPacking:
    """Deal candidates in their turn, up to the expected length of the packs, and close the packs with whatever waits."""
    tokens = waiting[:, TOKENS]
    # A pack that is nearly full leaves no choice of a last sample: room for one and a half of them stays free.
    target = min(settings.expected, settings.capacity - 3 * int(tokens.mean()) // 2)
    packing = BlockPacking(_load(waiting), _load(begun.sum(axis=1)), settings.capacity)
    ages = waiting[:, AGE]
    for age in np.unique(ages[ages >= _PATIENCE])[::-1]:  # the oldest first, or a short one might give way for ever
        packing.place_first(np.flatnonzero(ages == age))
    begun_tokens = int(begun[:, :, TOKENS].sum())
    # Samples too long to close a pack with are due ahead of their turn; the short ones behind them close the packs instead.
    ahead = (np.cumsum(tokens) <= count * settings.capacity - begun_tokens) & (tokens > settings.capacity - target)
    in_turn = np.cumsum(np.where(ahead, 0, tokens)) <= count * target - begun_tokens - int(tokens[ahead].sum())
    packing.assign_due(np.flatnonzero(ahead | in_turn))
    packing.close()
    return packing


def _load(rows: np.ndarray) -> Load:
    return Load(rows[:, TOKENS], rows[:, COST] // COST_UNIT - rows[:, TOKENS])


def _leave_out_stuck(stream: CandidateStream, waiting: np.ndarray, pack_of: np.ndarray, rooms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Candidates that many packs, asked first, had no room for would wait for ever: they are skipped and listed.

    ``rooms`` [packs] is what the block's mandatory samples leave of each pack.
    """
    patience = _PATIENCE - 1 + max(1, _CHANCES // len(rooms))
    hopeless = (pack_of < 0) & (waiting[:, AGE] >= patience) & (waiting[:, TOKENS] > rooms.max())
    for row in waiting[hopeless]:
        stream.skips.add(stream.sources[int(row[SOURCE])].name, row[None], "leaves no room for the mandatory groups")
    return pack_of[~hopeless], waiting[~hopeless]


def _in_sequence(rows: np.ndarray, packs: np.ndarray, count: int, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the packs' final order, and each pack's bounds among them.

    Like beside like: ascending cost in even blocks, descending in odd ones, so that neighbours across blocks are alike too.
    """
    costs = np.bincount(packs, rows[:, COST], count)
    shuffled = permuted(np.arange(count), count, seed, "packs", number)
    level = np.rint(costs[shuffled] / (costs.mean() * _SAME_COST))
    order = shuffled[np.argsort(level if number % 2 == 0 else -level, kind="stable")]
    place = np.empty(count, dtype=np.int64)
    place[order] = np.arange(count)
    sorting = np.argsort(place[packs], kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(place[packs], minlength=count))])
    return rows[sorting], bounds


def picks(rows: np.ndarray) -> np.ndarray:
    """(source, index, epoch) of candidates [n, 3]: what a saved state keeps of them."""
    return rows[:, SOURCE : EPOCH + 1]
