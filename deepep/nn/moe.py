"""A Mixture-of-Experts layer whose experts are spread over the ranks of a Buffer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepep.errors import (
    ArgumentTypeError,
    CapacityError,
    DeviceError,
    ModeError,
    RangeError,
    ShapeError,
)
from deepep.gate import sigmoid_topk
from deepep.nn.buffers import BufferLike, buffer_number, buffer_of, posting_errors
from deepep.nn.exchange import Received, combine, dispatch
from deepep.nn.experts import (
    MAX_EXPERTS,
    MAX_HIDDEN,
    GroupedSwiGLU,
    SwiGLU,
)
from deepep.nn.fixed import FixedTrip, apply_received, check_fixed, give_back, send_fixed
from deepep.nn.placing import (
    agree_on,
    checked_change,
    checked_placement,
    move_experts,
    sum_replica_gradients,
    watch_replica_gradients,
)
from deepep.nn.precision import (
    autocast_dtype,
    check_multiplies,
    check_plain,
    checked_output,
    is_distributed,
    parameter_options,
    summed_dtypes,
)
from deepep.nn.router import Gate, Router
from deepep.nn.rows import ends_of, expand_rows, expert_rows, sort_pairs, weighted_sum
from deepep.nn.scaled import (
    CAST_DTYPES,
    ScaledReceived,
    check_casts,
    dispatch_scaled,
    expand_scaled_rows,
)
from deepep.nn.summed import combine_pairs, sums_in_combine
from deepep.placement.experts import EMPTY, ExpertPlacement, contiguous, physical_topk
from deepep.runtime.checks import INDEX_DTYPES, MOST, check_int, check_ints, dtype_names
from deepep.runtime.requests import Operation


class GroupedExperts(Protocol):
    """This rank's experts: a module like GroupedSwiGLU."""

    num_local_experts: int

    def __call__(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [P, H] sorted by local expert, counts [L] int64 on the CPU -> [P, H]."""


class ExpertParallelMoE(nn.Module):
    """Router, dispatch, this rank's grouped SwiGLU experts, combine; optionally a shared expert beside them.

        y = sum over the top-k experts e of a token of  weight_e * expert_e(x)   (+ shared(x))

    Every rank holds the router and the shared expert whole and `num_experts / R` experts, or those of
    `placement`. Weights are drawn per expert from `seed`: the same model for any number of ranks, and any
    placement.

    Args:
        buffer: the deepep.Buffer to exchange through. The layer does not keep it alive.
        hidden: H.
        expert_hidden: F, width of an expert.
        num_experts: E, a multiple of R.
        num_topk: K.
        gate: maps (logits [T, E], K, bias=[E]) to a Routing; deepep.gate's functions, or functools.partial
            of them.
        shared_hidden: width of the shared expert; 0 for none.
        fp8_dispatch: rows are cast to FP8 (e4m3) with a float32 scale per 128 channels before they are
            sent, and restored where they are received: half the bytes, three digits of mantissa. The gradient
            goes straight through the cast, and travels as without. hidden has to be a multiple of 128, rows
            bfloat16 or float32. Router and shared expert see the rows as they are.
        recompute: keep of the experts' forward nothing but the rows received, and repeat it in the backward:
            activation checkpointing that dispatches nothing twice. Not inside torch.compile, which decides
            itself what it keeps.
        num_max_tokens: M, the most tokens that any rank brings, the same on all ranks; 0: any number. With
            it the layer has fixed shapes, but under torch.compile: no host waits, CUDA graphs can hold it,
            forward and backward, and it takes memory for R * M * K rows, as if all tokens came to each rank.
        placement: where experts lie, and which have replicas (deepep.placement); the same on all ranks. None:
            rank r has experts r * L to (r + 1) * L - 1. Replicas begin equal; `sum_replica_gradients` keeps
            them so in training, and an optimizer that steps without it raises ModeError. `move_to` another
            one, at any time.
        seed: of the weights.
        device: of the parameters; torch's default device where one is set, else the buffer's.
        dtype: of the parameters; bfloat16 on CUDA, torch's default dtype on the CPU.

    Gradients: `backward` is collective, as forward is. Each rank differentiates its own loss; an expert's
    gradient is then the gradient of the sum of all ranks' losses, with no all-reduce to follow. Router and
    shared expert see only this rank's tokens: their gradients have to be summed over the ranks
    (`replicated_parameters`), and if the objective is the mean over R ranks, every rank's loss has to be
    divided by R before backward. Where grad mode is on, the output requires a gradient even if nothing here
    does, because it may on another rank: run inference under torch.no_grad. Differentiable once.

    Rows travel in the dtype of `x`, which has to be the weights': bfloat16 on every backend, float32 and
    float64 where combine takes them (the reference). Under torch.autocast rows travel, and experts compute,
    in its dtype, and so is the output; the router computes in float32.

    Raises ArgumentTypeError, RangeError or DeviceError for what does not fit, `forward` on all ranks.
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
        fp8_dispatch: bool = False,
        recompute: bool = False,
        num_max_tokens: int = 0,
        placement: ExpertPlacement | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.buffer_number = buffer_number(buffer)
        num_ranks = buffer.group_size
        check_int("num_experts", num_experts, 1, MAX_EXPERTS)
        if placement is None and num_experts % num_ranks:
            raise RangeError(
                "num_experts", str(num_experts), f"a positive multiple of {num_ranks}, the ranks"
            )
        check_int("shared_hidden", shared_hidden, 0, MAX_HIDDEN)
        for name, flag in (("fp8_dispatch", fp8_dispatch), ("recompute", recompute)):
            if not isinstance(flag, bool):
                raise ArgumentTypeError(name, type(flag).__name__, "a bool")
        self.fp8_dispatch, self.recompute = fp8_dispatch, recompute
        self.num_max_tokens = check_int("num_max_tokens", num_max_tokens, 0, MOST)
        made, self.row_dtypes = parameter_options(buffer, device, dtype), summed_dtypes(buffer)
        if fp8_dispatch:
            check_casts(hidden, made["dtype"])
            self.row_dtypes = tuple(dtype for dtype in self.row_dtypes if dtype in CAST_DTYPES)
        self.hidden, self.num_experts, self.num_topk, self.seed = hidden, num_experts, num_topk, seed
        self.rank, self.placement = buffer.rank, checked_placement(placement, num_experts, num_ranks)
        self.num_physical = num_experts if placement is None else placement.num_physical
        self.num_local_experts, self.num_expert_ranks = self.num_physical // num_ranks, num_ranks
        self.left_out: frozenset[int] = frozenset()
        self.has_joined = False
        """Ranks have joined since, which the buffer's group does not connect: what needs it is refused."""
        self._are_replicas_summed = False
        self.router = Router(hidden, num_experts, num_topk, gate=gate, seed=seed, **made)
        first = self.rank * self.num_local_experts
        numbers = None if placement is None else placement.of_rank(self.rank)
        self.experts = GroupedSwiGLU(
            *(self.num_local_experts, hidden, expert_hidden),
            **{"seed": seed, "first_expert": first, "numbers": numbers, **made},
        )
        if num_max_tokens:
            check_fixed(self.experts, self.experts.down.device, self.experts.down.dtype)
        self.shared = SwiGLU(hidden, shared_hidden, seed=seed + 1, **made) if shared_hidden else None
        # Tables of the placement: buffers, so that they are where the parameters are; no part of the model.
        self.replicas: Tensor | None
        self.replica_counts: Tensor | None
        tables = (None, None) if placement is None else placement.tables(self.router.weight.device)
        for name, table in zip(("replicas", "replica_counts"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)

    def reset_parameters(self) -> None:
        """Draws all weights anew from `seed`."""
        self.router.reset_parameters(self.seed)
        self.experts.reset_parameters(self.seed, self.rank * self.num_local_experts)
        if self.shared is not None:
            self.shared.reset_parameters(self.seed + 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., H] -> the same shape. Collective; ranks may bring different numbers of tokens, also none.

        What this rank raises, the others get as well, at the exchange that it does not come to.
        """
        number = self.buffer_number
        with posting_errors(number, Operation.DISPATCH, "router"):
            self._check(x)
            tokens = x.reshape(-1, self.hidden)  # [T, H]
            routing = self.router(tokens)
            dtype = autocast_dtype(tokens)
            rows = tokens if dtype is None else tokens.to(dtype)
        with posting_errors(number, Operation.DISPATCH, "shared"):
            # Before the dispatch, which has the host wait for counts: the device is busy meanwhile.
            beside = None if self.shared is None else self.shared(tokens)
        if self._is_fixed():
            y = self._forward_fixed(rows, self._physical(routing.topk_idx), routing.topk_weights)
            return (y if beside is None else y + beside).view(x.shape)
        send = dispatch_scaled if self.fp8_dispatch else dispatch
        received = send(
            number, rows, self._physical(routing.topk_idx), routing.topk_weights, self.num_physical
        )
        with posting_errors(number, Operation.COMBINE, "experts"):
            self._watch_replicas()
            rows, pairs, slots = self._apply_experts(received)  # [N, H]; or [P, H], which combine is to sum
        if pairs is None or slots is None:
            y = combine(rows, received.route)
        else:
            y = combine_pairs(rows, received.topk_weights, pairs, slots, received.route)
        if beside is not None:
            y = y + beside
        return y.view(x.shape)

    def _is_fixed(self) -> bool:
        """True if this forward has fixed shapes."""
        return self.num_max_tokens > 0 and not torch.compiler.is_compiling()

    def _forward_fixed(self, rows: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """Dispatch, experts and combine of rows [T, H]: [T, H]."""
        trip = FixedTrip(self.buffer_number, self.num_physical, self.num_max_tokens, self.fp8_dispatch)
        received = send_fixed(trip, rows, topk_idx, topk_weights)
        with posting_errors(self.buffer_number, Operation.COMBINE, "experts"):
            self._watch_replicas()
            sums = self._perhaps_repeated(apply_received, *received)
        return give_back(trip, sums)

    def _watch_replicas(self) -> None:
        """Has an optimizer that steps without `sum_replica_gradients` raise, if there are replicas."""
        has_replicas = self.placement is not None and self.placement.has_replicas
        if has_replicas and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._are_replicas_summed = False
            watch_replica_gradients(self.experts.parameters())

    def _physical(self, topk_idx: Tensor) -> Tensor:
        """The experts of the router's choice as dispatch numbers them."""
        if self.replicas is None or self.replica_counts is None:
            return topk_idx
        return physical_topk(topk_idx, self.replicas, self.replica_counts, self.rank, self.num_physical)

    def _apply_experts(
        self, received: Received | ScaledReceived
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Sums of received rows [N, H]; or experts' rows [P, H], and where they belong: pairs and slots."""
        apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _apply_to_rows
        given: tuple[Tensor, ...] = received.topk_idx, received.expert_counts
        if isinstance(received, ScaledReceived):
            apply = _apply_to_scaled
            given = *given, received.stand_in, received.values, received.scales
        else:
            given = *given, received.x
        if self._recomputes():  # summed inside: what experts return is not kept
            sums = self._perhaps_repeated(partial(_sum_of, apply), *given, received.topk_weights)
            return sums, None, None
        made, pairs, slots = apply(self.experts, *given)
        if sums_in_combine(self.buffer_number, made):
            return made, pairs, slots
        return weighted_sum(made, received.topk_weights, pairs, slots), None, None

    def _recomputes(self) -> bool:
        """True if what experts compute is computed again in the backward."""
        return self.recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _perhaps_repeated(self, apply: Callable[..., Tensor], *given: Tensor) -> Tensor:
        if not self._recomputes():
            return apply(self.experts, *given)
        # In fixed shapes experts draw nothing; and torch up to 2.9 reads no generator's state in a graph.
        draws = not self._is_fixed()
        kept: Tensor = checkpoint(apply, self.experts, *given, use_reentrant=False, preserve_rng_state=draws)
        return kept

    def _check(self, x: Tensor) -> None:
        """Raises for rows that cannot pass through router, exchange and experts."""
        if not torch.compiler.is_compiling():
            check_plain("x", x)
        if x.ndim == 0 or x.shape[-1] != self.hidden:
            raise ShapeError("x", str(list(x.shape)), f"[.., {self.hidden}]")
        dtype = autocast_dtype(x) or x.dtype
        if dtype not in self.row_dtypes:
            allowed = f"{dtype_names(self.row_dtypes)}, which combine sums"
            raise ArgumentTypeError("x", dtype_names([dtype]), allowed)
        if self._is_fixed():
            check_fixed(self.experts, x.device, dtype)
            if x.numel() > self.num_max_tokens * self.hidden:
                got, allowed = f"{x.numel() // self.hidden} tokens", f"at most {self.num_max_tokens}"
                raise CapacityError("num_max_tokens", got, allowed)
        for module in (self.experts, self.shared):
            if isinstance(module, GroupedSwiGLU | SwiGLU) and not is_distributed(module.down):
                check_multiplies(x, module.down)

    def rebalance(self, rate: float = 1e-3) -> Tensor:
        """`Router.rebalance` over the buffer's ranks, once per step. Returns the load [E] of all ranks.

        On the CPU, and where ranks are masked, over the buffer's members.
        """
        buffer = buffer_of(self.buffer_number)
        is_among_members = self.router.load.is_cpu or buffer.runtime.masked
        return self.router.rebalance(rate, buffer.runtime if is_among_members else buffer.group)

    def counters(self) -> list[Tensor]:
        """Tensors in which a forward counts, and which are no buffers: a forward that is made again because
        it failed begins with what they held before it.
        """
        return [self.router.load]

    def leave_out(self, ranks: Collection[int]) -> None:
        """Has the gate choose among the experts that other ranks than these hold, from now on: where a Buffer
        goes on without ranks, which it has masked. On all ranks alike; with no ranks, as before.

        Of an expert with replicas (`placement`) those on other ranks share its tokens. An expert of these
        ranks alone is as if the model did not have it: not chosen, nor counted in weights, groups or balance.
        In its stripes of the router's weight and bias nothing moves but what the optimizer does by itself.

        Raises RangeError for fewer experts left than the gate needs, or ranks that there are not;
        ArgumentTypeError for a gate that takes no `alive=`.
        """
        gone = frozenset(check_ints("ranks", ranks, 0, self.num_expert_ranks - 1))
        placed = self.placement or contiguous(self.num_experts, self.num_expert_ranks)
        self.router.choose_among(placed.alive_without(gone))
        self.left_out = gone
        if self.placement is not None:
            self.replicas, self.replica_counts = self.placement.tables(self.router.weight.device, gone)

    def replicated_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that every rank holds: sum their gradients over the ranks."""
        yield from self.router.parameters()
        if self.shared is not None:
            yield from self.shared.parameters()

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of this rank's experts: keep them out of data-parallel all-reduces."""
        yield from self.experts.parameters()

    @property
    def expert_numbers(self) -> tuple[int, ...]:
        """The experts of this rank, by their numbers in the model; -1: an empty place."""
        first = self.rank * self.num_local_experts
        consecutive = range(first, first + self.num_local_experts)
        return tuple(consecutive if self.placement is None else self.placement.of_rank(self.rank))

    def first_replicas(self) -> list[int]:
        """Places, in the parameters' first dimension, of experts whose first replica that is left is here."""
        if self.placement is None:
            return list(range(self.num_local_experts))
        first = self.rank * self.num_local_experts
        replicas = self.placement.replicas_without(self.left_out)
        return [
            place
            for place, expert in enumerate(self.expert_numbers)
            if expert != EMPTY and replicas[expert][0] == first + place
        ]

    def sum_replica_gradients(self) -> None:
        """Gives the replicas of an expert the sum of their gradients, each of a share of its tokens:
        once a step, between backward and optimizer, like the sum over `replicated_parameters`. Collective.

        Summed by physical expert, ascending, in float32 at least, rounded once: the same bits on all ranks,
        so equal replicas stay equal under any optimizer that looks at values alone. Without a gradient, a
        rank takes part with zeros. It moves the gradients of replicated experts alone, each once per replica,
        by all_reduce over the buffer's group. Without replicas it does nothing; nor where the backward has
        done it, as those of attempts at training steps do (`sum_replica_gradients_by`).
        """
        if not self._are_replicas_summed:
            group = self._group("sum_replica_gradients")
            self.sum_replica_gradients_by(lambda tensor: dist.all_reduce(tensor, group=group))
            self._are_replicas_summed = False

    def sum_replica_gradients_by(self, add_up: Callable[[Tensor], object]) -> None:
        """The same at the end of a backward, by a function that sums a tensor over the ranks that take part,
        in place; then `sum_replica_gradients` has nothing to do, until the next forward. Raises
        ArgumentTypeError.
        """
        if not callable(add_up):
            raise ArgumentTypeError("add_up", type(add_up).__name__, "a function of a tensor")
        if self.placement is not None:
            sum_replica_gradients(list(self.experts.parameters()), self.placement, self.rank, add_up)
            self._are_replicas_summed = True

    def move_to(self, placement: ExpertPlacement) -> int:
        """Brings this rank the experts that `placement` gives it; the output of the layer stays what it is.
        Collective, between a step and the next; `placement` has to be the same on all ranks.

        Parameters stay the same objects, so the placement has as many physical experts as now; their
        gradients are dropped, and what an optimizer keeps of them is the caller's to move
        (`deepep.nn.move_experts`). `ExpertPlacement.renumbered` has less to move. Returns how many experts
        came from other ranks. Raises ArgumentTypeError, RangeError or MismatchError, on all ranks.
        """
        if self.left_out:
            raise ModeError(
                "move_to", f"ranks {sorted(self.left_out)} left out", "all ranks, to move experts"
            )
        old = self.placement or contiguous(self.num_experts, self.num_expert_ranks)
        group = self._group("move_to")
        agree_on(placement, old, group)
        weights = list(self.experts.parameters())
        moved = move_experts([weight.detach() for weight in weights], old, placement, self.rank, group)
        with torch.no_grad():
            for weight, values in zip(weights, moved, strict=True):
                weight.copy_(values)
                weight.grad = None
        self.go_by(placement)
        held = old.of_rank(self.rank)
        return sum(expert not in (EMPTY, *held) for expert in placement.of_rank(self.rank))

    def _group(self, operation: str) -> Any:
        """The buffer's group, for a collective of torch's. Raises ModeError once ranks have joined."""
        if self.has_joined:
            raise ModeError(operation, "ranks that have joined", "the ranks that began, or an attempt")
        return buffer_of(self.buffer_number).group

    def go_by(self, placement: ExpertPlacement) -> None:
        """Goes by another placement, on all ranks alike, whose experts' weights are where it says already.

        Raises ArgumentTypeError or RangeError for other places than there are.
        """
        old = self.placement or contiguous(self.num_experts, self.num_expert_ranks)
        self.placement = placement = checked_change(placement, old)
        if isinstance(self.experts, GroupedSwiGLU):
            self.experts.numbers = placement.of_rank(self.rank)
        self.leave_out(self.left_out)

    def extra_repr(self) -> str:
        first = f"{self.rank * self.num_local_experts}.."
        mine = first if self.placement is None else str(list(self.placement.of_rank(self.rank)))
        return f"experts {mine} of {self.num_experts}, top {self.num_topk}, hidden {self.hidden}"


def apply_experts(
    experts: GroupedExperts,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    expert_counts: Tensor | None = None,
) -> Tensor:
    """The local experts' weighted sum for each received row: [N, H].

    x [N, H], topk_idx [N, K] (local expert or -1), topk_weights [N, K]: as received. expert_counts [L] int64
    on the CPU, entries of each expert: as received, too; if not given, they are counted, and the device is
    waited for. Weights multiply in the rows' dtype; the sum runs over k ascending in float32 at least. Raises
    ArgumentTypeError, DeviceError, ShapeError or RangeError.
    """
    if not torch.compiler.is_compiling():
        if not (callable(experts) and isinstance(getattr(experts, "num_local_experts", None), int)):
            allowed = "a module of local experts, with num_local_experts"
            raise ArgumentTypeError("experts", type(experts).__name__, allowed)
        _check_received(x, topk_idx, topk_weights)
        if expert_counts is not None:
            _check_expert_counts(expert_counts, experts.num_local_experts, topk_idx.numel())
    if expert_counts is not None:
        return _sum_of(_apply_to_rows, experts, topk_idx, expert_counts, x, topk_weights)
    pairs, expert_counts, slots = expert_rows(topk_idx, experts.num_local_experts)
    rows, ends = expand_rows(x, pairs, slots), ends_of(expert_counts, x.device)
    return weighted_sum(_run(experts, rows, expert_counts, ends), topk_weights, pairs, slots)


def _apply_to_rows(
    experts: GroupedExperts, topk_idx: Tensor, expert_counts: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Experts' rows of what a dispatch returned, which needs no checks: [P, H], pairs, slots."""
    pairs, slots, ends = sort_pairs(topk_idx, expert_counts)
    return _run(experts, expand_rows(x, pairs, slots), expert_counts, ends), pairs, slots


def _apply_to_scaled(
    experts: GroupedExperts,
    topk_idx: Tensor,
    expert_counts: Tensor,
    stand_in: Tensor,
    values: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of rows received in FP8, as `dispatch_scaled` has them."""
    pairs, slots, ends = sort_pairs(topk_idx, expert_counts)
    rows = expand_scaled_rows(stand_in, values, scales, pairs, slots)
    return _run(experts, rows, expert_counts, ends), pairs, slots


def _sum_of(
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]], experts: GroupedExperts, *given: Tensor
) -> Tensor:
    """The weighted sum for each received row [N, H]. given: what `apply` is, and topk_weights [N, K]."""
    made, pairs, slots = apply(experts, *given[:-1])
    return weighted_sum(made, given[-1], pairs, slots)


def _run(experts: GroupedExperts, rows: Tensor, counts: Tensor, ends: Tensor) -> Tensor:
    """rows [P, H] sorted by expert -> [P, H]."""
    if isinstance(experts, GroupedSwiGLU) and type(experts).forward is GroupedSwiGLU.forward:
        made = experts(rows, counts, ends)
    else:
        made = experts(rows, counts)
    return checked_output(made, rows)


def _check_expert_counts(counts: object, num_local_experts: int, num_entries: int) -> None:
    found = check_plain("expert_counts", counts)
    if found.dtype != torch.int64:
        raise ArgumentTypeError("expert_counts", dtype_names([found.dtype]), "int64")
    if found.device.type != "cpu":
        raise DeviceError("expert_counts", str(found.device), "cpu: the host has to know them")
    if found.shape != (num_local_experts,):
        raise ShapeError("expert_counts", str(list(found.shape)), f"[{num_local_experts}]")
    values = found.tolist()
    if min(values) < 0 or sum(values) > num_entries:
        allowed = f"counts from 0 that add up to at most {num_entries}, the entries"
        raise RangeError("expert_counts", str(values), allowed)


def _check_received(x: object, topk_idx: object, topk_weights: object) -> None:
    rows = check_plain("x", x)
    if rows.ndim != 2:
        raise ShapeError("x", str(list(rows.shape)), "[N, H]")
    for name, value in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
        found = check_plain(name, value)
        if found.ndim != 2 or found.shape[0] != rows.shape[0]:
            raise ShapeError(name, str(list(found.shape)), f"[{rows.shape[0]}, K]")
    assert isinstance(topk_idx, Tensor)
    assert isinstance(topk_weights, Tensor)
    if topk_idx.shape != topk_weights.shape:
        raise ShapeError("topk_weights", str(list(topk_weights.shape)), str(list(topk_idx.shape)))
    if topk_idx.dtype not in INDEX_DTYPES:
        raise ArgumentTypeError("topk_idx", dtype_names([topk_idx.dtype]), dtype_names(INDEX_DTYPES))
    if not topk_weights.is_floating_point():
        raise ArgumentTypeError("topk_weights", dtype_names([topk_weights.dtype]), "a floating-point tensor")
