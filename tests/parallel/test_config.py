"""Options of data parallelism: what is allowed, where they come from, and the plans that follow from them."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import deepep
from deepep.collectives import ReductionPlan
from deepep.errors import ArgumentError, ArgumentTypeError, RangeError
from deepep.parallel.config import ParallelConfig
from deepep.parallel.planning import plan_of


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepep.parallel.config._default", None)
    monkeypatch.delenv("DEEPEP_PROBE_SECONDS", raising=False)


def test_the_announced_call() -> None:
    before = deepep.set_config(compression=True, topology="Hierarchical")
    assert before == ParallelConfig()
    assert deepep.get_config() == ParallelConfig(compression="auto", topology="hierarchical")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"compresion": True}, "did you mean compression"),
        ({"kind": 3}, "option: got 'kind'; allowed: compression, topology"),
        ({"compression": "fp9"}, "did you mean fp8"),
        ({"compression": 3}, "compression: got int"),
        ({"topology": "Hierarchic"}, "did you mean hierarchical"),
        ({"topology": 1}, "topology: got int"),
        ({"compression": "fp8", "topology": "ring"}, "others round at every rank"),
        ({"compression": True, "topology": "Tree"}, "others round at every rank"),
        ({"rounding": "up"}, "allowed: stochastic, nearest"),
        ({"reproducible": 1}, "reproducible: got int"),
        ({"min_compressed_bytes": -1}, "min_compressed_bytes: got -1"),
        ({"groups": [[0], []]}, "groups"),
        ({"timeout": 0}, "timeout: got 0"),
        ({"topology": "plan.json"}, None),
    ],
)
def test_what_means_nothing_is_refused(changes: dict[str, Any], match: str | None) -> None:
    with pytest.raises((ArgumentError, FileNotFoundError), match=match):
        deepep.set_config(**changes)
    assert deepep.get_config() == ParallelConfig()


def test_a_block_has_options_of_its_own() -> None:
    deepep.set_config(compression="bf16")
    seen = []
    with deepep.configured(compression="fp8", seed=3) as config:
        assert deepep.get_config() is config
        other = threading.Thread(target=lambda: seen.append(deepep.get_config().compression))
        other.start()
        other.join()
        with deepep.configured(seed=4):
            assert (deepep.get_config().compression, deepep.get_config().seed) == ("fp8", 4)
    assert deepep.get_config().compression == "bf16"
    assert seen == ["bf16"]


def test_the_environment_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPEP_COMPRESSION", "fp16")
    monkeypatch.setenv("DEEPEP_TOPOLOGY", "Direct")
    assert deepep.get_config() == ParallelConfig(compression="fp16", topology="direct")
    deepep.set_config(compression=False)
    assert deepep.get_config().compression == "off"
    monkeypatch.setenv("DEEPEP_TIMEOUT", "7")
    assert deepep.get_config().seconds == 7


def test_a_plan_may_be_pinned(tmp_path: Path) -> None:
    plan = ReductionPlan("ring", "plain", groups=((1, 0),))
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        config = ParallelConfig(topology=given)
        assert plan_of(config, 10, torch.float32, ["a", "a"]) == plan


def test_plans_follow_from_size_dtype_and_hosts() -> None:
    one, two = ["a"] * 4, ["a", "b", "a", "b"]
    config = ParallelConfig(compression=True)
    large, small = 25 << 20, 4096

    def plan(size: int, dtype: torch.dtype, hosts: list[str], **changes: Any) -> tuple[str, str, str]:
        made = plan_of(ParallelConfig(**{"compression": True, **changes}), size, dtype, hosts)
        return made.schedule, made.codec, made.inner

    assert plan(large, torch.float32, one) == ("direct", "fp8", "")
    assert plan(large, torch.float32, two) == ("hierarchical", "fp8", "bf16")
    assert plan_of(config, large, torch.float32, two).groups == ((0, 2), (1, 3))
    assert plan(small, torch.float32, two) == ("oneshot", "fixed32", "")
    assert plan(small, torch.float32, two, min_compressed_bytes=0) == ("oneshot", "fp8", "")
    assert plan(large, torch.float64, one)[1] == "fixed32"
    assert plan(large, torch.float32, ["a"]) == ("oneshot", "plain", "")
    assert plan(large, torch.float32, one, compression=False, reproducible=False)[1] == "plain"
    assert (
        plan(large, torch.float32, one, topology="hierarchical", groups=[[0, 1], [2, 3]])[0] == "hierarchical"
    )


def test_wrong_types_are_refused_before_anything_is_built() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ArgumentTypeError, match="config: got dict"):
        deepep.DistributedDataParallel(model, config={})
    with pytest.raises(RangeError, match="gradient: got 'max'"):
        deepep.DistributedDataParallel(model, gradient="max")
    with pytest.raises(ArgumentTypeError, match="target: got str"):
        deepep.optimize("model")
    with pytest.raises(deepep.ModeError, match="init_process_group"):
        deepep.optimize()


def test_several_devices_and_one_process_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    model = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="torchrun --nproc-per-node 4"):
        wrapped = deepep.DistributedDataParallel(model, device_ids=[0, 1, 2, 3])
    assert isinstance(wrapped, torch.nn.DataParallel)
    assert wrapped(torch.ones(1, 2)).shape == (1, 2)


def test_a_rank_takes_the_device_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepep.parallel import devices

    chosen: list[Any] = []
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(model, "to", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for ids in ([4, 7], ["cuda:4", "cuda:7"]):
        assert devices.device_of_this_rank(model, ids) == 7
    assert chosen == [torch.device("cuda", 7)] * 4
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RangeError, match="an id for each local rank: this is 2"):
        devices.device_of_this_rank(model, [4, 7])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="torch sees no CUDA device"):
        devices.device_of_this_rank(model, [4, 7])


def test_importing_the_library_imports_none_of_it() -> None:
    code = "import sys, deepep; assert not [m for m in sys.modules if m.startswith('deepep.parallel')]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
