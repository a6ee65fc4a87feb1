"""A Mixture-of-Experts layer whose experts are spread over the ranks of a Buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from deepep.errors import RangeError, ShapeError
from deepep.gate import sigmoid_topk
from deepep.nn.buffers import BufferLike, buffer_number, buffer_of
from deepep.nn.exchange import combine, dispatch
from deepep.nn.experts import GroupedSwiGLU, SwiGLU, expand_rows, expert_rows, reduce_rows
from deepep.nn.router import Gate, Router


class GroupedExperts(Protocol):
    """This rank's experts: a module like GroupedSwiGLU."""

    num_local_experts: int

    def __call__(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [P, H] sorted by local expert, counts [L] int64 on the CPU -> [P, H]."""


class ExpertParallelMoE(nn.Module):
    """Router, dispatch, this rank's grouped SwiGLU experts, combine; optionally a shared expert beside them.

        y = sum over the top-k experts e of a token of  weight_e * expert_e(x)   (+ shared(x))

    Every rank holds the router and the shared expert whole and `num_experts / R` experts (rank r has
    experts r * L to (r + 1) * L - 1). Weights are drawn per expert from `seed`: the same model for any
    number of ranks.

    Args:
        buffer: the deepep.Buffer to exchange through. The layer does not keep it alive. hidden: H.
        expert_hidden: F, width of an expert. num_experts: E, a multiple of R. num_topk: K. gate: maps
        (logits [T, E], K, bias=[E]) to a Routing; deepep.gate's functions, or functools.partial of them.
        shared_hidden: width of the shared expert; 0 for none. seed: of the weights. device, dtype: of the
        parameters.

    Gradients: `backward` is collective, as forward is. Each rank differentiates its own loss; an expert's
    gradient is then the gradient of the sum of all ranks' losses, with no all-reduce to follow. Router and
    shared expert see only this rank's tokens: their gradients have to be summed over the ranks
    (`replicated_parameters`), and if the objective is the mean over R ranks, every rank's loss has to be
    divided by R before backward.

    Rows travel in the dtype of `x`: bfloat16 on every backend; float32 and float64 where the backend
    carries them.
    """

    def __init__(
        self,
        buffer: BufferLike,
        *,
        hidden: int,
        expert_hidden: int,
        num_experts: int,
        num_topk: int,
        gate: Gate = sigmoid_topk,
        shared_hidden: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_ranks = buffer.group_size
        if num_experts < 1 or num_experts % num_ranks:
            raise RangeError(
                "num_experts", str(num_experts), f"a positive multiple of {num_ranks}, the ranks"
            )
        if not 1 <= num_topk <= num_experts:
            raise RangeError("num_topk", str(num_topk), f"1 to num_experts, {num_experts}")
        self.hidden, self.num_experts, self.num_topk, self.seed = hidden, num_experts, num_topk, seed
        self.rank, self.num_local_experts = buffer.rank, num_experts // num_ranks
        self.buffer_number = buffer_number(buffer)
        self.router = Router(hidden, num_experts, num_topk, gate=gate, device=device, dtype=dtype)
        self.experts = GroupedSwiGLU(
            self.num_local_experts, hidden, expert_hidden, device=device, dtype=dtype
        )
        self.shared = SwiGLU(hidden, shared_hidden, device=device, dtype=dtype) if shared_hidden else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew from `seed`."""
        self.router.reset_parameters(self.seed)
        self.experts.reset_parameters(self.seed, self.rank * self.num_local_experts)
        if self.shared is not None:
            self.shared.reset_parameters(self.seed + 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., H] -> the same shape and dtype. Collective; ranks may bring different numbers of tokens,
        also none.
        """
        if x.shape[-1] != self.hidden:
            raise ShapeError("x", str(list(x.shape)), f"[.., {self.hidden}]")
        tokens = x.reshape(-1, self.hidden)  # [T, H]
        routing = self.router(tokens)
        received = dispatch(
            self.buffer_number, tokens, routing.topk_idx, routing.topk_weights, self.num_experts
        )
        rows = apply_experts(self.experts, received.x, received.topk_idx, received.topk_weights)  # [N, H]
        y = combine(rows, received.route)
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view(x.shape)

    def rebalance(self, rate: float = 1e-3) -> Tensor:
        """Once per step, on all ranks: `Router.rebalance` over the buffer's group. Returns the load [E] of
        all ranks.
        """
        return self.router.rebalance(rate, buffer_of(self.buffer_number).group)

    def replicated_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that every rank holds: sum their gradients over the ranks."""
        yield from self.router.parameters()
        if self.shared is not None:
            yield from self.shared.parameters()

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of this rank's experts: keep them out of data-parallel all-reduces."""
        yield from self.experts.parameters()

    def extra_repr(self) -> str:
        return (
            f"experts {self.rank * self.num_local_experts}.. of {self.num_experts}, top {self.num_topk}, "
            f"hidden {self.hidden}"
        )


def apply_experts(experts: GroupedExperts, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
    """The local experts' weighted sum for each received row: [N, H].

    x [N, H], topk_idx [N, K] (local expert or -1), topk_weights [N, K]: as received. Weights multiply in the
    rows' dtype; the sum runs over k ascending in float32 at least.
    """
    pairs, counts, slots = expert_rows(topk_idx, experts.num_local_experts)
    y = experts(expand_rows(x, pairs, slots), counts)  # [P, H]
    weights = topk_weights.flatten().index_select(0, pairs).to(y.dtype)  # [P]
    return reduce_rows(y * weights.unsqueeze(1), pairs, slots)
