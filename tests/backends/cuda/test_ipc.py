"""Handles that name a heap to another process: bytes that are parsed field by field; no GPU is needed."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, fields
from typing import Any

import pytest
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
    event=st.binary(max_size=64),
    event_sync=st.booleans(),
)
ONE = HeapHandle(1 << 30, 1 << 30, 512, b"\x01\xff" * 33, b"\0" * 64, True)


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
