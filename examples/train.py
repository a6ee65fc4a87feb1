"""Training: an MoE layer spread over ranks.    torchrun --nproc-per-node 4 examples/train.py"""

import torch
import torch.distributed as dist

from deepep import Buffer
from deepep.nn import ExpertParallelMoE

dist.init_process_group("gloo")  # "nccl" with CUDA tensors
rank, ranks = dist.get_rank(), dist.get_world_size()
buffer = Buffer(dist.group.WORLD)
moe = ExpertParallelMoE(buffer, hidden=256, expert_hidden=128, num_experts=16, num_topk=4, shared_hidden=128)
optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3)
for step in range(10):
    x = torch.randn(100 + rank, 256)  # ranks may bring different numbers of tokens, also none
    loss = (moe(x) - x.roll(1, dims=1)).square().mean()
    (loss / ranks).backward()  # tokens to their experts and back, then gradients the same ways
    for parameter in moe.replicated_parameters():  # router and shared expert; experts need no sum
        dist.all_reduce(parameter.grad)
    optimizer.step()
    optimizer.zero_grad()
    load = moe.rebalance()  # balances by bias, without an auxiliary loss
    if rank == 0:
        busiest = load.max() / load.float().mean()
        print(f"step {step}: loss {loss:.3f}, busiest expert {busiest:.2f}x the mean")
buffer.destroy()
dist.destroy_process_group()
