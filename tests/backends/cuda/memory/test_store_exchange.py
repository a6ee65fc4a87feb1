"""Exchanges of bytes through a store: any bytes, one after another, and what is said of ranks that miss."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from deepep.backends.cuda.memory.store_exchange import StoreExchange
from deepep.errors import PeerTimeoutError
from deepep.runtime.control.transport import serve_store

ANY = [b"", bytes(range(256)), b"...", b"\0", "é".encode()]


def exchanged(stores: list[dist.Store], series: list[list[bytes]]) -> list[list[list[bytes]]]:
    """Results of one exchange after another, by rank. series: by exchange, what each rank brings."""
    given: list[list[list[bytes]]] = [[] for _ in stores]

    def work(rank: int) -> None:
        exchange = StoreExchange(stores[rank], "series", rank, len(stores), 60.0)
        given[rank] = [exchange(mine[rank]) for mine in series]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return given


@pytest.mark.parametrize("kind", ["tcp", "memory"])
def test_every_rank_gets_every_rank_s_bytes(kind: str) -> None:
    store = serve_store(loopback=True) if kind == "tcp" else dist.HashStore()
    stores = [store.clone() if kind == "tcp" else store for _ in range(3)]  # type: ignore[attr-defined]
    series = [[ANY[(rank + step) % len(ANY)] for rank in range(3)] for step in range(len(ANY))]
    assert exchanged(stores, series) == [series] * 3
    # Of all but the last exchange nothing is left behind.
    assert not any(store.check([f"deepep/nvshmem/series/{step}/0"]) for step in range(len(series) - 1))


def test_those_who_do_not_come_are_named() -> None:
    exchange = StoreExchange(dist.HashStore(), "alone", 1, 4, 0.05)
    with pytest.raises(PeerTimeoutError) as missed:
        exchange(b"here")
    record = missed.value.record
    assert (record.rank, record.waited_on, record.expected, record.seen) == (1, (0, 2, 3), 4, 1)
    assert record.operation == "NVSHMEM"


def test_a_store_that_is_gone_is_said() -> None:
    class Gone(dist.Store):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("connection reset")

    with pytest.raises(PeerTimeoutError, match="the store failed: RuntimeError: connection reset"):
        StoreExchange(Gone(), "x", 0, 2, 60.0)(b"")
