"""How ranks that a launcher started again find each other in a store that still holds what the ranks before them left.

torchrun's agent may keep one store over all restarts. Addresses of dead ranks would be read from it, and reports of an earlier failure.
The number of restarts is no way out: with several hosts the agents count differently. So rank 0 makes up a name, and a rank takes it
only as the answer to a token of its own, which no earlier rank can have asked with.
"""

from __future__ import annotations

import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist


def agree_on_generation(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that these ranks share and no ranks before them had. Raises TimeoutError on rank 0 naming the ranks that did not come."""
    token = uuid4().hex
    if rank:
        answer = f"answer/{rank}/{token}"
        store.set(f"hello/{rank}", token)
        store.wait([answer], timeout)
        name = store.get(answer).decode()
        store.set(f"here/{name}/{rank}", "")
        return name
    missing, answered, deadline = set(range(1, world_size)), set(), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"here/{token}/{other}"]):
                missing.discard(other)
            elif store.check([f"hello/{other}"]) and (told := store.get(f"hello/{other}").decode()) not in answered:
                # Perhaps a dead rank's: nobody reads that answer, and the living one's token comes later.
                store.set(f"answer/{other}/{told}", token)
                answered.add(told)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(missing)} of {world_size} ranks did not come to the rendezvous, among them {sorted(missing)[:8]}")
        time.sleep(0.02)
    return token
