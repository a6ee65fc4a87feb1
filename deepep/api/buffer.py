"""Buffer: DeepEP V1's public interface, on whatever engine serves the group.

This file, low_latency.py and lifetime.py (construction, the end) know V1's names, defaults, tuple orders and
option rules; the work is the engine's (deepep.backends). Interface and semantics: V1 of DeepEP.

Shapes in docstrings: R ranks, E experts, L = E / R local experts, K top-k, T tokens on this rank, H hidden
size, M maximum tokens per rank, N rows received. "Current stream" on CPU means the caller itself.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from deepep.api import arguments, payloads
from deepep.api.handles import AnyDispatchHandle, DispatchHandle
from deepep.api.info import BufferInfo
from deepep.api.joining import Joining
from deepep.api.low_latency import LowLatencyCalls
from deepep.api.results import CombineResult, DispatchLayoutResult, DispatchResult, Rows
from deepep.config import (
    DEFAULT_NUM_SMS,
    Config,
    combine_config,
    dispatch_config,
    low_latency_size_hint,
)
from deepep.errors import ArgumentTypeError, RangeError
from deepep.events import EventHandle, EventOverlap
from deepep.runtime.ambient import plainly
from deepep.runtime.checks import MOST, check_flag, check_int, memory_for
from deepep.runtime.completion import bare
from deepep.runtime.engine import Reduction
from deepep.runtime.labels import inside, is_profiled
from deepep.runtime.requests import Operation, Schedule


class Buffer(LowLatencyCalls, Joining):
    """Expert-parallel communication between the ranks of a group: one object per rank, constructed by all.

    High-throughput operations (`dispatch`, `combine`) for training and prefill, low-latency operations
    (`low_latency_dispatch`, `low_latency_combine`) for decode. All of them are collective.

        with Buffer(group) as buffer:   # destroyed on leaving; after an exception without waiting for peers
            print(buffer.info)          # backend, what each operation runs on, memory, settings

    group: any torch.distributed process group; its ranks exchange words over it, so a gloo group will do for
        CUDA tensors. Or None, with `comm` an mpi4py communicator.
    num_nvl_bytes, num_rdma_bytes: sizes of the scale-up and scale-out buffers, multiples of 128. Staging is
        the backend's own affair, so these only size what `get_local_buffer_tensor` gives; and num_rdma_bytes,
        the same on all ranks then, the memory for NICs of low latency between domains on CUDA
        (`get_low_latency_rdma_size_hint`), three times over with enable_shrink.
    low_latency_mode: low-latency operations will be used.
    enable_shrink: ranks may be masked (`low_latency_update_mask_buffer`), in either mode; and a low-latency
        dispatch or combine masks those that die or time out by itself and returns without their rows
        (`low_latency_query_mask_buffer` says so). On the CPU all ranks that are left mask the same, at the
        cost of a second exchange of words a call; on CUDA each rank has its own mask, kept by its kernels
        (`docs/low_latency.md`), which counts in low latency alone until hosts next have to agree.
    backend: "cuda", "reference", ...; None: DEEPEP_BACKEND, else the best that serves the group.
    device: where tensors lie: "cpu", or "cuda" for this rank's current device. None: DEEPEP_DEVICE, else CUDA
        where there is a GPU (and the backend serves it), else the CPU.
    timeout: seconds to wait for peers; None: DEEPEP_TIMEOUT, else 100.
    symmetric_bytes: symmetric memory per rank that outputs and returning rows take (CUDA backend), a multiple
        of 128; None: DEEPEP_SYMMETRIC_BYTES, else the backend's default.
    reduction: where low-latency combine sums, the same on all ranks. "expert_rank": an expert's rank sums a
        token's rows and returns one, rounded to bf16. "exact": every row returns, and the token's rank rounds
        once: up to K times the bytes. "domain": where there are several domains, of one size, a token crosses
        to each once, to a gateway, and one row comes back, each domain's sum rounded (`docs/low_latency.md`);
        without return_recv_hook, use_logfmt and enable_shrink.
    ranks_per_domain: so many consecutive ranks share a scale-up domain (an NVLink domain), the same on all
        ranks. With several domains a token crosses to each once, high-throughput combine sums and rounds a
        domain's rows before it adds the domains' sums, and `get_dispatch_layout` counts these domains. None:
        DEEPEP_RANKS_PER_DOMAIN, else one domain. The CUDA backend serves several over NVSHMEM
        (`docs/domains.md`); in low latency ranks are then masked by the hosts, not by kernels.
    max_num_ranks: R, if more ranks may join than the group has (`invite`); the same on all ranks. Needs
        enable_shrink. None: the group's.
    service_level, traffic_class: lanes of what crosses between domains by NICs (`docs/operations.md`), 0 to
        15 and 0 to 255, the same on all ranks; set before NVSHMEM starts in this process, and refused with
        the reason where that is too late, or where nothing crosses a NIC: all but the CUDA backend between
        domains. None: as the environment has it.

    Without effect, accepted because V1's clients pass them:
    num_qps_per_rank: no backend opens queue pairs of its own.
    allow_nvlink_for_low_latency_mode: inside a node, rows always take the fastest link there is.
    allow_mnnvl, use_fabric (of forks): fabric handles are not used; a scale-up domain is one node.
    explicitly_destroy: `destroy()` may be called in any case, and more than once; without it, the buffer ends
        when it is collected, or with the process.

    The group's store must outlive every rank for faults to be settled: torchrun's agent holds it, or whatever
    process started the ranks. `runtime` is V1's attribute and holds the internal engine; it promises nothing:
    read `info`.

    Raises ValueError without group and comm; RangeError or ArgumentTypeError for sizes, `reduction`,
    `device`, `backend` and `timeout` (more than 0, at most 10,000,000 seconds), if one rank has to, on all;
    MismatchError if the ranks construct different buffers; PeerTimeoutError if not all of them come. After
    any of these the ranks may construct again on the same group.
    """

    num_sms: ClassVar[int] = DEFAULT_NUM_SMS
    """SMs of high-throughput calls without a config: 24, what this library's kernels were measured best with
    (V1: 20). `set_num_sms` changes it for all buffers."""

    @property
    def info(self) -> BufferInfo:
        """Backend, what each operation runs on, memory and settings, as they are now; printable."""
        return self._info(Buffer.num_sms)

    # small things

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Say whether the CUDA kernels are part of this installation."""
        from importlib.util import find_spec

        return find_spec("deepep._cuda") is not None

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set the SMs of all high-throughput calls without a config; any number from 1 (V1: even numbers)."""
        Buffer.num_sms = check_int("new_num_sms", new_num_sms, 1, MOST)

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream: what is queued there so far."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int,
        hidden: int,
        num_ranks: int,
        num_experts: int,
        *,
        ranks_per_domain: int | None = None,
        reduction: Reduction = "expert_rank",
        num_topk: int | None = None,
    ) -> int:
        """V1's number, for `num_rdma_bytes`: what `get_local_buffer_tensor` gives clients as a workspace.

        Low-latency operations take less, in proportion to R*M where this grows with E*M
        (`deepep.layout.low_latency_rdma_size_hint`), and inside one domain nothing of it: none is allocated
        until it is asked for.

        ranks_per_domain, reduction: the constructor's. Of several domains the number is what such calls need
        between them on CUDA, in memory that NICs know: a buffer of fewer bytes refuses them. num_topk: K of
        the calls, None: any; "exact" has a row go back for each of them. Inside one domain neither counts.
        V1's number is enough for sums where rows have 4096 channels or more and there are at least twice as
        many experts as ranks.

        Raises ArgumentTypeError and RangeError; ArgumentError for "domain" and domains of unequal size.
        """
        from deepep._core import MAX_TOPK
        from deepep.layout import low_latency_nic_bytes

        most, experts = num_max_dispatch_tokens_per_rank, num_experts
        number = low_latency_size_hint(most, hidden, num_ranks, experts)
        reduction = arguments.check_reduction(reduction)
        topk = MAX_TOPK if num_topk is None else check_int("num_topk", num_topk, 1, MAX_TOPK)
        if ranks_per_domain is None:
            return number
        if check_int("ranks_per_domain", ranks_per_domain, 1, MOST) >= num_ranks:
            return number
        between = low_latency_nic_bytes(
            *(most, hidden, num_ranks, experts, ranks_per_domain, topk),
            returns_entries=reduction == "exact",
            has_gateways=reduction == "domain",
        )
        return -(-between // 128) * 128

    def get_comm_stream(self) -> torch.cuda.Stream | None:
        """The stream that communication runs on. None on CPU, where it is a thread."""
        self._check_alive()
        return self._engine.comm_stream()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """A view of this rank's own buffer memory, as `dtype`.

        size: shape, or None for all that follows `offset`, one-dimensional.
        offset: BYTES, as V1 computes (its documentation says elements).
        use_rdma_buffer: of the RDMA buffer, else the NVLink one.

        The memory is allocated at the first call; no operation uses it.
        """
        if torch.is_inference_mode_enabled():
            return plainly(Buffer.get_local_buffer_tensor, locals())
        self._check_alive()
        use_rdma_buffer = check_flag("use_rdma_buffer", use_rdma_buffer)
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        if not isinstance(dtype, torch.dtype):
            raise ArgumentTypeError("dtype", type(dtype).__name__, "a torch.dtype")
        start = check_int("offset", offset, 0, num_bytes)
        if use_rdma_buffer not in self._scratch:
            device = self._engine.info.options.device
            with memory_for("num_rdma_bytes" if use_rdma_buffer else "num_nvl_bytes", num_bytes):
                self._scratch[use_rdma_buffer] = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        raw = self._scratch[use_rdma_buffer][start:]
        whole = raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        if size is None:
            return whole
        if not isinstance(size, (tuple, list)):
            raise ArgumentTypeError("size", type(size).__name__, "a torch.Size or None")
        shape = [check_int("size", extent, 0, num_bytes) for extent in size]
        wanted = math.prod(shape)
        if wanted > whole.numel():
            raise RangeError("size", f"{wanted} elements", f"at most {whole.numel()} after offset {start}")
        return whole[:wanted].view(shape)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """V1's default for dispatch, with `Buffer.num_sms`; between two entries of its table, the larger."""
        return dispatch_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """V1's default for combine, with `Buffer.num_sms`; between two entries of its table, the larger."""
        return combine_config(num_ranks, Buffer.num_sms)

    # high throughput

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> DispatchLayoutResult:
        """Count where this rank's tokens go.

        Does not communicate; but if it refuses its arguments, this rank's next dispatch counts as refused
        with them, so that the others, who call it, raise as well.

        topk_idx: [T, K] int32 or int64, contiguous, -1 for "no expert".

        Returns (num_tokens_per_rank [R] int32: each token once per rank; num_tokens_per_rdma_rank [R/8]
        int32, or None within one node; num_tokens_per_expert [E] int32: every entry counts; is_token_in_rank
        [T, R] bool; event).

        Raises ArgumentTypeError, ShapeError, LayoutError, DeviceError, and RangeError for indices outside
        -1 .. E-1 or E not a multiple of R.
        """
        if torch.is_inference_mode_enabled() or (is_profiled() and not inside.on):
            return plainly(Buffer.get_dispatch_layout, locals())
        if self._destroyed:
            self._check_alive()
        try:
            schedule = arguments.schedule(previous_event, async_finish, allocate_on_comm_stream)
        except BaseException as error:
            self._refuse(Operation.DISPATCH, error, Schedule(asynchronous=True))
        made, completion = self._engine.layout(topk_idx, num_experts, schedule)
        return DispatchLayoutResult(
            made.num_tokens_per_rank,
            made.num_tokens_per_domain,
            made.num_tokens_per_expert,
            made.is_token_in_rank,
            EventOverlap() if completion is None else EventOverlap(EventHandle(completion)),
        )

    def dispatch(
        self,
        x: Rows,
        handle: AnyDispatchHandle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        num_experts: int | None = None,
    ) -> DispatchResult:
        """Send every token to the ranks that want it, once per rank.

        x: [T, H] bf16 (or another floating dtype), contiguous, rows of a multiple of 16 bytes; or (x [T, H]
            of one byte per element, scales [T, P] float32 or int32, any strides): `deepep.formats.fp8_cast`;
            or a list of tensors [T, ..], any dtypes of 1, 2 or 4 bytes, alike on all ranks: api/payloads.py.
        handle: of an earlier dispatch, or its entries as a tuple: repeat its routing for new rows, without
            host waits. No top-k tensors then; the layout, alignment and worst case are the handle's.
        num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: of `get_dispatch_layout`, for a fresh
            route. num_tokens_per_rdma_rank: of the same; may be left out. Or none of them, and
        num_experts: E, with top-k tensors: the dispatch finds out its layout itself. Ranks may do either.
        topk_idx, topk_weights: [T, K] int32/int64 and float32, both or none.
        expert_alignment: rounds up the returned counts; the rows are not affected.
        num_worst_tokens: > 0: exactly so many rows come back, those past N with index -1 and unspecified
            contents; the host does not wait, the list is empty. Needs top-k tensors.
        config: its num_sms, instead of `Buffer.num_sms`. Chunk sizes have no effect: there are no queues.
        previous_event, async_finish, allocate_on_comm_stream: when inputs may be read, whether to return
            early with an event, and (only with both) whether outputs belong to the communication stream.

        Returns (recv_x like x, recv_topk_idx [N, K] local or -1, recv_topk_weights [N, K], a list of counts
        per local expert, handle, event); rows by source rank, token; with `handle` the middle four are None.

        Raises, on every rank: ArgumentErrors, CapacityError for more than num_worst_tokens rows,
        MismatchError, HandleError, HookPendingError, PeerTimeoutError.
        """
        if torch.is_inference_mode_enabled() or (is_profiled() and not inside.on):
            return plainly(Buffer.dispatch, locals())
        if isinstance(x, list):
            return payloads.send(Buffer.dispatch, locals(), arguments.schedule, async_finish)
        if self._destroyed:
            self._check_alive()
        at_once = previous_event is None and async_finish is allocate_on_comm_stream is False
        has_defaults = config is None and topk_idx is None and topk_weights is None
        if type(handle) is DispatchHandle and at_once and has_defaults:  # it may be like one before
            rows, scales = x if type(x) is tuple and len(x) == 2 else (x, None)
            prepared = handle.route.cached if handle.route.engine is self._engine else None
            again = None if prepared is None else prepared.launch(rows, scales, Buffer.num_sms)
            if again is not None:
                return DispatchResult(again, None, None, None, None, EventOverlap())
        try:
            schedule = arguments.schedule(previous_event, async_finish, allocate_on_comm_stream)
            request = arguments.dispatch_request(
                x,
                handle,
                (num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank),
                topk_idx,
                topk_weights,
                self._engine,
                expert_alignment=expert_alignment,
                num_worst_tokens=num_worst_tokens,
                num_sms=Buffer.num_sms if config is None else arguments.num_sms_of(config),
                num_experts=num_experts,
            )
        except BaseException as error:
            self._refuse(Operation.DISPATCH, error, arguments.refusal(async_finish))
        done = (self._counter or self._engine).dispatch(request, schedule)
        recv_x: Rows = done.x if done.scales is None else (done.x, done.scales)
        event = EventOverlap() if done.completion is None else EventOverlap(EventHandle(done.completion))
        if handle is not None:
            return DispatchResult(recv_x, None, None, None, None, event)
        counts, returned = done.num_tokens_per_expert, DispatchHandle(done.route, bare(done.completion))
        return DispatchResult(recv_x, done.topk_idx, done.topk_weights, counts, returned, event)

    def combine(
        self,
        x: torch.Tensor,
        handle: AnyDispatchHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> CombineResult:
        """Bring the rows back to their tokens' ranks and sum them there, without weights.

        x: [N, H] bf16 (float32 and float64 where the backend takes them), one row per row received.
        handle: of the dispatch, or its entries as a tuple.
        topk_weights: [N, K] float32, returned to their sources by a plain sum.
        bias: None, [T, H], or two of them. config and the rest: as for `dispatch`.

        Returns (combined_x [T, H], combined_topk_weights [T, K] or None, event). combined_x[t] = bias_0 +
        bias_1 + the rows of the ranks that t went to, ascending; in fp32, rounded once. A token sent nowhere:
        bias or +0.

        Raises as `dispatch` does.
        """
        if torch.is_inference_mode_enabled() or (is_profiled() and not inside.on):
            return plainly(Buffer.combine, locals())
        if self._destroyed:
            self._check_alive()
        try:
            schedule = arguments.schedule(previous_event, async_finish, allocate_on_comm_stream)
            sms = Buffer.num_sms if config is None else arguments.num_sms_of(config)
            request = arguments.combine_request(x, handle, topk_weights, bias, sms, self._engine)
        except BaseException as error:
            self._refuse(Operation.COMBINE, error, arguments.refusal(async_finish))
        done = self._engine.combine(request, schedule)
        event = EventOverlap() if done.completion is None else EventOverlap(EventHandle(done.completion))
        return CombineResult(done.x, done.topk_weights, event)

    def internode_dispatch(
        self,
        x: Rows,
        handle: AnyDispatchHandle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> DispatchResult:
        """`dispatch`, under the name V1 uses between nodes."""
        return self.dispatch(
            x,
            handle,
            num_tokens_per_rank,
            num_tokens_per_rdma_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
            expert_alignment,
            0,
            config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )

    def internode_combine(
        self,
        x: torch.Tensor,
        handle: AnyDispatchHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> CombineResult:
        """`combine`, under the name V1 uses between nodes."""
        return self.combine(
            x, handle, topk_weights, bias, config, previous_event, async_finish, allocate_on_comm_stream
        )
