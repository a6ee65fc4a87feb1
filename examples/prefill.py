"""Prefill: FP8 rows, overlapped.    torchrun --nproc-per-node 4 examples/prefill.py"""

import torch
import torch.distributed as dist

from deepep import Buffer
from deepep.gate import group_limited_topk
from deepep.reference.formats import fp8_cast, fp8_uncast

dist.init_process_group("gloo")  # "nccl" with CUDA tensors
buffer = Buffer(dist.group.WORLD)
tokens, hidden, experts = 300, 1024, 8 * dist.get_world_size()
x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
logits = torch.randn(tokens, experts)
topk_idx, topk_weights, _ = group_limited_topk(logits, 8, num_groups=4, num_kept_groups=2)
per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, experts)
received, local_idx, local_weights, counts, handle, arrived = buffer.dispatch(
    fp8_cast(x), None, per_rank, per_node, in_rank, per_expert, topk_idx, topk_weights, async_finish=True
)
with arrived:  # on leaving, the current stream waits for the rows
    shared = torch.nn.functional.silu(x)  # meanwhile: whatever does not need them
gain = local_weights.sum(1, keepdim=True)  # stands for this rank's experts, weighted and summed per row
y = (fp8_uncast(*received) * gain).bfloat16()
out, _, _ = buffer.combine(y, handle, bias=shared)
print(f"rank {dist.get_rank()}: {len(y)} rows came, rows per expert {counts}, out {list(out.shape)}")
buffer.destroy()
dist.destroy_process_group()
