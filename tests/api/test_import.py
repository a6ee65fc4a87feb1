"""Importing deepep: quick, and without CUDA or compiled extensions. Being deep_ep for existing clients."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types

import pytest
import torch

import deepep


def test_light_and_without_extensions() -> None:
    code = """
import sys, torch
for name in ("deepep._core", "deepep._cuda", "deepep._emulator"):
    sys.modules[name] = None  # importing it raises ImportError
import deepep
heavy = {"matplotlib", "typer", "rich", "deepep.sim", "deepep.nn", "deepep.backends.reference.engine"}
print(sorted(heavy & set(sys.modules)))
from deepep.runtime import backends as registry
assert deepep.Buffer.get_dispatch_config(8).num_max_nvl_chunked_send_tokens == 6
assert [b.available()[0] for b in registry.backends() if b.name == "reference"] == [True]
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]"]


@pytest.fixture
def no_deep_ep(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Undoes afterwards what the test makes of deep_ep's modules."""
    for name in ("deep_ep", "deep_ep.utils", "deep_ep.buffer", "deep_ep_cpp"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.delitem(sys.modules, name)
    return monkeypatch


def test_as_deep_ep(no_deep_ep: pytest.MonkeyPatch) -> None:
    deepep.install_as_deep_ep()
    deepep.install_as_deep_ep()  # once more does nothing
    import deep_ep
    import deep_ep.buffer
    import deep_ep.utils
    import deep_ep_cpp
    from deep_ep import Buffer, Config, EventOverlap
    from deep_ep.utils import EventHandle, check_nvlink_connections

    assert deep_ep is deepep
    assert Buffer is deep_ep.buffer.Buffer is deepep.Buffer
    assert Config is deep_ep_cpp.Config is deepep.Config
    assert EventOverlap is deep_ep.utils.EventOverlap is deepep.EventOverlap
    assert EventHandle is deep_ep_cpp.EventHandle is deepep.EventHandle
    assert deep_ep.topk_idx_t is deep_ep_cpp.topk_idx_t is torch.int64
    check_nvlink_connections(None)
    assert importlib.util.find_spec("deep_ep") is not None  # how some clients look for it


def test_not_over_another_deep_ep(no_deep_ep: pytest.MonkeyPatch) -> None:
    no_deep_ep.setitem(sys.modules, "deep_ep", types.ModuleType("deep_ep"))
    with pytest.raises(RuntimeError, match="deep_ep has been imported"):
        deepep.install_as_deep_ep()


def test_public_names() -> None:
    for name in deepep.__all__:
        assert getattr(deepep, name) is not None
    with pytest.raises(AttributeError):
        _ = deepep.nothing
