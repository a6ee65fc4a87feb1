"""Small ExpertParallelMoE layers, their tokens, and stand-ins for a buffer where a layer has only weights."""

from __future__ import annotations

from typing import Any

import torch

import deepep.nn as dnn

#: H, E, K.
HIDDEN, EXPERTS, TOPK = 16, 8, 3


def layer_on(buffer: Any, **options: Any) -> dnn.ExpertParallelMoE:
    sizes = {
        "hidden": HIDDEN,
        "expert_hidden": 8,
        "num_experts": EXPERTS,
        "num_topk": TOPK,
        "shared_hidden": 8,
    }
    return dnn.ExpertParallelMoE(buffer, **(sizes | options))


def tokens(rank: int, count: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count + rank, HIDDEN, generator=generator).to(dtype)


class Lone:
    """Stands for the buffer of a world of one rank, for its weights alone."""

    rank, group_size, group = 0, 1, None


class OnCuda(Lone):
    """Stands for a buffer of CUDA kernels."""

    class runtime:
        class info:
            backend, device_type = "cuda", "cuda"
