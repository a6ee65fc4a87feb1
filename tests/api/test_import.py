"""Importing deepep: quick, and without CUDA or compiled extensions. Being deep_ep for existing clients."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import types

import pytest
import torch

import deepep

pytestmark = pytest.mark.own_backend


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


INSTALLED = (
    *("deep_ep", "deep_ep._C", "deep_ep.buffer", "deep_ep.buffers", "deep_ep_cpp"),
    *("deep_ep.buffers.legacy", "deep_ep.buffers.elastic"),
    *("deep_ep.utils", *(f"deep_ep.utils.{name}" for name in ("envs", "event", "math", "testing"))),
)


@pytest.fixture
def no_deep_ep(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Undoes afterwards what the test makes of deep_ep's modules."""
    for name in INSTALLED:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
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


@pytest.mark.parametrize("name", INSTALLED)
def test_it_is_found_before_it_is_imported(no_deep_ep: pytest.MonkeyPatch, name: str) -> None:
    deepep.install_as_deep_ep()
    assert importlib.util.find_spec(name) is not None
    assert importlib.import_module(name) is sys.modules[name]
    parent, _, child = name.rpartition(".")
    if parent:
        assert getattr(importlib.import_module(parent), child) is sys.modules[name]


def test_v2_is_found(no_deep_ep: pytest.MonkeyPatch) -> None:
    """Clients choose V2 where they find it, by any of these."""
    deepep.install_as_deep_ep()
    import deep_ep
    from deep_ep import ElasticBuffer, EPHandle
    from deep_ep.buffers.elastic import ElasticBuffer as SameBuffer
    from deep_ep.buffers.elastic import EPHandle as SameHandle

    assert ElasticBuffer is SameBuffer is deep_ep.buffers.ElasticBuffer is deepep.ElasticBuffer
    assert EPHandle is SameHandle is deep_ep.buffers.EPHandle is deepep.EPHandle


def test_clients_find_what_is_there(no_deep_ep: pytest.MonkeyPatch) -> None:
    """V2's primitives beside the MoE, for those who look before they use them; and no module more."""
    deepep.install_as_deep_ep()
    import deep_ep

    assert importlib.util.find_spec("deep_ep.buffers.else_where") is None
    for name in ("engram_write", "engram_fetch", "pp_send", "pp_recv", "agrs_new_session", "all_gather"):
        assert hasattr(deep_ep.ElasticBuffer, name)


def test_modules_are_the_same_under_both_names(no_deep_ep: pytest.MonkeyPatch) -> None:
    """Twice the module would be twice its classes: an error of one is not caught by the name of the other."""
    deepep.install_as_deep_ep()
    for name in ("errors", "nn", "nn.exchange", "version"):
        here = importlib.import_module(f"deepep.{name}")
        assert importlib.util.find_spec(f"deep_ep.{name}") is not None
        there = importlib.import_module(f"deep_ep.{name}")
        no_deep_ep.delitem(sys.modules, f"deep_ep.{name}")
        assert there is here
        assert here.__spec__.name == here.__name__ == f"deepep.{name}"
    for name in ("deep_ep.nothing", "deep_ep.utils.nothing"):
        assert importlib.util.find_spec(name) is None


def test_its_version_is_found(no_deep_ep: pytest.MonkeyPatch) -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("deep_ep")
    deepep.install_as_deep_ep()
    deepep.install_as_deep_ep()
    for name in ("deep_ep", "deep-ep"):
        assert importlib.metadata.version(name) == deepep.__version__
    assert importlib.metadata.metadata("deep_ep")["Name"] == "deep_ep"
    assert [d for d in importlib.metadata.distributions() if d.metadata["Name"] == "deep_ep"] == []
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("deep_ep_else")


def test_what_tests_and_scripts_import(no_deep_ep: pytest.MonkeyPatch) -> None:
    deepep.install_as_deep_ep()
    from deep_ep.buffers.legacy import Buffer
    from deep_ep.utils.envs import init_dist
    from deep_ep.utils.event import EventOverlap
    from deep_ep.utils.math import align, calc_diff, ceil_div, per_token_cast_back, per_token_cast_to_fp8
    from deep_ep.utils.testing import bench

    assert Buffer is deepep.Buffer
    assert EventOverlap is deepep.EventOverlap
    assert callable(init_dist)
    assert (ceil_div(7, 2), align(7, 4), align(8, 4)) == (4, 8, 8)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scales = per_token_cast_to_fp8(x)
    assert (values.dtype, scales.shape) == (torch.float8_e4m3fn, (5, 2))
    # e4m3 has 3 bits of mantissa: an element is off by 1/16 at most, and so is the whole.
    assert calc_diff(per_token_cast_back(values, scales), x) < 1 / 256
    assert calc_diff(x, x) == 0.0
    assert calc_diff(x, -x) > 0.1
    with pytest.raises(deepep.RangeError, match="shape of x"):
        calc_diff(x, x[:1])
    calls = []
    mean, least, most = bench(lambda: calls.append(1), num_warmups=2, num_tests=3)
    assert len(calls) == 6
    assert 0 <= least <= mean <= most


def test_not_over_another_deep_ep(no_deep_ep: pytest.MonkeyPatch) -> None:
    no_deep_ep.setitem(sys.modules, "deep_ep", types.ModuleType("deep_ep"))
    with pytest.raises(RuntimeError, match="deep_ep has been imported"):
        deepep.install_as_deep_ep()


def test_public_names() -> None:
    for name in deepep.__all__:
        assert getattr(deepep, name) is not None
    with pytest.raises(AttributeError):
        _ = deepep.nothing
