"""The processes of one attempt find each other in torchrun's store, which holds what earlier ones left.

torchrun counts restarts by machine, so its count is no name for an attempt: machines that others made restart
count one less. Here rank 0 draws a name and tells it to whom it hears; that the other is of this attempt too,
and not what a dead one has left, shows when it answers.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from moco_fast.distributed import name_ranks

# For all to come, from the first one on: what differs is how long machines take to start and import.
PATIENCE = timedelta(minutes=15)


@dataclass(frozen=True)
class Meeting:
    """What all ranks know after it: a name that no other attempt has, and whether there was one before."""

    name: str
    again: bool


def meet(
    store: Any,  # torch.distributed.Store
    rank: int,
    size: int,
    again: bool,  # of rank 0: whether there was an attempt before, as far as it knows
) -> Meeting:
    """Return once all ranks of this attempt are there.

    Raises:
        TimeoutError: names the ranks that did not come within ``PATIENCE``.
    """
    own, store = uuid.uuid4().hex, store.clone()
    store.set_timeout(PATIENCE)
    if rank:
        store.set(f"come/{rank}", own)
        try:
            meeting = Meeting(**json.loads(store.get(f"welcome/{own}")))
        except RuntimeError as error:
            raise TimeoutError(f"rank 0 did not come within {PATIENCE}; this was rank {rank}") from error
        store.set(f"answer/{own} to {meeting.name}", "")
        return meeting
    meeting = Meeting(own, again or store.check(["met"]))
    store.set("met", "")
    come: dict[int, str] = {}
    missing = list(range(1, size))
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while missing:
        for other in missing:
            if not store.check([f"come/{other}"]):
                continue
            name = store.get(f"come/{other}").decode()
            if come.get(other) != name:
                come[other] = name
                store.set(f"welcome/{name}", json.dumps(vars(meeting)))
        missing = [i for i in missing if not store.check([f"answer/{come.get(i)} to {own}"])]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name_ranks(missing)} did not come within {PATIENCE}; this was rank 0")
        time.sleep(0.02)
    return meeting
