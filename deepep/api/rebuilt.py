"""Handles as clients keep them: taken apart, saved for a backward pass entry by entry, put together again.

V1's handle is a tuple of tensors, so its clients do with it what is done with tensors: XTuner gives the
entries to `ctx.save_for_backward` and passes `ctx.saved_tensors` on, which may have been copied to the host
and back meanwhile. So a handle's entries say all that a route is, and one of them, the seal, says of which
buffer it is and what the others must hold: a tuple that was edited, or of another buffer, is refused.

A low-latency handle has V1's five entries and no place for a seal, nor do they say what kernels leave on the
device for a combine. So what the seal says, and the plan, are kept here, for as long as its first tensor
lives: `keep`. A copy of that tensor is one that nothing is known of; what becomes of it is the backend's
affair.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Sequence
from hashlib import blake2b

import torch

from deepep.errors import ArgumentTypeError, HandleError
from deepep.runtime.checks import check_int
from deepep.runtime.engine import Engine
from deepep.runtime.requests import LowLatencyRoute, Route

NUM_ENTRIES = 6
PREFIX, SEAL, SOURCES, TABLE = 0, 1, 3, 4
"""Entries that a handle has, by V1's places: rank_prefix_matrix, (its channel_prefix_matrix has no meaning
here), recv_src_idx, is_token_in_rank."""

_SEAL_WORDS = 4
_ALLOWED = "the handle of Buffer.dispatch, or its entries as they were"
_numbers: weakref.WeakKeyDictionary[Engine, int] = weakref.WeakKeyDictionary()


def seal(route: Route, prefix: torch.Tensor, sources: torch.Tensor | None) -> torch.Tensor:
    """Seal of a handle, [4] int64 on the host: the buffer's number, E, rows handed out, and a digest.

    The digest is of all of these and of the other entries.
    """
    assert route.num_rows is not None
    words = [_number_of(route.engine), route.num_experts, route.num_rows]
    words.append(_digest(words, (prefix, sources, route.is_token_in_rank)))
    return torch.tensor(words, dtype=torch.int64, device="cpu")


def rebuilt_route(entries: Sequence[object], engine: Engine) -> Route:
    """The route of a handle whose entries came one by one. Raises ArgumentTypeError or HandleError."""
    if len(entries) != NUM_ENTRIES:
        raise ArgumentTypeError("handle", f"{type(entries).__name__} of {len(entries)}", _ALLOWED)
    for index, entry in enumerate(entries):
        optional = index not in (PREFIX, SEAL, TABLE)
        if not (isinstance(entry, torch.Tensor) and not entry.is_meta) and not (optional and entry is None):
            got = "a meta tensor" if isinstance(entry, torch.Tensor) else type(entry).__name__
            raise ArgumentTypeError(f"handle[{index}]", got, _ALLOWED)
    prefix, sealed, sources, table = (entries[index] for index in (PREFIX, SEAL, SOURCES, TABLE))
    assert isinstance(prefix, torch.Tensor)
    assert isinstance(sealed, torch.Tensor)
    assert isinstance(table, torch.Tensor)
    assert sources is None or isinstance(sources, torch.Tensor)
    if sealed.dtype != torch.int64 or sealed.shape != (_SEAL_WORDS,):
        raise HandleError("handle[1]", f"{sealed.dtype} {list(sealed.shape)}", _ALLOWED)
    *words, digest = sealed.tolist()
    number, num_experts, num_rows = words
    if number != _number_of(engine):
        raise _of_another_buffer()
    if digest != _digest(words, (prefix, sources, table)):
        raise HandleError("handle", "entries that are not those of a dispatch", _ALLOWED)
    with torch.inference_mode(False), torch.no_grad():
        sums = prefix.detach().to("cpu", torch.int64)
        counts = sums - torch.cat([torch.zeros_like(sums[:1]), sums[:-1]])  # [source, destination]
        device = engine.info.options.device
        route = engine.restore_route(table.detach().to(device), counts, num_experts)
    route.num_rows = num_rows
    return route


class _Kept(weakref.ref[torch.Tensor]):
    """A dispatch's facts, kept for a tensor that is not held by them. numbers: M, H and E."""

    __slots__ = ("engine", "key", "numbers", "plan")
    key: int
    engine: weakref.ref[Engine]
    numbers: tuple[int, int, int]
    plan: object


_kept: dict[int, _Kept] = {}
"""By the address of the tensor object."""


def _forget(kept: weakref.ref[torch.Tensor], everything: dict[int, _Kept] = _kept) -> None:
    assert isinstance(kept, _Kept)
    everything.pop(kept.key, None)


def keep(route: LowLatencyRoute) -> None:
    """Keeps what a low-latency dispatch has made, to be found by the first tensor of its handle."""
    assert route.engine is not None
    kept = _Kept(route.source_index, _forget)
    kept.key, kept.engine, kept.plan = id(route.source_index), weakref.ref(route.engine), route.plan
    kept.numbers = (route.num_max_tokens, route.hidden, route.num_experts)
    _kept[kept.key] = kept


def rebuilt_low_latency_route(entries: Sequence[object], engine: Engine) -> LowLatencyRoute:
    """The route of a low-latency handle whose five entries came one by one; its plan, if the first is the
    dispatch's own tensor. Raises ArgumentTypeError, RangeError or HandleError.
    """
    source, ranges = entries[:2]
    for index, entry in enumerate((source, ranges)):
        if not isinstance(entry, torch.Tensor):
            raise ArgumentTypeError(f"handle[{index}]", type(entry).__name__, "a tensor")
    assert isinstance(source, torch.Tensor)
    assert isinstance(ranges, torch.Tensor)
    most, hidden, experts = (check_int(f"handle[{i}]", entries[i], 1, 2**63 - 1) for i in (2, 3, 4))
    kept = _kept.get(id(source))
    if kept is None or kept() is not source:
        return LowLatencyRoute(source, ranges, most, hidden, experts, engine)
    if kept.engine() is not engine:
        raise _of_another_buffer()
    for index, (number, wanted) in enumerate(zip((most, hidden, experts), kept.numbers, strict=True), 2):
        if number != wanted:
            raise HandleError(f"handle[{index}]", str(number), f"{wanted}, as the dispatch's")
    return LowLatencyRoute(source, ranges, most, hidden, experts, engine, kept.plan)


def _of_another_buffer() -> HandleError:
    return HandleError("handle", "the handle of another buffer", "a handle of this buffer")


def _number_of(engine: Engine) -> int:
    return _numbers.setdefault(engine, secrets.randbits(62))


def _digest(words: list[int], entries: tuple[torch.Tensor | None, ...]) -> int:
    """A digest of numbers and tensors, as an int64."""
    found = blake2b(repr(words).encode(), digest_size=8)
    for entry in entries:
        if entry is not None:
            found.update(f"{entry.dtype} {list(entry.shape)}".encode())
            found.update(entry.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(found.digest(), "little", signed=True)
