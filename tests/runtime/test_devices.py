"""Choice of the device of a Buffer: the argument, the environment, the machine; never the group's backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import deepep
from deepep.runtime import backends as registry
from deepep.runtime.control.transport import device_type_of, private_group
from deepep.runtime.devices import asked_device, default_device
from deepep.runtime.engine import EngineOptions
from deepep.sim import World

CPU = torch.device("cpu")
BOTH = ("cuda", "cpu")


def group_of_one() -> dist.ProcessGroup:
    return private_group(dist.HashStore(), 0, 1, 30.0, "cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`machine(gpus=...)`: how many GPUs this machine seems to have; the second is the current one."""

    def seems(gpus: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: gpus - 1)
        monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
        monkeypatch.setattr(dist, "is_nccl_available", lambda: gpus > 0)

    monkeypatch.delenv("DEEPEP_DEVICE", raising=False)
    return seems


@pytest.mark.parametrize(
    ("gpus", "given", "environment", "wanted"),
    [
        (0, None, "", None),
        (2, None, "", None),
        (2, "cpu", "", "cpu"),
        (2, "cpu", "cuda", "cpu"),
        (2, None, "cpu", "cpu"),
        (2, None, "cuda", "cuda:1"),
        (2, "cuda", "cpu", "cuda:1"),
        (2, torch.device("cuda", 1), "", "cuda:1"),
    ],
)
def test_the_argument_first_the_environment_second(
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    given: Any,
    environment: str,
    wanted: str | None,
) -> None:
    machine(gpus)
    monkeypatch.setenv("DEEPEP_DEVICE", environment)
    assert asked_device(given) == (None if wanted is None else torch.device(wanted))


@pytest.mark.parametrize(
    ("gpus", "given", "environment", "kind", "argument"),
    [
        (0, "cuda", "", deepep.RangeError, "device"),
        (0, None, "cuda", deepep.RangeError, "DEEPEP_DEVICE"),
        (2, "cuda:0", "", deepep.RangeError, "device"),
        (2, "gpu", "", deepep.RangeError, "device"),
        (2, None, "tpu", deepep.RangeError, "DEEPEP_DEVICE"),
        (2, "meta", "", deepep.RangeError, "device"),
        (2, 1, "", deepep.ArgumentTypeError, "device"),
        (2, [1, 2], "", deepep.ArgumentTypeError, "device"),
    ],
)
def test_what_cannot_be_is_refused(
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    given: Any,
    environment: str,
    kind: type[deepep.ArgumentError],
    argument: str,
) -> None:
    machine(gpus)
    monkeypatch.setenv("DEEPEP_DEVICE", environment)
    with pytest.raises(kind) as refused:
        asked_device(given)
    assert refused.value.argument == argument


def test_the_machine_decides_where_nobody_says(machine: Any) -> None:
    machine(0)
    assert default_device(BOTH) == CPU
    machine(2)
    assert default_device(BOTH) == torch.device("cuda", 1)
    assert default_device(("cpu",)) == CPU


def chosen(
    monkeypatch: pytest.MonkeyPatch, group: Any, name: str | None = None, device: Any = None
) -> tuple[str, torch.device]:
    """Backend and device of a Buffer on this group, where kernels would run if they were asked to."""
    able = (True, "as if there were kernels")
    kernels = registry.Backend("cuda", lambda: able, lambda group: able, None, device_types=("cuda",))
    monkeypatch.setitem(registry._backends, "cuda", kernels)
    backend, where = registry.choose(name, group, asked_device(device))
    return backend.name, where


def test_a_gloo_group_serves_cuda_tensors(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPEP_BACKEND", raising=False)
    machine(2)
    group, gpu = group_of_one(), torch.device("cuda", 1)
    assert chosen(monkeypatch, group) == ("cuda", gpu)
    assert chosen(monkeypatch, group, "reference") == ("reference", gpu)
    assert chosen(monkeypatch, group, device="cpu") == ("reference", CPU)
    assert chosen(monkeypatch, group, "emulator") == ("emulator", CPU)
    with pytest.raises(deepep.RangeError, match="emulator: it does not serve cuda tensors"):
        chosen(monkeypatch, group, "emulator", device="cuda")
    with pytest.raises(deepep.RangeError, match="cuda: it does not serve cpu tensors"):
        chosen(monkeypatch, group, "cuda", device="cpu")
    machine(0)
    assert chosen(monkeypatch, group, "reference") == ("reference", CPU)


def test_ranks_on_other_devices_disagree() -> None:
    here, there = (EngineOptions(None, 1.0, device=torch.device(name)) for name in ("cpu", "cuda"))
    assert here.statement() != there.statement()


class Served:
    """A group that serves devices of these types."""

    def __init__(self, *device_types: str) -> None:
        self._device_types = [torch.device(name) for name in device_types]


def test_words_travel_over_the_cpu_where_they_can() -> None:
    for served, wanted in ((("cuda",), "cuda"), (("cuda", "cpu"), "cpu"), (("cpu",), "cpu"), ((), "cpu")):
        group: Any = Served(*served)
        assert device_type_of(group) == wanted


def buffers_of_groups_without_a_name(ctx: Any) -> None:
    mixed = dist.new_group(backend="cpu:gloo")
    x, idx = torch.ones(4, 128).bfloat16(), torch.arange(4)[:, None] % ctx.num_ranks
    with deepep.Buffer(mixed, timeout=30.0) as buffer:
        assert buffer.info.device == CPU
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, ctx.num_ranks)
        received, *_ = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert)
        assert received.shape == (4, 128)


def test_a_group_of_several_backends(world_of: Any) -> None:
    world_of(2).run(buffers_of_groups_without_a_name)


class PythonStore(dist.Store):
    """A store of one process, in memory; all that c10d asks of a store, and no clone()."""

    def __init__(self) -> None:
        super().__init__()
        self.data: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        self.data[key] = value if isinstance(value, bytes) else str(value).encode()

    def get(self, key: str) -> bytes:
        return self.data[key]

    def add(self, key: str, amount: int) -> int:
        self.data[key] = str(int(self.data.get(key, b"0")) + amount).encode()
        return int(self.data[key])

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        expected = expected if isinstance(expected, bytes) else str(expected).encode()
        if self.data.get(key, b"") == expected:
            self.set(key, desired)
        return self.data.get(key, b"")

    def wait(self, keys: list[str], *timeout: Any) -> None:
        assert all(key in self.data for key in keys)

    def check(self, keys: list[str]) -> bool:
        return all(key in self.data for key in keys)

    def delete_key(self, key: str) -> bool:
        return self.data.pop(key, None) is not None

    def set_timeout(self, timeout: Any) -> None:
        pass


def test_a_store_written_in_python() -> None:
    store = PythonStore()  # kept: a group does not keep what is Python's of its store
    group = private_group(store, 0, 1, 30.0, "cpu")
    idx = torch.zeros(2, 1, dtype=torch.int64)
    with deepep.Buffer(group, device="cpu", timeout=30.0) as buffer:
        assert buffer.get_dispatch_layout(idx, 1)[0].tolist() == [2]
    del store  # which the library keeps, once it has it
    deepep.Buffer(group, device="cpu", timeout=30.0).destroy()
    group = private_group(PythonStore(), 0, 1, 30.0, "cpu")
    with pytest.raises(deepep.RangeError, match="whose store does not exist any more"):
        deepep.Buffer(group, device="cpu", timeout=30.0)


def on_a_fake_group(ctx: Any) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    with pytest.raises(deepep.RangeError, match="a fake group"):
        deepep.Buffer(dist.group.WORLD, timeout=30.0)


def test_a_fake_group_is_refused() -> None:
    with World(1) as world:
        world.run(on_a_fake_group)
