"""CommGroup: a process group whose all-reduces travel by our collectives; the rest is forwarded."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep.collectives import Communicator, PendingReduction
from deepep.collectives.communicator import DTYPES
from deepep.parallel.config import ParallelConfig
from deepep.parallel.planning import plan_of, table_of
from deepep.runtime.control.transport import store_of

FORWARDED = (
    *("allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "_allgather_base", "barrier"),
    *("allreduce_coalesced", "alltoall", "alltoall_base", "broadcast", "gather", "recv", "recv_anysource"),
    *(
        "reduce",
        "reduce_scatter",
        "_reduce_scatter_base",
        "reduce_scatter_tensor_coalesced",
        "scatter",
        "send",
    ),
)
"""Operations that the group beneath carries out."""
_SUMS = {"SUM": False, "AVG": True}


class CommGroup(dist.ProcessGroup):
    """A view of a process group. all_reduce of dense floating-point tensors, SUM or AVG, goes through a
    Communicator; all other operations, dtypes and reductions are the group's own.

    Uncompressed unless `compresses`: the all-reduce of a metric must not lose bits by surprise.
    """

    def __init__(self, beneath: dist.ProcessGroup, config: ParallelConfig, compresses: bool) -> None:
        super().__init__(beneath.rank(), beneath.size())  # type: ignore[call-arg]
        self.beneath, self.config, self.compresses = beneath, config, compresses
        device = torch.device("cpu")
        if not any(kind.type == "cpu" for kind in beneath._device_types):
            device = torch.device("cuda", torch.cuda.current_device())
        self.comm = Communicator(
            beneath, device=device, timeout=config.seconds, statement={"config": repr(config)}
        )
        self.table = table_of(self.comm, config, compresses)

    def allreduce(self, tensors: Any, options: Any = None) -> Any:  # type: ignore[override]
        """In place; a Work."""
        given = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        options = dist.AllreduceOptions() if options is None else options
        if not isinstance(options, dist.AllreduceOptions):  # a plain ReduceOp
            reduce_op, options = options, dist.AllreduceOptions()
            options.reduceOp = reduce_op
        mean = _SUMS.get(_name_of(options.reduceOp))
        is_ours = len(given) == 1 and mean is not None and self._serves(given[0])
        if not is_ours:
            return self.beneath.allreduce(given, options)
        tensor = given[0]
        size = tensor.numel() * tensor.element_size()
        plan = plan_of(
            self.config,
            size,
            tensor.dtype,
            self.comm.hosts,
            tensor.device.type,
            self.compresses,
            table=self.table,
        )
        pending = self.comm.all_reduce(tensor, plan, mean=bool(mean), async_op=True)
        assert isinstance(pending, PendingReduction)
        return ReductionWork(pending)

    def _serves(self, tensor: Tensor) -> bool:
        is_there = tensor.device.type == self.comm.device.type
        return is_there and tensor.dtype in DTYPES and tensor.is_contiguous() and not tensor.is_sparse

    def getBackendName(self) -> str:  # torch has this name
        """The name that torch shows."""
        return "deepep"

    @property
    def group_name(self) -> Any:
        """The name of the group beneath, by which functional collectives find it."""
        return self.beneath.group_name

    def get_group_store(self) -> Any:
        """The store through which the group beneath met, for a Buffer or a communicator on this one."""
        return store_of(self.beneath)

    @property
    def _device_types(self) -> Any:
        return self.beneath._device_types

    def close(self) -> None:
        """Ends the communicator; the group beneath remains. Collective."""
        self.comm.close()


class ReductionWork(dist.Work):
    """torch's Work over a reduction under way."""

    def __init__(self, pending: PendingReduction) -> None:
        super().__init__()
        self.pending = pending

    def wait(self, timeout: Any = None) -> bool:
        """True once the tensor is reduced; raises what the operation raised."""
        self.pending.wait()
        return True

    def is_completed(self) -> bool:
        """True if the operation has ended."""
        return self.pending.is_completed()

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of the list of tensors, as torch's works have it."""
        return self.pending.get_future().then(lambda ended: [ended.value()])


def _forward(name: str) -> Any:
    def call(self: CommGroup, *arguments: Any, **options: Any) -> Any:
        return getattr(self.beneath, name)(*arguments, **options)

    call.__name__ = name
    return call


for _name in FORWARDED:
    if hasattr(dist.ProcessGroup, _name):
        setattr(CommGroup, _name, _forward(_name))


def _name_of(op: Any) -> str:
    """SUM, AVG, ...: of a ReduceOp or of one of its kinds."""
    for name in ("SUM", "AVG"):
        if op == getattr(dist.ReduceOp, name):
            return name
    return ""
