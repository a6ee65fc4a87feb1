"""Layout rules on the CPU: the typed face of `deepep._core`, the compiled rules of csrc/core.

The kernels run the same rules on the device. Tensors lend their memory; nothing is copied. Shapes use

    R ranks, E experts, L = E/R experts on a rank, K top-k, T tokens of a rank, H hidden,
    M most tokens of any rank, D nodes, N rows received.

Bad shapes and values raise ValueError naming the argument; a size that 64 bits cannot hold, OverflowError.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepep import _core

MAX_TOPK: int = _core.MAX_TOPK


def _view(tensor: Tensor | np.ndarray, name: str, *dtypes: torch.dtype) -> np.ndarray:
    """The contiguous CPU memory of `tensor` as numpy sees it, without a copy."""
    if isinstance(tensor, np.ndarray):
        tensor = torch.from_numpy(tensor)
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: got {tensor.dtype}; expected {' or '.join(str(d) for d in dtypes)}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous CPU tensor")
    return tensor.detach().numpy()


@dataclass(frozen=True)
class DispatchLayout:
    """What one rank's top-k choices mean for its peers; int32, as the public interface returns counts."""

    num_tokens_per_rank: Tensor  # [R] tokens that go to each rank, each once
    num_tokens_per_node: Tensor | None  # [D] tokens that go to each node, each once; None for one node
    num_tokens_per_expert: Tensor  # [E] top-k entries of each expert, duplicates included
    is_token_in_rank: Tensor  # [T, R] bool


def dispatch_layout(
    topk_idx: Tensor | np.ndarray, num_experts: int, num_ranks: int, ranks_per_node: int = 8
) -> DispatchLayout:
    """Counts and token-in-rank of `topk_idx` [T, K] (int32 or int64, -1 = no expert)."""
    idx = _view(topk_idx, "topk_idx", torch.int32, torch.int64)
    num_nodes = -(-num_ranks // ranks_per_node) if num_ranks > 0 and ranks_per_node > 0 else 0
    layout = DispatchLayout(
        num_tokens_per_rank=torch.empty(max(num_ranks, 0), dtype=torch.int32),
        num_tokens_per_node=torch.empty(num_nodes, dtype=torch.int32),
        num_tokens_per_expert=torch.empty(max(num_experts, 0), dtype=torch.int32),
        is_token_in_rank=torch.empty((len(idx), max(num_ranks, 0)), dtype=torch.bool),
    )
    assert layout.num_tokens_per_node is not None
    _core.dispatch_layout(
        idx,
        num_experts,
        num_ranks,
        ranks_per_node,
        layout.num_tokens_per_rank.numpy(),
        layout.num_tokens_per_node.numpy(),
        layout.num_tokens_per_expert.numpy(),
        layout.is_token_in_rank.numpy(),
    )
    if num_nodes > 1:
        return layout
    return DispatchLayout(
        layout.num_tokens_per_rank, None, layout.num_tokens_per_expert, layout.is_token_in_rank
    )


def nvl_buffer_size_hint(num_sms: int, recv_tokens: int, hidden_bytes: int, num_ranks: int) -> int:
    """Bytes of the scale-up buffer that `Config.get_nvl_buffer_size_hint` names; a multiple of 128.

    `recv_tokens` is the config's num_max_nvl_chunked_recv_tokens, `hidden_bytes` those of one row.
    """
    size: int = _core.queue_nvl_bytes(num_sms // 2, recv_tokens, hidden_bytes, num_ranks)
    return size


def rdma_buffer_size_hint(num_sms: int, recv_tokens: int, hidden_bytes: int, num_ranks: int) -> int:
    """Bytes of the scale-out buffer that `Config.get_rdma_buffer_size_hint` names; 0 within 8 ranks.

    `recv_tokens` is the config's num_max_rdma_chunked_recv_tokens, `hidden_bytes` those of one row.
    """
    size: int = _core.queue_rdma_bytes(num_sms // 2, recv_tokens, hidden_bytes, num_ranks)
    return size


def low_latency_rdma_size_hint(
    num_max_tokens: int, hidden: int, num_ranks: int, num_experts: int, num_topk: int = MAX_TOPK
) -> int:
    """Bytes of the fixed-slot buffer (csrc/core/low_latency_buffer.hpp): 2 epochs of R*M messages in and M*K rows back.

    Unlike a slot per (expert, token) this does not grow with `num_experts`, which clients pass all the same.
    Without `num_topk` the largest top-k is assumed.
    """
    if num_experts <= 0 or num_ranks <= 0 or num_experts % num_ranks:
        raise ValueError(f"num_experts: got {num_experts}; expected a multiple of num_ranks = {num_ranks}")
    size: int = _core.low_latency_bytes(num_max_tokens, hidden, num_ranks, num_topk)
    return size
