"""Grouped GEMMs on rows sorted by expert.    torchrun --nproc-per-node 4 examples/elastic.py"""

import argparse
import os
import time

import torch
import torch.distributed as dist

from deepep import ElasticBuffer
from deepep.gate import softmax_topk
from deepep.nn import GroupedSwiGLU, SwiGLU


def moe_layer(
    buffer: ElasticBuffer,
    x: torch.Tensor,
    logits: torch.Tensor,
    experts: GroupedSwiGLU,
    shared: SwiGLU,
    topk: int,
) -> torch.Tensor:
    routing = softmax_topk(logits, topk)
    sent = buffer.dispatch(
        x,
        routing.topk_idx,
        routing.topk_weights,
        num_experts=logits.shape[1],
        expert_alignment=128,  # every expert's rows begin at a multiple of it
        do_expand=True,  # one row for every token and expert
        do_zero_padding=True,
        async_with_compute_stream=True,
    )
    with sent.event:  # on leaving, the current stream waits for the rows
        beside = shared(x)
    counts = torch.tensor(sent.handle.num_recv_tokens_per_expert_list, device="cpu")
    y = experts(sent.recv_x, counts) * sent.recv_topk_weights.unsqueeze(1)
    return buffer.combine(y.bfloat16(), sent.handle, bias=beside).combined_x


@torch.no_grad()
def prefill(args: argparse.Namespace, buffer: ElasticBuffer, device: torch.device) -> None:
    kind = {"device": device, "dtype": torch.bfloat16}
    experts = GroupedSwiGLU(args.experts_per_rank, args.hidden, args.hidden // 2, **kind)
    shared = SwiGLU(args.hidden, args.hidden // 2, **kind)
    router = torch.randn(args.hidden, args.experts_per_rank * buffer.num_ranks, **kind) / args.hidden**0.5
    x = torch.randn(args.tokens, args.hidden, **kind)
    for step in range(args.steps + 1):
        if step <= 1:  # the first step warms up
            started = time.perf_counter()
        out = moe_layer(buffer, x, (x @ router).float(), experts, shared, args.topk)
        float(out[0, 0])  # waits for the device
    rate = args.steps * args.tokens / (time.perf_counter() - started)
    print(f"rank {buffer.rank_idx}: out {list(out.shape)}, {rate:,.0f} tokens/s a layer", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=4096 if torch.cuda.is_available() else 64)
    parser.add_argument("--hidden", type=int, default=7168 if torch.cuda.is_available() else 256)
    parser.add_argument("--experts-per-rank", type=int, default=8)
    parser.add_argument("--topk", type=int, default=8)
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    sizes = {"num_max_tokens_per_rank": args.tokens, "hidden": args.hidden, "num_topk": args.topk}
    try:
        with ElasticBuffer(dist.group.WORLD, **sizes) as buffer:  # destroyed on leaving
            prefill(args, buffer, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
