"""Times of ranks that join: a process takes a vacant rank again and again, beside ranks that stay.

    python tests/harness/joins.py --ranks 4 --count 20      # on GPUs: --backend cuda

Prints the medians and the longest of: `invite`; `admit`, whose newcomer has its interpreter and its libraries
loaded and reads the invitation from a file; the first low-latency dispatch with it; `dismiss`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import deepep
from deepep.sim import World

TOKENS, HIDDEN, TOPK, LOCAL = 8, 128, 2, 2
OPTIONS = {"low_latency_mode": True, "enable_shrink": True, "timeout": 60.0}


def call(buffer: Any) -> None:
    """A low-latency dispatch and combine."""
    experts, device = LOCAL * buffer.group_size, buffer.info.device
    x = torch.ones(TOKENS, HIDDEN, device=device).bfloat16()
    idx = (torch.arange(TOKENS, device=device)[:, None] + torch.arange(TOPK, device=device) * LOCAL) % experts
    rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, TOKENS, experts, use_fp8=False)
    buffer.low_latency_combine(rows, idx, torch.ones(TOKENS, TOPK, device=device), handle)[0].cpu()


def stay(ctx: Any, folder: str, last: int, count: int, backend: str) -> dict[str, list[float]]:
    """The members: invite and dismiss rank `last`, `count` times; seconds of each part."""
    buffer = deepep.Buffer(ctx.group, backend=backend, max_num_ranks=last + 1, **OPTIONS)
    call(buffer)
    took: dict[str, list[float]] = {"invite": [], "admit": [], "first call": [], "dismiss": []}

    def timed(what: str, work: Any) -> Any:
        began = time.perf_counter()
        result = work()
        took[what].append(time.perf_counter() - began)
        return result

    for number in range(count):
        invitation = timed("invite", lambda: buffer.invite([last]))
        if ctx.rank == 0:
            Path(folder, "new").write_text(invitation)
            os.rename(Path(folder, "new"), Path(folder, str(number)))
        timed("admit", lambda text=invitation: buffer.admit(text))
        timed("first call", lambda: call(buffer))
        timed("dismiss", lambda: buffer.dismiss([last]))
        call(buffer)
    buffer.destroy()
    return took


def come(ctx: Any, folder: str, last: int, count: int) -> None:
    """The newcomer: joins and is dismissed, `count` times."""
    torch.ones(1, device=ctx.device)  # its device is awake
    for number in range(count):
        path = Path(folder, str(number))
        while not path.exists():
            time.sleep(0.0005)
        buffer = deepep.Buffer.join(path.read_text(), last, timeout=60.0)
        call(buffer)
        buffer.dismiss([last])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4, help="with the newcomer")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--backend", choices=["reference", "cuda"], default="reference")
    arguments = parser.parse_args()
    last, kind = arguments.ranks - 1, "nccl" if arguments.backend == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder, World(last, kind) as members, World(1, kind) as newcomer:
        members.ensure_started()
        coming = newcomer.submit(come, folder, last, arguments.count, timeout=600)
        took = members.run(stay, folder, last, arguments.count, arguments.backend, timeout=600)[0]
        coming.results()
    print(f"{arguments.ranks} ranks, {arguments.count} times, milliseconds (median, longest)")
    for what, seconds in took.items():
        print(f"{what:10} {1000 * statistics.median(seconds):7.1f} {1000 * max(seconds):7.1f}")


if __name__ == "__main__":
    main()
