"""Stores: what lies below a group's prefixes, and where another process finds it."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import FileStore, TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from deepep.errors import RangeError


def base_of(store: Store) -> Store:
    """The store below all prefixes."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def place_of(store: Store) -> str:
    """The address at which another process finds a store; empty for one that only its owner can open."""
    base: Any = base_of(store)
    if isinstance(base, TCPStore):
        return f"tcp:{base.host}:{base.port}"
    if isinstance(base, FileStore):
        file: Any = base  # torch's stubs do not know its path
        return f"file:{os.path.abspath(file.path)}"
    return ""


def open_store(place: str, timeout: float) -> Store:
    """The store at a place, on a connection of its own. Raises RangeError if none answers there."""
    kind, _, where = place.partition(":")
    if kind == "tcp":
        host, _, port = where.rpartition(":")
        try:
            return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout))
        except RuntimeError as error:  # torch's own, for whatever keeps it from connecting
            reason = str(error).partition("\n")[0]
            raise RangeError("store", f"{place} ({reason})"[:300], "one that answers") from None
    if kind == "file":
        if not os.path.exists(where):  # it would be made, and nobody else look there
            raise RangeError("store", place[:300], "one that is there")
        store = FileStore(where, -1)
        store.set_timeout(timedelta(seconds=timeout))
        return store
    raise RangeError("store", "None", "the store that the members' group met through: it has no address")
