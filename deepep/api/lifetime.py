"""Construction of a buffer, which all ranks make or none, and its end."""

from __future__ import annotations

import contextlib
import os
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from deepep.api import arguments
from deepep.api.expert_counts import ExpertCounting
from deepep.api.info import BufferInfo
from deepep.api.waits import WaitCalls
from deepep.api.warp_lines import WarpCalls
from deepep.errors import ArgumentError, DeepEPError, DestroyedError
from deepep.runtime.ambient import plainly
from deepep.runtime.construction import construct
from deepep.runtime.control.processes import only_here
from deepep.runtime.engine import Engine
from deepep.runtime.labels import with_label
from deepep.runtime.requests import Operation, Schedule

if TYPE_CHECKING:
    from typing_extensions import Self


class EngineOwner(WaitCalls, WarpCalls, ExpertCounting):
    """Whoever has an engine of its own: Buffer, ElasticBuffer. Construction calls `_own`."""

    def _own(self, engine: Engine, group: dist.ProcessGroup) -> None:
        self._engine, self.runtime, self.group = engine, engine, group
        self.rank = engine.info.rank
        self._destroyed = False
        self._scratch: dict[bool, torch.Tensor] = {}
        # Also at interpreter exit: what was issued may still reach the peers, and no wait is without end.
        self._finalizer = weakref.finalize(self, only_here(engine.close))
        self._leave, self._abandon = only_here(engine.leave), only_here(engine.abandon)

    @with_label
    def destroy(self) -> None:
        """Release the buffer; its operations raise DestroyedError from then on. Idempotent.

        Collective: waits, up to the time-out, for the other ranks to come to the same point, so that none of
        them loses a message under way. A peer that does not come is not an error here.
        """
        if not self._destroyed:
            self._destroyed = True
            self._leave()
            self._finalizer.detach()
            self._scratch.clear()

    @with_label
    def release_memory(self) -> None:
        """Give back the memory that operations work in; the next operation makes it again. Collective.

        For the time in which memory is needed elsewhere: model loading, another model's turn. On CUDA that is
        the symmetric memory of both modes, to torch's allocator, once no tensor received into it is held any
        more (`info.memory`: "kept memory" until then) and no CUDA graph was captured in it; and
        `get_local_buffer_tensor`'s, which begins anew with zeros. The connections between ranks stay.

        Handles stay good for cached dispatches and combines, and what was received stays as it is. The rows
        of `get_next_low_latency_combine_buffer` are not looked at any more: ask again. On CUDA the next call
        of each mode is no quicker than the first was, and not to be captured.

        It is a barrier: it waits for what was issued, and for all ranks to call it, up to the time-out. Where
        another rank calls another operation, all raise: MismatchError, or PeerTimeoutError on CUDA, where
        kernels and hosts wait for each other; and nothing is given back then. HookPendingError before a hook
        is called.
        """
        self._check_alive()
        self._engine.release_memory()
        self._scratch.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.destroy()
        elif not self._destroyed:
            # The others may be in another operation, or gone: nothing collective any more. And whatever goes
            # wrong here as well, the caller's error is the one to see.
            self._destroyed = True
            self._finalizer.detach()
            with contextlib.suppress(Exception):
                self._abandon()
            self._scratch.clear()

    def __repr__(self) -> str:
        info = self._engine.info
        state = ", destroyed" if self._destroyed else ""
        name = type(self).__name__
        return f"<deepep.{name}: rank {info.rank} of {info.num_ranks}, backend {info.backend}{state}>"

    def _info(self, num_sms: int) -> BufferInfo:
        """Facts about the buffer, as they are now. num_sms: of calls that name none."""
        self._check_alive()
        engine = self._engine
        about, options = engine.info, engine.info.options
        memory = engine.memory()
        if self._scratch:
            memory["get_local_buffer_tensor"] = sum(tensor.numel() for tensor in self._scratch.values())
        return BufferInfo(
            backend=about.backend,
            device=options.device,
            rank=about.rank,
            num_ranks=about.num_ranks,
            ranks_per_domain=about.ranks_per_domain,
            operations=about.operations,
            memory=memory,
            timeout=options.timeout,
            num_sms=num_sms,
            low_latency_mode=options.low_latency,
            enable_shrink=options.masks,
            reduction=options.reduction,
            masked_ranks=tuple(sorted(engine.masked)),
        )

    def _refuse(self, operation: Operation, error: BaseException, schedule: Schedule) -> NoReturn:
        """Raises what a collective call raises before the engine has it, and takes it to the peers:
        a wrong argument is refused, and that this rank raises anything else is posted.
        """
        if isinstance(error, ArgumentError):
            self._engine.refuse(operation, error, schedule)
        if not isinstance(error, DeepEPError) and self._engine.tell_peers is not None:
            self._engine.tell_peers(error)
        raise error

    def _check_alive(self) -> None:
        if self._destroyed:
            raise DestroyedError(f"rank {self.rank}: the buffer was destroyed")


class BufferLifetime(EngineOwner):
    """A rank's part of a Buffer, from its construction to its end. Arguments: deepep.api.buffer.Buffer."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        backend: str | None = None,
        device: str | torch.device | None = None,
        use_fabric: bool = False,
        timeout: float | None = None,
        symmetric_bytes: int | None = None,
        reduction: str = "expert_rank",
        ranks_per_domain: int | None = None,
        max_num_ranks: int | None = None,
        service_level: int | None = None,
        traffic_class: int | None = None,
    ) -> None:
        if torch.is_inference_mode_enabled():
            plainly(BufferLifetime.__init__, locals())
            return
        if group is None:
            if comm is None:
                raise ValueError("group, comm: got None for both; allowed: a process group or a communicator")
            from deepep.runtime.control.mpi import group_of_communicator

            group = group_of_communicator(comm)
        options, asked = arguments.engine_options(
            group,
            num_qps_per_rank=num_qps_per_rank,
            flags={
                "allow_nvlink_for_low_latency_mode": allow_nvlink_for_low_latency_mode,
                "allow_mnnvl": allow_mnnvl,
                "explicitly_destroy": explicitly_destroy,
                "use_fabric": use_fabric,
            },
            num_nvl_bytes=num_nvl_bytes,
            num_rdma_bytes=num_rdma_bytes,
            low_latency=low_latency_mode,
            masks=enable_shrink,
            timeout=timeout,
            symmetric_bytes=symmetric_bytes,
            reduction=reduction,
            ranks_per_domain=ranks_per_domain,
            max_num_ranks=max_num_ranks,
            lanes=(service_level, traffic_class),
            device=device,
        )
        self._own(construct(options, backend, asked), group)
        self.group_size = self._engine.info.num_ranks
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = options.low_latency
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = options.masks
        self.nvshmem_qp_depth = int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))
