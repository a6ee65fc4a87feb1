"""Requests and results of every operation, free of any public interface's names and tuple orders.

A facade (deepep.api.buffer.Buffer, and others later) turns its calls into these requests and the results back
into its tuples. A backend implements `deepep.runtime.engine.Engine`. Neither side knows the other.

Shapes: R ranks, E experts, L = E / R local experts, K top-k, T tokens here, H hidden size, M maximum tokens
per rank, N rows received, P scales per token, D scale-up domains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

import torch

from deepep.runtime.completion import Completion

if TYPE_CHECKING:
    from deepep.runtime.engine import Engine

Hook = Callable[[], None]

RANKS_PER_DOMAIN = 8
"""Ranks of a scale-up domain, as layouts count them (V1's NVLink ranks of a node)."""


class Operation(IntEnum):
    """The collective operations; the numbers travel between the ranks."""

    DISPATCH = 1
    COMBINE = 2
    LOW_LATENCY_DISPATCH = 3
    LOW_LATENCY_COMBINE = 4
    BARRIER = 5
    DESTROY = 6
    ACKNOWLEDGE = 7
    ALL_REDUCE = 8
    INVITE = 9
    ADMIT = 10
    DISMISS = 11
    PROBE = 12
    RELEASE_MEMORY = 13
    GATHER = 14
    COMMIT = 15
    COLLECTIVE = 16
    STEP = 17
    REDUCE_SCATTER = 18
    AGRS_SET_CONFIG = 19
    CREATE_AGRS_SESSION = 20
    DESTROY_AGRS_SESSION = 21
    ALL_GATHER = 22
    PP_SET_CONFIG = 23
    ENGRAM_WRITE = 24
    HAND_OVER = 25

    @property
    def label(self) -> str:
        """The name that users see in errors and fault records."""
        return self.name.lower()


LOW_LATENCY = frozenset({Operation.LOW_LATENCY_DISPATCH, Operation.LOW_LATENCY_COMBINE})
"""The operations that go on without a rank that is missing (`EngineOptions.masks`)."""


@dataclass(frozen=True)
class Schedule:
    """Timing of an operation, relative to the caller's work.

    after: inputs are read once this has completed; None: once what the current stream holds now has.
    asynchronous: return before the outputs are complete, with a Completion.
    hook: return after the send has been issued, with a hook that receives (low latency only).
    allocate_on_comm_stream: on CUDA, outputs belong to the communication stream.
    """

    after: Completion | None = None
    asynchronous: bool = False
    hook: bool = False
    allocate_on_comm_stream: bool = False


@dataclass(frozen=True)
class Layout:
    """Destinations of a rank's tokens.

    num_tokens_per_rank [R] int32, num_tokens_per_domain [D] int32 or None, num_tokens_per_expert [E] int32,
    is_token_in_rank [T, R] bool.
    """

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_domain: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


class PreparedDispatch(Protocol):
    """A cached dispatch that is prepared but for the addresses of its rows."""

    def launch(
        self, x: object, scales: object, num_sms: int
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """Makes it now, on the current stream, with rows like those it was prepared for; x, scales: as of
        `Engine.dispatch`, unchecked. Returns the rows received, and their scales.

        None: it was not made. `Engine.dispatch` makes it, and says what is wrong with it, if anything is.
        """


@dataclass(eq=False)
class Route:
    """A dispatch's route, for the operations that reuse it: cached dispatches and combine.

    engine: the engine that made it. num_tokens: T. num_rows: rows of the tensors handed out (N, or the worst
        case asked for). is_token_in_rank [T, R] bool. plan: the backend's own, None until the dispatch has
        run. cached: the last cached dispatch along it, for backends that prepare those.
    """

    engine: Engine
    num_tokens: int
    num_experts: int
    is_token_in_rank: torch.Tensor
    num_rows: int | None = None
    plan: Any = None
    cached: PreparedDispatch | None = None


@dataclass(slots=True)
class DispatchRequest:
    """Rows to send. Of three things one is given: `route` (a cached route), `layout` (a fresh one), or
    `num_experts` and the top-k tensors (a fresh one, whose layout the dispatch finds out itself).

    x [T, H] any dtype; scales [T, P] 4-byte elements, any strides, or None; topk_idx [T, K] int32 or int64
    and topk_weights [T, K] float32, both or none; expert_alignment rounds up the counts reported;
    num_worst_tokens > 0: hand out exactly so many rows and do not wait for counts; num_sms: SMs that a kernel
    may use, 0 to let the engine choose. payload: a number for what rows of bytes are made of, that has to be
    the same on all ranks; engines that agree on hosts compare it. expansion: of `num_experts`, for engines
    that `spreads_rows`. known_route: the route of an earlier dispatch by the same top-k, by which this one's
    rows are read: it is refused where that would be.
    """

    x: torch.Tensor
    scales: torch.Tensor | None = None
    layout: Layout | None = None
    route: Route | None = None
    topk_idx: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    expert_alignment: int = 1
    num_worst_tokens: int = 0
    num_sms: int = 0
    num_experts: int = 0
    payload: int = 0
    expansion: SpreadRequest | None = None
    known_route: Route | None = None


@dataclass(slots=True)
class SpreadRequest:
    """The expanded layout that an engine which `spreads_rows` is to spread received rows to, as they come.

    alignment, zero_padding, column_major: as of ElasticDispatchRequest. num_rows: X, where the host does not
    wait for counts, else 0. overflows: entries may find no row then. spreads: False has this
    rank's rows left as they come; all ranks' kernels are the same.
    """

    alignment: int
    zero_padding: bool
    column_major: bool
    num_rows: int = 0
    overflows: bool = False
    spreads: bool = True


@dataclass(slots=True)
class SpreadRows:
    """Expanded rows of a dispatch: x [X, H], scales [X, P] or None, weights [X] float32; slots [N, K] int64,
    the row of each entry or -1; expert_counts [L] int32; overflow [1] int32 or None.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    weights: torch.Tensor
    slots: torch.Tensor
    expert_counts: torch.Tensor
    overflow: torch.Tensor | None


@dataclass(slots=True)
class Dispatched:
    """Rows received, in (source rank, source token) order.

    x [N, H], scales [N, P] row-major, topk_idx [N, K] (local index or -1), topk_weights [N, K] float32 (0
    where the index is -1); num_tokens_per_expert: L aligned counts, empty when not waited for. expanded: the
    rows spread, instead of x and scales; None where they were not, whatever was asked for.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_tokens_per_expert: list[int]
    route: Route
    completion: Completion | None = None
    expanded: SpreadRows | None = None


@dataclass(slots=True)
class CombineRequest:
    """Rows to return to their tokens' owners.

    x [N, H], topk_weights [N, K] float32 or None, biases [T, H] each; num_sms as for DispatchRequest.
    slots [N, K] int64, for engines that `sums_expanded`: x [X, H] and topk_weights [X] are of expanded rows,
    the one of each entry is named there, -1 for none; what returns of a received row is the sum of its
    entries' rows as LocalRows.reduce makes it, of each times its `factors` [N, K] float32 if they are given,
    and their weights, 0 where there is none.
    """

    x: torch.Tensor
    route: Route
    topk_weights: torch.Tensor | None = None
    biases: tuple[torch.Tensor, ...] = ()
    num_sms: int = 0
    slots: torch.Tensor | None = None
    factors: torch.Tensor | None = None

    @property
    def num_topk(self) -> int:
        """K of the weights that travel; 0: none do."""
        if self.topk_weights is None:
            return 0
        return (self.topk_weights if self.slots is None else self.slots).shape[1]


@dataclass(slots=True)
class Combined:
    """x [T, H], topk_weights [T, K] float32 or None."""

    x: torch.Tensor
    topk_weights: torch.Tensor | None
    completion: Completion | None = None


@dataclass(slots=True)
class LowLatencyDispatchRequest:
    """x [T, H] bf16, topk_idx [T, K]; at most `num_max_tokens` (M) per rank. The rest as in the V1 interface.

    expert_counts [L] int32 is added to; wait_nanoseconds [R] int64 is added to. topk_weights [T, K] float32:
    those that the combine will be given, if they are known; num_sms as for DispatchRequest.
    """

    x: torch.Tensor
    topk_idx: torch.Tensor
    num_max_tokens: int
    num_experts: int
    use_fp8: bool = True
    round_scale: bool = False
    use_ue8m0: bool = False
    expert_counts: torch.Tensor | None = None
    wait_nanoseconds: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    num_sms: int = 0


@dataclass(slots=True, eq=False)
class LowLatencyRoute:
    """A low-latency dispatch's route, as its combine needs it.

    source_index [L, R*M] int32: source token of each row. ranges [L, R] int64: (begin << 32) | count.
    engine: the engine that made it. plan: the backend's own, None if it has none, or if the caller put the
    tuple together of other tensors than a dispatch's (deepep.api.rebuilt).
    """

    source_index: torch.Tensor
    ranges: torch.Tensor
    num_max_tokens: int
    hidden: int
    num_experts: int
    engine: Engine | None = None
    plan: Any = None


@dataclass
class LowLatencyDispatched:
    """x [L, R*M, H] bf16 or e4m3; scales (column-major in the last two
    dimensions) or None; counts [L] int32.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    counts: torch.Tensor
    route: LowLatencyRoute
    completion: Completion | None = None
    hook: Hook | None = None


@dataclass(slots=True)
class LowLatencyCombineRequest:
    """x [L, R*M, H] bf16, topk_idx and topk_weights [T, K]; `out` [T, H] bf16 is written if given.

    num_sms as for DispatchRequest.
    """

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    route: LowLatencyRoute
    use_logfmt: bool = False
    zero_copy: bool = False
    out: torch.Tensor | None = None
    wait_nanoseconds: torch.Tensor | None = None
    num_sms: int = 0


@dataclass
class LowLatencyCombined:
    """x [T, H] bf16."""

    x: torch.Tensor
    completion: Completion | None = None
    hook: Hook | None = None
