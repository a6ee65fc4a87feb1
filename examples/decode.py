"""Decode: low latency, two micro-batches in turn.    torchrun --nproc-per-node 4 examples/decode.py"""

import argparse
import os
import time

import torch
import torch.distributed as dist

from deepep import Buffer
from deepep.gate import sigmoid_topk

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x [T, H], topk_idx and topk_weights [T, K]


def moe_of_two(
    buffer: Buffer, first: Batch, second: Batch, weight: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One micro-batch computes while the rows of the other travel; meanwhile no SM waits for them."""
    (x0, idx0, weights0), (x1, idx1, weights1) = first, second
    experts = buffer.group_size * len(weight)
    how = {"use_fp8": False, "return_recv_hook": True}  # the call only sends, hook() receives
    sent0 = buffer.low_latency_dispatch(x0, idx0, most, experts, **how)
    x1 = torch.tanh(x1)  # stands for the attention of the other micro-batch
    sent0.hook()
    sent1 = buffer.low_latency_dispatch(x1, idx1, most, experts, **how)
    y0 = torch.bmm(sent0.recv_x, weight)  # [L, R * most, H]: of expert l, the first recv_count[l] rows
    sent1.hook()
    back0 = buffer.low_latency_combine(y0, idx0, weights0, sent0.handle, return_recv_hook=True)
    y1 = torch.bmm(sent1.recv_x, weight)
    back0.hook()
    back1 = buffer.low_latency_combine(y1, idx1, weights1, sent1.handle, return_recv_hook=True)
    out0 = torch.tanh(back0.combined_x)
    back1.hook()
    return out0, back1.combined_x


@torch.no_grad()
def decode(args: argparse.Namespace, buffer: Buffer, device: torch.device) -> None:
    most, local = args.tokens, args.experts_per_rank
    kind = {"device": device, "dtype": torch.bfloat16}
    weight = torch.randn(local, args.hidden, args.hidden, **kind) / args.hidden**0.5
    router = torch.randn(args.hidden, local * buffer.group_size, **kind) / args.hidden**0.5
    for step in range(args.steps + 1):
        if step <= 1:  # the first step warms up
            started = time.perf_counter()
        xs = torch.randn(2, most, args.hidden, **kind)  # ranks may bring fewer than `most`, also none
        batches = [(x, *sigmoid_topk((x @ router).float(), args.topk)[:2]) for x in xs]
        out, _ = moe_of_two(buffer, *batches, weight, most)
        float(out[0, 0])  # waits for the device
    rate = 2 * args.steps * most / (time.perf_counter() - started)
    print(f"rank {buffer.rank}: out {list(out.shape)}, {rate:,.0f} tokens/s a layer", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128 if torch.cuda.is_available() else 8)
    parser.add_argument("--hidden", type=int, default=7168 if torch.cuda.is_available() else 256)
    parser.add_argument("--experts-per-rank", type=int, default=4)
    parser.add_argument("--topk", type=int, default=4)
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        ranks = dist.get_world_size()
        experts = args.experts_per_rank * ranks
        size = Buffer.get_low_latency_rdma_size_hint(args.tokens, args.hidden, ranks, experts)
        with Buffer(dist.group.WORLD, num_rdma_bytes=size, low_latency_mode=True) as buffer:
            decode(args, buffer, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
