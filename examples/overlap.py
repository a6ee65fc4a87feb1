"""Two micro-batches overlapped by hooks, timed.    torchrun --nproc-per-node 2 examples/overlap.py"""

import argparse
import itertools
import os
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from deepep import Buffer
from deepep.gate import sigmoid_topk

CUDA = torch.cuda.is_available()
SIZES = {"steps": (20, 2), "tokens": (128, 8), "hidden": (7168, 256), "experts": (256, 8), "gemm": (3072, 64)}


def overlapped(gemm: Callable, dispatch: Callable, combine: Callable, mark: Callable) -> None:
    """GEMMs stand for attention and experts of batches 0 and 1; `mark` ends a piece of the timeline."""
    mark("attention 0", gemm())
    sent0 = mark("dispatch 0, send", dispatch(0))
    mark("attention 1", gemm())
    mark("dispatch 0, receive", sent0.hook())
    sent1 = mark("dispatch 1, send", dispatch(1))
    mark("experts 0", gemm())
    mark("dispatch 1, receive", sent1.hook())
    back0 = mark("combine 0, send", combine(0, sent0.handle))
    mark("experts 1", gemm())
    mark("combine 0, receive", back0.hook())
    back1 = mark("combine 1, send", combine(1, sent1.handle))
    mark("next attention 0", gemm())
    mark("combine 1, receive", back1.hook())


def timeline(body: Callable, steps: int) -> dict[str, float]:
    """Microseconds of each piece that `body` marks: of its last step, which all ranks begin together."""
    now = (lambda: torch.cuda.current_stream().record_event(torch.cuda.Event(True))) if CUDA else time.time
    for _ in range(steps):
        dist.barrier()
        ends = [("", now())]
        body(lambda name, made=None: (ends.append((name, now())), made)[1])  # noqa: B023
        torch.cuda.synchronize() if CUDA else None
    took = (lambda a, b: 1e3 * a.elapsed_time(b)) if CUDA else (lambda a, b: 1e6 * (b - a))
    return {name: took(a, b) for (_, a), (name, b) in itertools.pairwise(ends)}


def run(buffer: Buffer, steps: int, tokens: int, hidden: int, experts: int, gemm: int) -> None:
    ranks, kind = buffer.group_size, {"device": "cuda" if CUDA else "cpu", "dtype": torch.bfloat16}
    xs, (a, b) = torch.randn(2, tokens, hidden, **kind), torch.randn(2, gemm, gemm, **kind)
    logits = torch.randn(2, tokens, experts, device=xs.device)
    routes = [sigmoid_topk(each, min(8, experts // 2))[:2] for each in logits]
    rows = torch.randn(experts // ranks, ranks * tokens, hidden, **kind)  # of the experts
    send = partial(buffer.low_latency_dispatch, return_recv_hook=True)
    back = partial(buffer.low_latency_combine, rows, return_recv_hook=True)
    calls = (lambda i: send(xs[i], routes[i][0], tokens, experts)), (lambda i, at: back(*routes[i], at))
    both = timeline(lambda mark: overlapped(lambda: a @ b, *calls, mark), steps)
    alone = sum(timeline(lambda mark: [mark(str(i), a @ b) for i in range(5)], steps).values())
    # Halves by themselves: ranks wait for each other before each GEMM, so that hooks find all rows there.
    apart = timeline(lambda mark: overlapped(lambda: (dist.barrier(), a @ b), *calls, mark), steps)
    halves, total = sum(us for name, us in apart.items() if "," in name), sum(both.values())
    pieces = "".join(f"{name:20}{us:10.1f} us\n" for name, us in both.items() if buffer.rank == 0)
    parts = f"GEMMs alone {alone:.0f}, sends and receives {halves:.0f}: {total / (alone + halves):.2f} x"
    print(f"{pieces}{total:.0f} us, {parts}; {2e6 * tokens / total:,.0f} tokens/s a layer", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, (on_gpu, on_cpu) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=on_gpu if CUDA else on_cpu)
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) if CUDA else None
    dist.init_process_group("nccl" if CUDA else "gloo")
    try:
        sizes = args.tokens, args.hidden, dist.get_world_size(), args.experts
        with Buffer(dist.group.WORLD, 0, Buffer.get_low_latency_rdma_size_hint(*sizes), True) as buffer:
            run(buffer, **vars(args))
    finally:
        dist.destroy_process_group()
