"""Communicator: all-reduces between the ranks of a group, each by a plan that all of them pass alike."""

from __future__ import annotations

import hashlib
import socket
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from deepep.collectives import codecs
from deepep.collectives.codecs import FIXED, LOSSY, PLAIN, FixedPoint, Messages
from deepep.collectives.plan import ReductionPlan
from deepep.collectives.schedules import PARTIAL, RESULT, Reduction, shares
from deepep.collectives.transport import PointToPoint, Steps, drive
from deepep.errors import ArgumentError, ArgumentTypeError, DeepEPError, DeviceError, LayoutError
from deepep.runtime.checks import check_int, check_memory
from deepep.runtime.completion import Completion, HostCompletion
from deepep.runtime.control import agreement
from deepep.runtime.control.agreement import dtype_code
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.processes import only_here
from deepep.runtime.control.transport import Link
from deepep.runtime.requests import Operation, Schedule
from deepep.runtime.session import Session, membership_of

if TYPE_CHECKING:
    from typing_extensions import Self

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ASYNCHRONOUS = Schedule(asynchronous=True)


class PendingReduction:
    """An all-reduce under way, to be waited for like a torch.distributed Work."""

    def __init__(self, tensor: Tensor, done: Future[Tensor]) -> None:
        self.tensor, self._done = tensor, done
        self._completion: Completion | None = None

    def wait(self) -> Tensor:
        """The reduced tensor. On the CPU this blocks, and raises what the operation raised; on CUDA the
        current stream waits for it.
        """
        assert self._completion is not None
        self._completion.current_stream_wait()
        return self.tensor

    def is_completed(self) -> bool:
        """True if the tensor has its result, or the operation failed."""
        return self._done.done()

    def get_future(self) -> Future[Tensor]:
        """A torch future of the tensor, as hooks of torch's DDP return it."""
        return self._done


class Communicator:
    """Sums and means of tensors over the ranks of a process group. One object per rank, constructed by all.

        with Communicator(group) as comm:
            comm.all_reduce(gradient, ReductionPlan("direct", "fp8"), mean=True)

    group: a torch.distributed process group; tensors travel on a private one made from its store: gloo for
        the CPU, NCCL for CUDA tensors.
    device: where tensors lie, "cpu" or this rank's CUDA device.
    timeout: seconds a rank waits for the others.
    statement: what else all ranks have to pass alike.

    Operations run in the order of the calls, on a thread of their own (CPU) or the communication stream
    (CUDA). bytes_sent: payload that this rank has sent, not counting words of agreement. Raises
    MismatchError if ranks construct different things, PeerTimeoutError if not all of them come.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        device: torch.device | str = "cpu",
        timeout: float = 100.0,
        statement: Mapping[str, int | str] | None = None,
    ) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise ArgumentTypeError("group", type(group).__name__, "a torch.distributed process group")
        self.device = torch.device(device)
        session, membership = Session.of(group, self.device), membership_of(group, timeout)
        self.rank, self.num_ranks, self.group = session.rank, session.num_ranks, group
        self.bytes_sent = 0
        try:
            facts = {"host": socket.gethostname()}
            met = agreement.agree(membership, "arrived", statement or {}, None, facts)
            self.hosts = [str(met[rank]["host"]) for rank in range(self.num_ranks)]
            self._control = ControlPlane(session, membership, {"device": self.device.type})
            self._control.agree({})
        except DeepEPError:
            raise
        except BaseException as error:
            membership.withdraw(agreement.reason(membership.rank, error))
            raise
        self._finalizer = weakref.finalize(self, only_here(self._control.abandon))

    def all_reduce(
        self,
        tensor: Tensor,
        plan: ReductionPlan | None = None,
        *,
        mean: bool = False,
        dice: tuple[int, int, int] | None = None,
        async_op: bool = False,
        statement: str = "",
    ) -> Tensor | PendingReduction:
        """Replaces `tensor` by its sum, or mean, over all ranks: the same bits on each of them.

        tensor: float32, bfloat16, float16 or float64, of any shape, the same on all ranks, contiguous.
        Float64 is never compressed. plan: by default direct, in fixed point. dice: seed, step and tensor,
        by which a lossy codec rounds stochastically; None rounds to nearest. async_op: returns at once,
        with something to wait for. statement: what else all ranks have to pass alike.

        Raises, on all ranks, ArgumentTypeError, DeviceError, LayoutError or RangeError for what one of them
        passes, MismatchError if they pass different things; PeerTimeoutError if one is missing.
        """
        with self._control.issuing:
            self._control.check_alive()
            try:
                plan = self._check(tensor, plan, dice)
            except ArgumentError as problem:
                self._control.refuse(Operation.ALL_REDUCE, problem, Schedule())
            agreed = {
                "elements": tensor.numel(),
                "dtype": dtype_code(tensor.dtype),
                "mean": mean,
                "plan": digest_of(repr(plan), dice, statement),
            }

            def issue(body: Callable[[Link], None]) -> Completion:
                return self._control.perform(
                    Operation.ALL_REDUCE,
                    _ASYNCHRONOUS,
                    lambda link, limits: body(link),
                    agreed=agreed,
                    tensors=(tensor,),
                )

            pending = self._issue(tensor, plan, mean, dice, issue)
        return pending if async_op else pending.wait()

    def continue_with(
        self,
        tensor: Tensor,
        plan: ReductionPlan,
        *,
        mean: bool,
        dice: tuple[int, int, int] | None,
        unless: Callable[[], bool],
    ) -> PendingReduction:
        """A further reduction that belongs to the one issued last, without another comparison of arguments:
        buckets of one backward, whose sizes all ranks know. unless: asked in its turn; True leaves it out.
        """
        with self._control.issuing:

            def issue(body: Callable[[Link], None]) -> Completion:
                def perhaps(link: Link) -> None:
                    if not unless():
                        body(link)

                return self._control.proceed("bucket", _ASYNCHRONOUS, perhaps, (tensor,))

            return self._issue(tensor, plan.for_ranks(self.num_ranks), mean, dice, issue)

    def _check(
        self, tensor: object, plan: ReductionPlan | None, dice: tuple[int, int, int] | None
    ) -> ReductionPlan:
        check_memory("tensor", tensor)
        assert isinstance(tensor, Tensor)
        if tensor.dtype not in DTYPES:
            allowed = "float32, bfloat16, float16 or float64"
            raise ArgumentTypeError("tensor", str(tensor.dtype).removeprefix("torch."), allowed)
        if tensor.device.type != self.device.type:
            raise DeviceError("tensor", str(tensor.device), f"{self.device}, the communicator's")
        if not tensor.is_contiguous():
            raise LayoutError("tensor", f"strides {list(tensor.stride())}", "a contiguous tensor")
        if plan is not None and not isinstance(plan, ReductionPlan):
            raise ArgumentTypeError("plan", type(plan).__name__, "a ReductionPlan")
        if dice is not None:
            if not isinstance(dice, tuple) or len(dice) != 3:
                raise ArgumentTypeError("dice", repr(dice)[:100], "three integers: seed, step and tensor")
            for number in dice:
                check_int("dice", number, -(2**63), 2**63 - 1)
        return (plan or ReductionPlan()).for_ranks(self.num_ranks)

    def _issue(
        self,
        tensor: Tensor,
        plan: ReductionPlan,
        mean: bool,
        dice: tuple[int, int, int] | None,
        issue: Callable[[Callable[[Link], None]], Completion],
    ) -> PendingReduction:
        devices: list[int | str | torch.device] | None = [tensor.device] if tensor.is_cuda else None
        done: Future[Tensor] = Future(devices=devices)
        pending = PendingReduction(tensor, done)

        def body(link: Link) -> None:
            net = PointToPoint(link)
            try:
                # One element may have a stride of 0 and be contiguous; its bytes could not be viewed.
                out = tensor.detach().as_strided((tensor.numel(),), (1,))
                reduce(net, out, plan, self.num_ranks if mean else 1, dice)
            finally:
                self.bytes_sent += net.bytes_sent

        completion = pending._completion = issue(body)
        if isinstance(completion, HostCompletion):
            completion.future.add_done_callback(lambda ended: _settle(done, tensor, ended.exception()))
        else:
            with torch.cuda.stream(self._control.session.stream):
                done.set_result(tensor)
        return pending

    # the end

    def close(self) -> None:
        """Ends the communicator; collective, waits for the other ranks up to the time-out. Idempotent."""
        if self._finalizer.detach():
            self._control.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._finalizer.detach():
            self._control.abandon()


def reduce(
    net: PointToPoint,
    out: Tensor,
    plan: ReductionPlan,
    divisor: int,
    dice: tuple[int, int, int] | None,
) -> None:
    """Replaces `out` [N] by its sum over the ranks, divided; a plan that `for_ranks` has made."""
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    outer = plan.codec if wide == torch.float32 else PLAIN
    inner = (plan.inner or plan.codec) if wide == torch.float32 else PLAIN
    values = out.to(wide)
    divided = values.new_full((), divisor)

    def finish(total: Tensor, begin: int) -> Tensor:
        return torch.div(total, divided)  # a tensor: a number would go by way of its reciprocal on CUDA

    if outer == FIXED:
        exponents = FixedPoint.exponents_of(values)
        drive([_until_agreed(net, exponents)])
        fixed = FixedPoint(exponents, codecs.headroom_of(net.num_ranks))
        values = fixed.encode(values)

        def finish(total: Tensor, begin: int) -> Tensor:
            return fixed.part(begin, begin + total.numel()).decode(total, float(divisor))

    def messages(level: int, sender: int) -> Messages:
        if level == RESULT:
            name, dtype = (outer if outer in LOSSY else PLAIN), out.dtype
        elif values.dtype == torch.int32:
            name, dtype = PLAIN, values.dtype
        elif level == PARTIAL:
            name, dtype = outer, wide
        else:
            name = inner if plan.schedule == "hierarchical" else outer
            dtype = out.dtype
        key = None if dice is None or name == PLAIN else codecs.rounding_key(*dice, sender, level)
        return Messages(name, dtype, key)

    task = Reduction(plan, net, values, out, messages, finish)
    spans = shares((0, out.numel()), plan.pieces if plan.schedule != "ring" else 1)
    drive([task.steps(span, tag) for tag, span in enumerate(spans)])


def _until_agreed(net: PointToPoint, exponents: Tensor) -> Steps:
    """The maximum over the ranks, in place."""
    yield net.all_reduce(exponents, dist.ReduceOp(dist.ReduceOp.MAX))


def _settle(done: Future[Tensor], tensor: Tensor, error: BaseException | None) -> None:
    """Ends a torch future as the operation ended."""
    if error is None:
        done.set_result(tensor)
    else:  # torch's futures take no other kind, and would never end
        problem = error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
        done.set_exception(problem)  # type: ignore[arg-type]


def digest_of(*things: object) -> int:
    """A number that stands for things which all ranks have to pass alike."""
    return int.from_bytes(hashlib.blake2b(repr(things).encode(), digest_size=7).digest(), "little")
