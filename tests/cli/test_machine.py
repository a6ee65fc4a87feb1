"""Facts of machines: every obstacle is told by itself, and of a machine without any nothing is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepep.cli.cores import usable_cores
from deepep.cli.machine import (
    GpuFacts,
    MachineFacts,
    NicFacts,
    findings,
    pairs_by_pcie,
    read_facts,
    read_nics,
)

H200 = GpuFacts("NVIDIA H200", (9, 0))
WELL = MachineFacts(
    torch_cuda="13.0",
    gpu_nodes=("/dev/nvidia0", "/dev/nvidia1"),
    gpus=(H200, H200),
    nics=(NicFacts("mlx5_0", "ACTIVE", "400 Gb/sec (4X NDR)", "InfiniBand"),),
    verbs_device=True,
    peer_memory=True,
    shm_bytes=64 << 30,
    cores=64,
)
WITHOUT_GPUS = MachineFacts(shm_bytes=8 << 30, cores=2)
DOWN = NicFacts("mlx5_1", "DOWN")


def test_nothing_is_said_of_a_machine_without_obstacles() -> None:
    assert findings(WELL) == []
    assert findings(WITHOUT_GPUS) == []


@pytest.mark.parametrize(
    ("changed", "level", "words"),
    [
        ({"kernels": ()}, "cannot run", "deepep._cuda"),
        ({"emulator": False}, "cannot run", "deepep._emulator"),
        ({"gpus": (H200, GpuFacts("NVIDIA A100", (8, 0)))}, "cannot run", "GPU 1 (NVIDIA A100) has compute"),
        ({"gpus": (GpuFacts("H200 MIG 1g.18gb", (9, 0)),)}, "cannot run", "MIG"),
        ({"gpus": (replace(H200, ipc_error="denied"), H200)}, "cannot run", "GPU 0: CUDA IPC"),
        ({"gpus": (), "torch_cuda": ""}, "cannot run", "torch (built without CUDA) sees no GPU"),
        ({"unreachable": ((0, 1),)}, "cannot run", "no peer access between GPUs 0-1"),
        ({"by_pcie": ((0, 1),)}, "slow", "GPUs 0-1 have no NVLink"),
        ({"expandable_segments": True}, "look", "expandable_segments"),
        ({"nics": ()}, "cannot run", "no RDMA device"),
        ({"nics": (*WELL.nics, DOWN)}, "slow", "mlx5_1's port is DOWN"),
        ({"nics": (DOWN,)}, "cannot run", "mlx5_1's port is DOWN"),
        ({"verbs_device": False}, "cannot run", "/dev/infiniband"),
        ({"memlock_bytes": 8 << 20}, "cannot run", "at most 8 MiB may be locked"),
        ({"peer_memory": False}, "slow", "nvidia_peermem"),
        ({"nvshmem_missing": "not installed: cuda.core"}, "cannot run", "NVSHMEM: not installed: cuda.core"),
        ({"shm_bytes": 64 << 20}, "look", "/dev/shm has 64 MiB"),
        ({"cores": 3}, "slow", "3 cores for 2 ranks"),
        ({"host_name_error": "pod-7: unknown"}, "look", "pod-7"),
    ],
)
def test_one_obstacle_is_told_and_nothing_else(changed: dict[str, Any], level: str, words: str) -> None:
    found = findings(replace(WELL, **changed))
    assert [advice.level for advice in found] == [level], found
    assert words in found[0].why


def test_a_pair_that_cannot_reach_is_not_called_slow_as_well() -> None:
    found = findings(replace(WELL, unreachable=((0, 1),), by_pcie=((0, 1),)))
    assert [advice.level for advice in found] == ["cannot run"]


def test_nics_and_nvshmem_do_not_concern_a_machine_without_gpus() -> None:
    assert findings(replace(WITHOUT_GPUS, nics=(DOWN,), memlock_bytes=1 << 16)) == []


TOPOLOGY = """\
	\x1b[4mGPU0	GPU1	GPU2	NIC0	CPU Affinity	NUMA Affinity\x1b[0m
GPU0	 X 	NV18	SYS	PIX	0-63	0
GPU1	NV18	 X 	PHB	SYS	0-63	0
GPU2	SYS	PHB	 X 	SYS	64-127	1
NIC0	PIX	SYS	SYS	 X
"""


def test_pairs_without_nvlink_are_read_off_the_table() -> None:
    assert pairs_by_pcie(TOPOLOGY) == ((0, 2), (1, 2))
    assert pairs_by_pcie("GPU0	 X 	NV18\nGPU1	NV18	 X \n") == ()
    assert pairs_by_pcie("nvidia-smi did not answer within 30 s") == ()


def test_nics_are_read_off_the_folder(tmp_path: Path) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE\n"), ("mlx5_1", "1: DOWN\n")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
        (port / "link_layer").write_text("Ethernet\n")
    (tmp_path / "odd").mkdir()
    found = read_nics(tmp_path)
    assert [(nic.name, nic.state) for nic in found] == [
        *(("mlx5_0", "ACTIVE"), ("mlx5_1", "DOWN"), ("odd", "unknown")),
    ]
    assert found[0] == NicFacts("mlx5_0", "ACTIVE", "400 Gb/sec (4X NDR)", "Ethernet")
    assert read_nics(tmp_path / "none") == ()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu.max": "100000 0\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_a_containers_share_of_the_cores_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == cores


def test_this_machine_can_be_read() -> None:
    facts = read_facts()
    assert facts.cores >= 1
    assert len(facts.gpus) <= max(len(facts.gpu_nodes), len(facts.gpus))
    findings(facts)
