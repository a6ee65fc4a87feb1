"""Traffic lanes: what they become for NVSHMEM, and why a buffer that sends by no NIC refuses them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness.rank_threads import Ranks

import deepep
from deepep.errors import ArgumentTypeError, MismatchError, RangeError
from deepep.runtime import backends as registry
from deepep.runtime.traffic_lanes import TrafficLanes


def test_they_become_variables() -> None:
    assert TrafficLanes().environment() == {}
    assert TrafficLanes(3, 104).environment() == {"NVSHMEM_IB_SL": "3", "NVSHMEM_IB_TRAFFIC_CLASS": "104"}
    assert TrafficLanes(service_level=0).environment() == {"NVSHMEM_IB_SL": "0"}
    assert TrafficLanes(traffic_class=0).statement() == {"service_level": -1, "traffic_class": 0}


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ((16, None), RangeError, "service_level: got 16; allowed: 0 to 15"),
        ((-1, None), RangeError, "service_level: got -1; allowed: 0 to 15"),
        ((None, 256), RangeError, "traffic_class: got 256; allowed: 0 to 255"),
        ((True, None), ArgumentTypeError, "service_level: got bool; allowed: an integer"),
        ((None, 1.5), ArgumentTypeError, "traffic_class: got float; allowed: an integer"),
    ],
)
def test_numbers_out_of_range_are_refused(given: tuple, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as refused:
        TrafficLanes.of(*given)
    assert str(refused.value) == text


@pytest.mark.parametrize("options", [{"service_level": 3}, {"traffic_class": 104}])
def test_a_buffer_that_sends_by_no_nic_says_why_not(options: dict[str, int]) -> None:
    (name, value), ranks = next(iter(options.items())), Ranks(1)
    with pytest.raises(RangeError) as refused:
        deepep.Buffer(ranks.groups[0], backend="reference", **options)
    why = "backend 'reference': rows travel by torch.distributed, which has its own settings"
    assert str(refused.value) == f"rank 0: {name}: got {value}; allowed: None: {why}"


def test_every_backend_has_a_reason_until_one_sends_by_a_nic() -> None:
    assert all(backend.no_lanes for backend in registry.backends())


def test_a_backend_with_lanes_gets_them_and_ranks_compare_them(monkeypatch: pytest.MonkeyPatch) -> None:
    able = replace(registry._backends["reference"], no_lanes="")
    monkeypatch.setitem(registry._backends, "reference", able)
    ranks = Ranks(2)

    def part(rank: int) -> TrafficLanes:
        with deepep.Buffer(ranks.groups[rank], backend="reference", service_level=3) as buffer:
            lanes = buffer._engine.info.options.lanes
        with pytest.raises(MismatchError, match="service_level: got "):
            deepep.Buffer(ranks.groups[rank], backend="reference", service_level=rank)
        return lanes

    assert ranks.run(part) == [TrafficLanes(service_level=3)] * 2


@pytest.mark.parametrize("reason", ["", "nothing crosses a NIC"])
def test_sl_idx_is_a_service_level_where_there_are_lanes(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    able = replace(registry._backends["reference"], no_lanes=reason)
    monkeypatch.setitem(registry._backends, "reference", able)
    ranks = Ranks(1)
    for given in ({}, {"sl_idx": 0}):  # 3 is V2's default: nobody has asked
        with deepep.ElasticBuffer(ranks.groups[0], 2 << 20, backend="reference", **given) as buffer:
            lanes = buffer._engine.info.options.lanes
        assert lanes.asked() == ({"service_level": 0} if given and not reason else {})
