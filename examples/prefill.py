"""Prefill: FP8 rows, overlapped with a shared expert.    torchrun --nproc-per-node 4 examples/prefill.py"""

import argparse
import os
import time

import torch
import torch.distributed as dist

from deepep import Buffer
from deepep.formats import fp8_cast, fp8_uncast
from deepep.gate import group_limited_topk
from deepep.nn import GroupedSwiGLU, SwiGLU, apply_experts


def moe_layer(
    buffer: Buffer, x: torch.Tensor, logits: torch.Tensor, experts: GroupedSwiGLU, shared: SwiGLU, topk: int
) -> torch.Tensor:
    routing = group_limited_topk(logits, topk, num_groups=4, num_kept_groups=2)
    sent = buffer.dispatch(
        fp8_cast(x),  # (values, a scale per 128 channels)
        topk_idx=routing.topk_idx,
        topk_weights=routing.topk_weights,
        num_experts=logits.shape[1],  # the layout is worked out inside
        async_finish=True,
    )
    with sent.event:  # on leaving, the current stream waits for the rows
        beside = shared(x)  # meanwhile: whatever does not need them
    rows = fp8_uncast(*sent.recv_x).bfloat16()
    y = apply_experts(experts, rows, sent.recv_topk_idx, sent.recv_topk_weights)
    return buffer.combine(y, sent.handle, bias=beside).combined_x


@torch.no_grad()
def prefill(args: argparse.Namespace, buffer: Buffer, device: torch.device) -> None:
    kind = {"device": device, "dtype": torch.bfloat16}
    experts = GroupedSwiGLU(args.experts_per_rank, args.hidden, args.hidden // 2, **kind)
    shared = SwiGLU(args.hidden, args.hidden // 2, **kind)
    router = torch.randn(args.hidden, args.experts_per_rank * buffer.group_size, **kind) / args.hidden**0.5
    x = torch.randn(args.tokens, args.hidden, **kind)
    for step in range(args.steps + 1):
        if step <= 1:  # the first step warms up
            started = time.perf_counter()
        out = moe_layer(buffer, x, (x @ router).float(), experts, shared, args.topk)
        float(out[0, 0])  # waits for the device
    rate = args.steps * args.tokens / (time.perf_counter() - started)
    print(f"rank {buffer.rank}: out {list(out.shape)}, {rate:,.0f} tokens/s a layer", flush=True)


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
    try:
        with Buffer(dist.group.WORLD) as buffer:  # destroyed on leaving, also after an exception
            prefill(args, buffer, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
