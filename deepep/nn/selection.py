"""The selection of every gate: the k largest of each row, as a stable sort has them."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep.nn import kernels
from deepep.nn.operators import operator


@operator("select_topk")
def select_topk(scores: Tensor, k: int) -> Tensor:
    """Indices [.., k] int64 of the k largest of scores [.., E], largest first, equal ones by index."""
    if not (scores.dtype == torch.float32 and kernels.serve(scores) and scores.numel()):
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    out = scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)
    kernels.launch(
        "select_topk",
        scores,
        num_tokens=scores.numel() // scores.shape[-1],
        num_experts=scores.shape[-1],
        num_topk=k,
        scores=scores,
        topk_idx=out,
    )
    return out


@select_topk.register_fake
def _(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)
