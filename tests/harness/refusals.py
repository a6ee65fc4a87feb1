"""Calls that are refused: arguments of a good dispatch, and what a rank raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deepep import errors

#: R, the rank that does something wrong, T, K, E, H.
RANKS, BAD, TOKENS, TOPK, EXPERTS, HIDDEN = 3, 1, 4, 2, 6, 512


def high_throughput_arguments(buffer: Any, idx: torch.Tensor) -> dict[str, Any]:
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    return {
        "x": torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16),
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
        "topk_idx": idx,
        "topk_weights": torch.ones(TOKENS, TOPK),
    }


def raised(call: Callable[[], Any]) -> tuple[str, str, str, int | None]:
    """Type, message, argument and rank of what `call` raises."""
    try:
        call()
    except errors.ArgumentError as error:
        return type(error).__name__, str(error), error.argument, error.rank
    raise AssertionError("nothing was raised")
