"""Weights gathered, activations sent down a pipeline.    torchrun --nproc-per-node 4 examples/beside.py"""

import argparse
import time

import torch
import torch.distributed as dist

from deepep import ElasticBuffer


def gathered_layers(buffer: ElasticBuffer, x: torch.Tensor, shards: list[torch.Tensor]) -> torch.Tensor:
    """Layers whose weights lie on all ranks, a share [H / R, H] on each. All are gathered at once, and each
    is waited for when its turn comes.
    """
    with buffer.agrs_new_session():
        under_way = [buffer.all_gather(shard) for shard in shards]
        for weight, wait in under_way:
            wait()
            x = torch.relu(x @ weight.flatten(0, 1).T)
    return x


def next_stage(buffer: ElasticBuffer, x: torch.Tensor) -> torch.Tensor:
    """A stage of a pipeline that is a ring: this one's output goes on, the one before's comes."""
    rank, ranks = buffer.rank_idx, buffer.num_ranks
    if ranks == 1:
        return x
    buffer.pp_send(x, (rank + 1) % ranks)
    came = torch.empty_like(x)
    buffer.pp_recv(came, (rank - 1) % ranks)
    return came


@torch.no_grad()
def run(args: argparse.Namespace, buffer: ElasticBuffer, device: torch.device) -> None:
    kind = {"device": device, "dtype": torch.bfloat16}
    share = -(-args.hidden // buffer.num_ranks)
    hidden = share * buffer.num_ranks
    shards = [torch.randn(share, hidden, **kind) / hidden**0.5 for _ in range(args.layers)]
    x = torch.randn(args.tokens, hidden, **kind)
    sizes = [tuple(shard.shape) for shard in shards]
    size = buffer.get_agrs_num_max_session_bytes(buffer.group, sizes, torch.bfloat16)
    buffer.agrs_set_config(size, args.layers)
    buffer.pp_set_config(x.numel() * x.element_size(), 2)
    started = time.perf_counter()
    for _ in range(args.steps):
        out = next_stage(buffer, gathered_layers(buffer, x, shards))
    float(out[0, 0])  # waits for the device
    rate = args.steps * args.tokens / (time.perf_counter() - started)
    print(f"rank {buffer.rank_idx}: out {list(out.shape)}, {rate:,.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256, help="rounded up to a multiple of the ranks")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    try:
        with ElasticBuffer(dist.group.WORLD, num_bytes=2 << 20, device="cpu") as buffer:
            run(args, buffer, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
