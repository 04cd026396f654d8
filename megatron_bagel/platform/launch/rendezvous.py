# SPDX-License-Identifier: Apache-2.0
"""How restarted ranks find each other in a store that still holds what earlier ranks left.

torchrun's agent may keep one store over all restarts. Ranks would then read addresses of dead ranks and reports of an earlier failure.
The number of restarts does not tell generations apart, because the agents of several hosts count differently. Rank 0 therefore invents
a name, and a rank accepts it only as the answer to a fresh token, which no earlier rank can have used.
"""

from __future__ import annotations

import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist


def generation_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Meet the ranks that the launcher started.

    Returns:
        A store that no earlier ranks have written to, the rank and the world size.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(agree_on_generation(store, rank, world_size, timeout), store), rank, world_size


def agree_on_generation(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a name that these ranks share and no earlier ranks had.

    Raises:
        TimeoutError: On rank 0, naming the ranks that did not come.
    """
    token = uuid4().hex
    if rank:
        answer = f"answer/{rank}/{token}"
        store.set(f"hello/{rank}", token)
        store.wait([answer], timeout)
        name = store.get(answer).decode()
        store.set(f"here/{name}/{rank}", "")
        return name
    absent_ranks, answered_tokens, deadline = set(range(1, world_size)), set(), time.monotonic() + timeout.total_seconds()
    while absent_ranks:
        for peer in sorted(absent_ranks):
            if store.check([f"here/{token}/{peer}"]):
                absent_ranks.discard(peer)
            elif store.check([f"hello/{peer}"]) and (peer_token := store.get(f"hello/{peer}").decode()) not in answered_tokens:
                # The token may be a dead rank's: nobody reads that answer, and the living rank's token arrives later.
                store.set(f"answer/{peer}/{peer_token}", token)
                answered_tokens.add(peer_token)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{len(absent_ranks)} of {world_size} ranks did not come to the rendezvous, among them {sorted(absent_ranks)[:8]}"
            )
        time.sleep(0.02)
    return token
