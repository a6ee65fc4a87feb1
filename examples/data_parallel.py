"""Data parallelism, FP8 gradients.    torchrun --nproc-per-node 4 examples/data_parallel.py"""

import argparse
import os
import time

import torch
import torch.distributed as dist

import deepep


def build(hidden: int, device: torch.device) -> deepep.DistributedDataParallel:
    layers = [torch.nn.Linear(hidden, 4 * hidden), torch.nn.GELU(), torch.nn.Linear(4 * hidden, hidden)]
    model = torch.nn.Sequential(*layers).to(device)
    deepep.set_config(compression=True, topology="Hierarchical")  # FP8 between hosts, BF16 inside
    return deepep.DistributedDataParallel(model)  # torch's, but for how gradients travel


def train(args: argparse.Namespace, device: torch.device) -> None:
    model = build(args.hidden, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    started = time.perf_counter()
    for step in range(args.steps):
        x = torch.randn(args.tokens, args.hidden, device=device)
        loss = (model(x) - x.roll(1, dims=1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(mean := loss.detach() / dist.get_world_size())
        if dist.get_rank() == 0:
            print(f"step {step}: loss {float(mean):.4f}", flush=True)
    report = model.report()
    per_step = report["bytes_sent"] / args.steps / sum(p.numel() * 4 for p in model.parameters())
    rate = args.steps * args.tokens / (time.perf_counter() - started)
    print(
        f"rank {dist.get_rank()}: {rate:,.0f} tokens/s, {per_step:.2f} of the gradients' bytes sent",
        flush=True,
    )
    model.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        torch.manual_seed(dist.get_rank())
        with deepep.optimize():  # the default group's own all-reduces: exact, the same bits on any topology
            train(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
