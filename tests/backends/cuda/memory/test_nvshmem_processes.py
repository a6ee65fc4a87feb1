"""NVSHMEM's end with its process, on the stand-in; and nvshmem4py itself, which needs GPUs, not run yet:

python -m pytest -m gpu tests/backends/cuda/memory/test_nvshmem_processes.py
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness.sources import ROOT

from deepep.backends.cuda.memory import nvshmem4py
from deepep.sim.links import loopverbs
from deepep.sim.links.hosts import WireOptions, run_on_wire

AT_EXIT = """
import sys, weakref
import deepep, torch.distributed as dist
from deepep.backends.cuda.memory.nvshmem import THIS_PROCESS
from deepep.backends.cuda.memory.store_exchange import StoreExchange
print("imported:", [name for name in ("nvshmem", "cuda.core", "cuda.bindings") if name in sys.modules])
import pytest
from harness.sources import ROOT
from harness.stand_in_nvshmem import StandIn

class Buffer: pass
stand_in = StandIn()
stand_in.install(pytest.MonkeyPatch())
pe = stand_in.enter()
exchange = StoreExchange(dist.HashStore(), "x", 0, 1, 60.0)
opened = THIS_PROCESS.open(exchange, 0, 1, device_index=0, num_bytes=512)
buffer = Buffer()
weakref.finalize(buffer, lambda: print("buffer", pe.calls))
real, core = stand_in.finalize, sys.modules["nvshmem.core"]
core.finalize = lambda: (real(), print("process", pe.calls, pe.status))
"""


def test_it_ends_with_the_process_behind_the_buffers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=300, cwd=ROOT / "tests"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "imported: []",
        "buffer ['init', 'tensor']",
        "process ['init', 'tensor', 'free_tensor', 'finalize'] 1",
    ]


ONE_PE = """
import torch, torch.distributed as dist
from deepep.backends.cuda.memory.nvshmem import THIS_PROCESS
from deepep.backends.cuda.memory.store_exchange import StoreExchange
exchange = StoreExchange(dist.HashStore(), "gpu", 0, 1, 60.0)
opened = THIS_PROCESS.open(exchange, 0, 1, device_index=0, num_bytes=1 << 20)
part = opened.carve(exchange, 4096)
part.memory.fill_(7)
assert part.memory.is_cuda and int(part.memory.sum()) == 7 * 4096
assert opened.num_pes == 1 and part.pes == (0,)
"""


@pytest.mark.gpu
def test_the_real_one_starts_carves_and_ends() -> None:
    """One PE, in a process of its own: it cannot be started twice."""
    if reason := nvshmem4py.missing():
        pytest.skip(reason)
    done = subprocess.run([sys.executable, "-c", ONE_PE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


TWO_DOMAINS = """
import os, sys, torch, torch.distributed as dist
from deepep.backends.cuda.memory import nvshmem4py
from deepep.backends.cuda.memory.nvshmem import THIS_PROCESS
from deepep.backends.cuda.memory.store_exchange import StoreExchange
from deepep.runtime.control.transport import store_of
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
index = rank % torch.cuda.device_count()
torch.cuda.set_device(index)
dist.init_process_group("gloo", rank=rank, world_size=size)
exchange = StoreExchange(store_of(dist.group.WORLD), "gpu", rank, size, 60.0)
if sys.argv[1] == "join":
    os.environ["NVSHMEM_IB_ENABLE_RELAXED_ORDERING"] = "0"
    users = nvshmem4py.Nvshmem4py(index)
    uid = exchange(users.unique_id() if rank == 0 else b"")[0]
    users.start(uid, rank, size)
opened = THIS_PROCESS.open(exchange, rank, size, device_index=index, num_bytes=1 << 20)
assert (opened.pe, opened.num_pes, opened.is_counted) == (rank, size, sys.argv[1] == "start")
part = opened.carve(exchange, 4096)
core = opened._binding._core
try:
    mapped = core.get_peer_tensor(opened.slab, 1 - rank)
except Exception:
    mapped = None
assert mapped is None or mapped.data_ptr() == 0  # domains share no memory
part.memory.fill_(rank + 1)
torch.cuda.synchronize()
if sys.argv[1] == "join":
    opened.end()
    users.end()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["start", "join"])
def test_the_real_one_between_two_domains_without_a_nic(how: str) -> None:
    """Two processes as two hosts, over the wire; they end without a hang or a crash."""
    reason = nvshmem4py.missing() or loopverbs.why_not()
    if reason:
        pytest.skip(reason)
    lines: list[tuple[int, str]] = []
    result = run_on_wire(
        WireOptions(ranks=2, ranks_per_domain=1, deadline=240.0),
        [sys.executable, "-c", TWO_DOMAINS, how],
        lambda rank, line: lines.append((rank, line)),
    )
    assert result.statuses == [0, 0], lines
