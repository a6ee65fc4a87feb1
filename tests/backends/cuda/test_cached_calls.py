"""Arguments of cached dispatches are prepared once along a handle, and anew whenever any differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("deepep._cuda", reason="deepep._cuda is not built")

from deepep.backends.cuda import launch as nvlink
from deepep.backends.cuda.memory.arrays import receive_spec
from deepep.backends.cuda.sm_split import dispatch_split

TOKENS, RANKS, HIDDEN = 6, 2, 128


class Launches:
    """Stands for the domain: keeps what was launched."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def dispatch_cached(self, *call: Any) -> None:
        self.made.append(call)


def scales(columns: int, wide: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[T, columns]; the first columns of `wide` where that is given: the same strides for any number."""
    return torch.zeros((TOKENS, wide or columns), dtype=dtype)[:, :columns]


def test_nothing_old_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[tuple[int, ...]] = []

    def prepare(*args: int) -> int:
        prepared.append(args)
        return len(prepared) - 1  # what is launched says which it was

    monkeypatch.setattr(nvlink._cuda, "CachedDispatch", prepare)
    endpoint = nvlink.Endpoint.__new__(nvlink.Endpoint)
    endpoint._domain = launches = Launches()  # type: ignore[assignment]
    plan = nvlink.Plan(torch.zeros((TOKENS + RANKS, RANKS), dtype=torch.int32), TOKENS, 9, 3)
    plain = torch.zeros((TOKENS, HIDDEN), dtype=torch.bfloat16)
    bytes_ = torch.zeros((TOKENS, HIDDEN), dtype=torch.uint8)

    def launch(x: torch.Tensor, s: torch.Tensor | None, capacity: int = 64, sms: int = 24) -> tuple[int, ...]:
        """Captures the prepared arguments that the kernel would get."""
        spec = receive_spec(x, s, None, False)
        received = spec.of([torch.empty_like(t) for t in spec.templates(capacity, x.device)])
        split = dispatch_split(sms, RANKS)
        endpoint.dispatch_cached(x, s, received, split, 7, plan)
        call, x_at, scales_at, slot_at, slot_scales_at, stream = launches.made[-1]
        assert (x_at, slot_at, stream) == (x.data_ptr(), received.x.data_ptr(), 7)
        assert scales_at == (0 if s is None else s.data_ptr())
        assert slot_scales_at == (0 if received.scales is None else received.scales.data_ptr())
        args = prepared[call]
        strides = (0, 0) if s is None else s.stride()
        columns = 0 if s is None else s.shape[1]
        row_bytes = x.shape[1] * x.element_size()
        roles = (split.total, split.remote, split.local)
        assert args == (*roles, TOKENS, columns, row_bytes, *strides, *plan.addresses(), capacity)
        return args

    calls: list[tuple[Any, ...]] = [
        (plain, None),
        (bytes_, scales(28, wide=56)),
        (bytes_, scales(56)),  # the same strides, other columns
        (bytes_, scales(14).t().contiguous().t()),
        (bytes_, scales(28).t().contiguous().t()),  # likewise
        (plain[:, :64].contiguous(), None),
        (plain.float(), None),
        (plain, None, 65),
        (plain, None, 64, 8),
        (plain, None, 64, 1),
    ]
    for call in calls:
        before = len(prepared)
        first = launch(*call)
        assert len(prepared) == before + 1
        assert launch(*call) == first
        assert len(prepared) == before + 1, "the same again is prepared no more"
    for call in reversed(calls):
        launch(*call)
