"""Exchanges of bytes through a torch group's store, for what has to be known before any memory is shared."""

from __future__ import annotations

import base64
import time

from torch.distributed.distributed_c10d import Store

from deepep.errors import FaultRecord, PeerTimeoutError
from deepep.runtime.control.meeting import ControlStore, StoreError

_POLL = 0.002  # seconds between looks


class StoreExchange:
    """One exchange after another between the ranks of a group.

    name: of the whole series, used by no other before, the same on all ranks (the number of a meeting, say).
    timeout: seconds that a rank waits for the others in each of them.
    """

    def __init__(self, store: Store, name: str, rank: int, num_ranks: int, timeout: float) -> None:
        self._store = ControlStore(store, f"deepep/nvshmem/{name}")
        self._rank, self._num_ranks, self._timeout = rank, num_ranks, timeout
        self._count = 0

    def __call__(self, mine: bytes) -> list[bytes]:
        """Every rank's bytes, by rank. Raises PeerTimeoutError with the ranks that did not come."""
        number, begin = self._count, time.monotonic()
        self._count += 1
        posted: dict[int, bytes] = {}
        try:
            self._store.set(f"{number}/{self._rank}", base64.b64encode(mine).decode() + ".")
            while True:
                for rank in set(range(self._num_ranks)) - set(posted):
                    raw = self._store.get(f"{number}/{rank}")
                    if raw is not None:
                        posted[rank] = base64.b64decode(raw.rstrip(b"."))
                if len(posted) == self._num_ranks:
                    # Whoever posts this one has read the one before.
                    self._store.remove(f"{number - 1}/{self._rank}")
                    return [posted[rank] for rank in range(self._num_ranks)]
                if time.monotonic() - begin > self._timeout:
                    raise self._fault(number, posted, begin)
                time.sleep(_POLL)
        except StoreError as error:
            raise self._fault(number, posted, begin, f"the store failed: {error}") from None

    def _fault(self, number: int, posted: dict[int, bytes], begin: float, why: str = "") -> PeerTimeoutError:
        record = FaultRecord(
            operation="NVSHMEM",
            phase=f"exchange {number}",
            rank=self._rank,
            waited_on=() if why else tuple(sorted(set(range(self._num_ranks)) - set(posted))),
            expected=self._num_ranks,
            seen=len(posted),
            seconds=time.monotonic() - begin,
        )
        return PeerTimeoutError(record, why)
