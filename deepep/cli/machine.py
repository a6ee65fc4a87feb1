"""Facts of this machine that decide what runs on it and how fast, and the judge that says so in words.

`read_facts` looks; `findings` is a function of what it saw alone, and is tested with facts of machines that
nobody has at hand.
"""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from deepep.backends.cuda.memory.nvshmem4py import missing
from deepep.cli.cores import usable_cores
from deepep.cli.info import nvlinks
from deepep.runtime.capabilities import can_run, compiled

Level = Literal["cannot run", "slow", "look"]
LEAST_SHM = 1 << 30


@dataclass(frozen=True)
class GpuFacts:
    """One GPU, as torch sees it. ipc_error: what exporting its memory raised; empty if it went."""

    name: str
    capability: tuple[int, int]
    ipc_error: str = ""


@dataclass(frozen=True)
class NicFacts:
    """One RDMA device: its port's state and rate as the kernel words them ("ACTIVE", "400 Gb/sec")."""

    name: str
    state: str
    rate: str = ""
    link_layer: str = ""


@dataclass(frozen=True)
class MachineFacts:
    """Facts that were read from the system; sizes in bytes, None where there is no limit.

    kernels: compute capabilities of the kernels; () without any. emulator: deepep._emulator is installed.
    torch_cuda: CUDA's version that torch is built for, empty without. gpu_nodes: /dev/nvidia0, ...: GPUs the
    driver shows to this container.
    unreachable: pairs of GPUs without peer access. by_pcie: pairs whose way leads over PCIe or the CPUs.
    verbs_device: /dev/infiniband is there. peer_memory: a NIC may read GPU memory (nvidia_peermem is loaded).
    nvshmem_missing: what NVSHMEM's Python binding lacks here, in words; empty: nothing.
    """

    kernels: tuple[str, ...] = ("9.0a",)
    emulator: bool = True
    torch_cuda: str = ""
    gpu_nodes: tuple[str, ...] = ()
    gpus: tuple[GpuFacts, ...] = ()
    unreachable: tuple[tuple[int, int], ...] = ()
    by_pcie: tuple[tuple[int, int], ...] = ()
    nics: tuple[NicFacts, ...] = ()
    verbs_device: bool = False
    peer_memory: bool = False
    nvshmem_missing: str = ""
    shm_bytes: int | None = None
    memlock_bytes: int | None = None
    cores: int = 1
    in_container: bool = False
    host_name_error: str = ""
    expandable_segments: bool = False


@dataclass(frozen=True)
class Advice:
    """One thing about a machine. what: what cannot run or is slow; why, and what to do about it."""

    level: Level
    what: str
    why: str
    remedy: str = field(default="")


def findings(facts: MachineFacts) -> list[Advice]:
    """Everything that would be slow or cannot run on a machine of these facts, and why."""
    found = [*_kernels(facts), *_links(facts), *_nodes(facts), *_limits(facts)]
    if not facts.emulator:
        found.append(
            Advice("cannot run", "emulator", "deepep._emulator was not built", "build with DEEPEP_EMULATOR=1")
        )
    return found


def _kernels(facts: MachineFacts) -> list[Advice]:
    """Obstacles to CUDA kernels, each by itself."""
    found = []
    if facts.gpu_nodes and not facts.gpus:
        built = f"for CUDA {facts.torch_cuda}" if facts.torch_cuda else "without CUDA"
        why = f"the driver shows {', '.join(facts.gpu_nodes)}, torch (built {built}) sees no GPU"
        found.append(Advice("cannot run", "GPUs", why, "a torch build for this driver; CUDA_VISIBLE_DEVICES"))
    if not facts.gpus:
        return found
    if not facts.kernels:
        why = "deepep._cuda is not part of this installation"
        found.append(Advice("cannot run", "kernels", why, "a wheel with CUDA, or a build where nvcc is"))
    for number, gpu in enumerate(facts.gpus):
        if facts.kernels and not can_run(gpu.capability, facts.kernels):
            have, built = ".".join(map(str, gpu.capability)), ", ".join(facts.kernels)
            why = f"GPU {number} ({gpu.name}) has compute capability {have}, kernels are for {built}"
            remedy = "build with DEEPEP_CUDA_ARCHS; the reference serves it over NCCL"
            found.append(Advice("cannot run", "kernels", why, remedy))
        if "MIG" in gpu.name:
            why = f"GPU {number} is a MIG slice: slices reach no other's memory"
            found.append(Advice("cannot run", "kernels between GPUs", why, "whole GPUs"))
        elif gpu.ipc_error:
            why = f"GPU {number}: CUDA IPC is not permitted here ({gpu.ipc_error})"
            found.append(Advice("cannot run", "kernels between processes", why, "docker: --ipc=host"))
    if facts.expandable_segments and len(facts.gpus) > 1:
        why = "PYTORCH_CUDA_ALLOC_CONF sets expandable_segments: such memory has no CUDA IPC handle"
        found.append(Advice("look", "kernels between processes", why, "unset it if construction fails"))
    return found


def _links(facts: MachineFacts) -> list[Advice]:
    """Obstacles between GPUs."""
    found = []
    if facts.unreachable:
        why = f"no peer access between GPUs {_pairs(facts.unreachable)}"
        remedy = "the reference serves such groups over NCCL; nvidia-smi topo -p2p r says why"
        found.append(Advice("cannot run", "kernels between these GPUs", why, remedy))
    slow = [pair for pair in facts.by_pcie if pair not in facts.unreachable]
    if slow:
        why = f"GPUs {_pairs(slow)} have no NVLink between them: rows cross PCIe"
        found.append(Advice("slow", "dispatch and combine", why, "nvidia-smi topo -m shows the ways"))
    return found


def _nodes(facts: MachineFacts) -> list[Advice]:
    """Needs of several nodes that this one does not meet. Of interest only where there are GPUs."""
    if not facts.gpus:
        return []
    what, found = "several nodes", []
    active = [nic for nic in facts.nics if nic.state == "ACTIVE"]
    if not facts.nics:
        found.append(Advice("cannot run", f"{what} over RDMA", "this machine shows no RDMA device"))
    for nic in facts.nics:
        if nic.state != "ACTIVE":
            why = f"{nic.name}'s port is {nic.state}"
            found.append(Advice("slow" if active else "cannot run", what, why, "ibv_devinfo; the cable"))
    if active and not facts.verbs_device:
        why = f"{active[0].name} is active, but /dev/infiniband is not in this container"
        found.append(Advice("cannot run", what, why, "docker: --device=/dev/infiniband"))
    if active and facts.memlock_bytes is not None:
        why = f"at most {_size(facts.memlock_bytes)} may be locked: memory cannot be registered with a NIC"
        found.append(Advice("cannot run", what, why, "ulimit -l unlimited; docker: --ulimit memlock=-1"))
    if active and not facts.peer_memory:
        why = "nvidia_peermem is not loaded: unless the NIC takes DMA-BUF, rows pass through host memory"
        found.append(Advice("slow", what, why, "modprobe nvidia_peermem"))
    if facts.nvshmem_missing:
        found.append(Advice("cannot run", f"{what} with kernels", f"NVSHMEM: {facts.nvshmem_missing}"))
    return found


def _limits(facts: MachineFacts) -> list[Advice]:
    """Limits of the container or the host that communication meets."""
    found = []
    if facts.shm_bytes is not None and facts.shm_bytes < LEAST_SHM:
        why = (
            f"/dev/shm has {_size(facts.shm_bytes)} (a container's default is 64 MiB); NCCL, torch's workers"
        )
        why += " and the wire for tests map their rings there, and die of SIGBUS where it is full"
        found.append(Advice("look", "shared memory", why, "docker: --shm-size=8g or --ipc=host"))
    ranks = max(len(facts.gpus), 1)
    if facts.cores < 2 * ranks:
        why = f"{facts.cores} cores for {ranks} ranks: each has its own thread for communication"
        found.append(Advice("slow", "ranks", why, "two cores a rank; docker: --cpus, Slurm: --cpus-per-task"))
    if facts.host_name_error:
        why = f"this host's own name leads nowhere ({facts.host_name_error}): gloo and torchrun look it up"
        found.append(Advice("look", "rendezvous", why, "GLOO_SOCKET_IFNAME=eth0, or a line in /etc/hosts"))
    return found


def _pairs(pairs: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{a}-{b}" for a, b in pairs)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def read_facts() -> MachineFacts:
    """Looks at this machine. Exports a byte of each GPU's memory, to see whether that is permitted."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    return MachineFacts(
        kernels=compiled(),
        emulator=importlib.util.find_spec("deepep._emulator") is not None,
        torch_cuda=torch.version.cuda or "",
        gpu_nodes=tuple(sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))),
        gpus=tuple(_gpu(index) for index in range(count)),
        unreachable=tuple(pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)),
        by_pcie=pairs_by_pcie(nvlinks() if count > 1 else ""),
        nics=read_nics(Path("/sys/class/infiniband")),
        verbs_device=Path("/dev/infiniband").exists(),
        peer_memory=bool(re.search(r"^nv(idia_peermem|_peer_mem)\b", _text("/proc/modules"), re.MULTILINE)),
        nvshmem_missing=missing(),
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        memlock_bytes=_limit(resource.RLIMIT_MEMLOCK),
        cores=usable_cores(),
        in_container=Path("/.dockerenv").exists() or "container" in os.environ,
        host_name_error=_host_name_error(),
        expandable_segments="expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    )


def pairs_by_pcie(table: str) -> tuple[tuple[int, int], ...]:
    """Pairs of GPUs that nvidia-smi's table of links (`topo -m`) joins by something else than NVLink."""
    rows = {}
    for line in re.sub(r"\x1b\[[0-9;]*m", "", table).splitlines():
        words = line.split()
        if len(words) > 1 and re.fullmatch(r"GPU\d+", words[0]) and not re.fullmatch(r"GPU\d+", words[1]):
            rows[int(words[0][3:])] = words[1:]
    return tuple(
        (i, j)
        for i, ways in sorted(rows.items())
        for j in sorted(rows)
        if i < j < len(ways) and not re.fullmatch(r"NV\d+", ways[j])
    )


def read_nics(folder: Path) -> tuple[NicFacts, ...]:
    """RDMA devices of a folder laid out like /sys/class/infiniband, each with its first port."""
    found = []
    for device in sorted(folder.glob("*")):
        port = device / "ports" / "1"
        state = _text(str(port / "state")).partition(":")[2].strip() or "unknown"
        rate, layer = _text(str(port / "rate")).strip(), _text(str(port / "link_layer")).strip()
        found.append(NicFacts(device.name, state, rate, layer))
    return tuple(found)


def _gpu(index: int) -> GpuFacts:
    about, error = torch.cuda.get_device_properties(index), ""
    try:
        torch.zeros(1, dtype=torch.uint8, device=f"cuda:{index}").untyped_storage()._share_cuda_()
    except RuntimeError as problem:
        error = str(problem).partition("\n")[0]
    return GpuFacts(about.name, (about.major, about.minor), error)


def _limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def _host_name_error() -> str:
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError as error:
        return f"{socket.gethostname()}: {error.strerror or error}"
    return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
