"""Handles that name a heap to another process: bytes that are parsed field by field; no GPU is needed."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepep.backends.cuda.memory.ipc import HeapHandle

NUMBER = st.integers(0, 2**63 - 1)
HANDLES = st.builds(
    HeapHandle,
    num_bytes=NUMBER,
    storage_bytes=NUMBER,
    offset=NUMBER,
    memory=st.binary(max_size=200),
)
ONE = HeapHandle(1 << 30, 1 << 30, 512, b"\x01\xff" * 33)


@given(HANDLES)
def test_a_handle_comes_back_as_it_was(handle: HeapHandle) -> None:
    assert HeapHandle.decode(handle.encode()) == handle


@given(st.binary(max_size=300))
def test_other_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="heap handle"):
        HeapHandle.decode(raw)


def test_a_pickle_is_refused_and_never_run() -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("unpickled",)

    for raw in (pickle.dumps(Trap()), pickle.dumps(asdict(ONE))):
        with pytest.raises(ValueError, match="heap handle"):
            HeapHandle.decode(raw)


@pytest.mark.parametrize("name", [field.name for field in fields(HeapHandle)])
@pytest.mark.parametrize("value", [None, "xyz", -1, 1 << 63, 2.0, [], "ab" * 5000])
def test_a_field_of_another_kind_is_refused(name: str, value: Any) -> None:
    values = json.loads(ONE.encode())
    with pytest.raises(ValueError, match=r"heap handle|hexadecimal"):
        HeapHandle.decode(json.dumps({**values, name: value}).encode())
    with pytest.raises(ValueError, match="heap handle"):
        HeapHandle.decode(json.dumps({k: v for k, v in values.items() if k != name}).encode())
    with pytest.raises(ValueError, match="heap handle"):
        HeapHandle.decode(json.dumps({**values, "more": 1}).encode())


def test_a_heap_is_mapped_without_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch never destroys an event that it has opened: heaps that are made anew would use them up."""
    heap, done, opened = torch.zeros(512, dtype=torch.uint8), [], []
    exported = (0, b"memory", 512, 0, b"counter", 7, b"event" * 9, True)  # as torch exports: with an event

    class Storage:
        def _share_cuda_(self) -> tuple[Any, ...]:
            done.append("exported")
            return exported

    class Stream:
        def synchronize(self) -> None:
            done.append("waited")

    def open_storage(*given: Any) -> torch.UntypedStorage:
        opened.append(given)
        return heap.untyped_storage()

    class Heap:
        device = torch.device("cpu")

        def storage_offset(self) -> int:
            return 0

        def untyped_storage(self) -> Storage:
            return Storage()

        def numel(self) -> int:
            return 512

    monkeypatch.setattr(torch.UntypedStorage, "_release_ipc_counter_cuda", lambda *given: done.append(given))
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", open_storage)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    handle = HeapHandle.decode(HeapHandle.export(Heap()).encode())  # type: ignore[arg-type]
    assert done == ["exported", (b"counter", 7), "waited"]
    assert handle.map_here(torch.device("cpu", 0)).data_ptr() == heap.data_ptr()
    ((_, memory, size, offset, *_, event, waits),) = opened
    assert (memory, size, offset) == (b"memory", 512, 0)
    assert waits is False
    assert event == bytes(64)
