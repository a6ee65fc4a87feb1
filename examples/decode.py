"""Decode: low latency, with receive hooks.    torchrun --nproc-per-node 4 examples/decode.py"""

import torch
import torch.distributed as dist

from deepep import Buffer
from deepep.gate import sigmoid_topk

dist.init_process_group("gloo")  # "nccl" with CUDA tensors
ranks, most, hidden = dist.get_world_size(), 64, 512
experts, local = 4 * ranks, 4
size = Buffer.get_low_latency_rdma_size_hint(most, hidden, ranks, experts)
buffer = Buffer(dist.group.WORLD, num_rdma_bytes=size, low_latency_mode=True, num_qps_per_rank=local)
weight = torch.randn(local, hidden, hidden, dtype=torch.bfloat16) / hidden**0.5
for step in range(3):
    x = torch.randn(most - dist.get_rank(), hidden, dtype=torch.bfloat16)
    topk_idx, topk_weights, _ = sigmoid_topk(torch.randn(len(x), experts), 4)
    rows, count, handle, _, receive = buffer.low_latency_dispatch(
        x, topk_idx, most, experts, use_fp8=False, return_recv_hook=True
    )
    attention = torch.softmax(x.float(), dim=1)  # the other micro-batch: nothing here occupies the GPU
    receive()
    y = torch.bmm(rows, weight)  # rows of expert e: the first count[e] of [ranks * most]
    out, _, receive = buffer.low_latency_combine(y, topk_idx, topk_weights, handle, return_recv_hook=True)
    attention = torch.softmax(attention, dim=1)
    receive()
    print(f"rank {dist.get_rank()} step {step}: rows per expert {count.tolist()}, out {list(out.shape)}")
buffer.destroy()
dist.destroy_process_group()
