"""Training: an MoE layer spread over ranks.    torchrun --nproc-per-node 4 examples/train.py"""

import argparse
import os
import time

import torch
import torch.distributed as dist

from deepep import Buffer
from deepep.nn import ExpertParallelMoE


def train_step(moe: ExpertParallelMoE, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    loss = (moe(x) - x.roll(1, dims=1)).float().square().mean()
    (loss / dist.get_world_size()).backward()  # tokens to their experts and back, then gradients
    for parameter in moe.replicated_parameters():  # router and shared expert; experts need no sum
        dist.all_reduce(parameter.grad)
    optimizer.step()
    optimizer.zero_grad()
    moe.rebalance()  # balances experts by bias, without an auxiliary loss
    return loss.detach()


def train(args: argparse.Namespace, buffer: Buffer, device: torch.device) -> None:
    moe = ExpertParallelMoE(
        buffer,
        hidden=args.hidden,
        expert_hidden=args.hidden // 2,
        num_experts=args.experts_per_rank * buffer.group_size,
        num_topk=args.topk,
        shared_hidden=args.hidden // 2,
        device=device,
        dtype=torch.bfloat16,
    )
    optimizer = torch.optim.AdamW(moe.parameters(), lr=args.lr)
    tokens = 0
    for step in range(args.steps):
        if step <= 1:  # the first step warms up
            started = time.perf_counter()
        length = args.tokens + buffer.rank  # ranks may bring different numbers of tokens, also none
        x = torch.randn(length, args.hidden, device=device, dtype=torch.bfloat16)
        loss = float(train_step(moe, optimizer, x))
        tokens += length if step else 0
        if buffer.rank == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)
    print(f"rank {buffer.rank}: {tokens / (time.perf_counter() - started):,.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=4096 if torch.cuda.is_available() else 64)
    parser.add_argument("--hidden", type=int, default=2048 if torch.cuda.is_available() else 128)
    parser.add_argument("--experts-per-rank", type=int, default=4)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        torch.manual_seed(dist.get_rank())
        with Buffer(dist.group.WORLD) as buffer:  # destroyed on leaving, also after an exception
            train(args, buffer, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
