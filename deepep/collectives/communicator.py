"""Communicator: all-reduces between the ranks of a group, each by a plan that all of them pass alike."""

from __future__ import annotations

import hashlib
import socket
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from deepep.collectives.codecs import FIXED
from deepep.collectives.cost import LinkSpeeds
from deepep.collectives.nvlink import DTYPES as NVLINK_DTYPES
from deepep.collectives.nvlink import NvlinkReducer
from deepep.collectives.plan import ReductionPlan
from deepep.collectives.probe import probe
from deepep.collectives.reducing import reduce
from deepep.collectives.scattering import reduce_scatter
from deepep.collectives.step_operations import StepOperations
from deepep.collectives.transport import PointToPoint, Steps, Transfer, drive
from deepep.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeepEPError,
    DeviceError,
    LayoutError,
    PeerTimeoutError,
    ShapeError,
)
from deepep.runtime.checks import check_int, check_memory
from deepep.runtime.completion import Completion, HostCompletion
from deepep.runtime.control import agreement
from deepep.runtime.control.agreement import NO_LIMIT, dtype_code
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.processes import only_here
from deepep.runtime.control.shrinking import Course
from deepep.runtime.control.transport import Link
from deepep.runtime.engine import Observer
from deepep.runtime.requests import Operation, Schedule
from deepep.runtime.session import Session, membership_of

if TYPE_CHECKING:
    from typing_extensions import Self

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CALLS, _ASIDE = 1, 64  # the limit of a rank that calls; the tag of what is given aside
_ASYNCHRONOUS = Schedule(asynchronous=True)


class PendingReduction:
    """An all-reduce under way, to be waited for like a torch.distributed Work.

    Once it is done: seconds: from when all ranks had come to it, on the CPU. callers: the ranks that passed
    `calls`. aside: what ranks passed so, by rank.
    """

    def __init__(self, tensor: Tensor, done: Future[Tensor]) -> None:
        self.tensor, self._done = tensor, done
        self.seconds = 0.0
        self.callers: frozenset[int] = frozenset()
        self.aside: list[Tensor] = []
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


class Communicator(StepOperations):
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
        self.group, self.bytes_sent = group, 0
        self._nvlink: tuple[Link, NvlinkReducer | None] | None = None
        try:
            self._facts = {"host": socket.gethostname()}
            met = agreement.agree(membership, "arrived", statement or {}, None, self._facts)
            self._hosts = {rank: str(facts["host"]) for rank, facts in met.items()}
            self._control = ControlPlane(session, membership, {"device": self.device.type})
            self._control.agree({})
        except DeepEPError:
            raise
        except BaseException as error:
            membership.withdraw(agreement.reason(membership.rank, error))
            raise
        self._finalizer = weakref.finalize(self, only_here(self._control.abandon))

    # who takes part

    @property
    def num_ranks(self) -> int:
        """The number of members: R, in plans and sums."""
        return len(self.members)

    @property
    def rank(self) -> int:
        """This rank's place among the members, which is its rank in plans."""
        return self.members.index(self._control.rank)

    @property
    def hosts(self) -> list[str]:
        """The host of each member."""
        return [self._hosts[rank] for rank in self.members]

    # operations

    def all_reduce(
        self,
        tensor: Tensor,
        plan: ReductionPlan | None = None,
        *,
        mean: bool = False,
        dice: tuple[int, int, int] | None = None,
        async_op: bool = False,
        statement: str = "",
        calls: bool = False,
        aside: Tensor | None = None,
        inspect: Callable[[Tensor], None] | None = None,
    ) -> Tensor | PendingReduction:
        """Replaces `tensor` by its sum, or mean, over all ranks: the same bits on each of them.

        tensor: float32, bfloat16, float16 or float64, of any shape, the same on all ranks, contiguous.
        Float64 is never compressed. plan: by default direct, in fixed point. dice: seed, step and tensor,
        by which a lossy codec rounds stochastically; None rounds to nearest. async_op: returns at once,
        with something to wait for. statement: what else all ranks have to pass alike. calls: something that
        all ranks learn of this one. aside: [K] float64 on the CPU, given to all ranks beside the tensor.
        inspect: called with the result, [N], before anybody learns that it is there.

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
                "aside": 0 if aside is None else aside.numel(),
            }

            def issue(body: Callable[[Link, frozenset[int]], None]) -> Completion:
                return self._control.perform(
                    Operation.ALL_REDUCE,
                    _ASYNCHRONOUS,
                    lambda link, limits: body(link, frozenset(r for r, n in limits.items() if n == _CALLS)),
                    agreed=agreed,
                    limit=_CALLS if calls else NO_LIMIT,
                    tensors=(tensor,),
                )

            pending = self._issue(tensor, plan, mean, dice, issue, aside, inspect)
        return pending if async_op else pending.wait()

    def continue_with(
        self,
        tensor: Tensor,
        plan: ReductionPlan,
        *,
        mean: bool,
        dice: tuple[int, int, int] | None,
        unless: Callable[[], bool],
        inspect: Callable[[Tensor], None] | None = None,
    ) -> PendingReduction:
        """A further reduction that belongs to the one issued last, without another comparison of arguments:
        buckets of one backward, whose sizes all ranks know. unless: asked in its turn; True leaves it out.
        """
        with self._control.issuing:

            def issue(body: Callable[[Link, frozenset[int]], None]) -> Completion:
                def perhaps(link: Link) -> None:
                    if not unless():
                        body(link, frozenset())

                return self._control.proceed("bucket", _ASYNCHRONOUS, perhaps, (tensor,))

            return self._issue(tensor, plan.for_ranks(self.num_ranks), mean, dice, issue, None, inspect)

    def reduce_scatter(
        self,
        out: Tensor,
        tensor: Tensor,
        codec: str = FIXED,
        *,
        mean: bool = False,
        dice: tuple[int, int, int] | None = None,
    ) -> None:
        """Writes to `out` [N] the sum, or mean, over all ranks of this rank's part of `tensor` [R * N].

        Both of one dtype, as for `all_reduce`. Waits for the result; on CUDA, the current stream does. Raises
        as `all_reduce`, and ShapeError for sizes that do not fit.
        """
        plan = ReductionPlan("oneshot", codec)
        with self._control.issuing:
            self._control.check_alive()
            try:
                for given in (tensor, out):
                    self._check(given, plan, dice)
                if out.dtype != tensor.dtype or out.numel() * self.num_ranks != tensor.numel():
                    got = f"{out.numel()} of {out.dtype}".replace("torch.", "")
                    allowed = f"{tensor.numel()} / {self.num_ranks} of {tensor.dtype}".replace("torch.", "")
                    raise ShapeError("out", got, allowed)
            except ArgumentError as problem:
                self._control.refuse(Operation.REDUCE_SCATTER, problem, Schedule())

            def body(link: Link, limits: Mapping[int, int]) -> None:
                net, divisor = PointToPoint(link), self.num_ranks if mean else 1
                flat, parts = out.detach().view(-1), tensor.detach().view(self.num_ranks, -1)
                reduce_scatter(net, flat, parts, codec, divisor, dice)
                self.bytes_sent += net.bytes_sent

            agreed = {
                "elements": tensor.numel(),
                "dtype": dtype_code(tensor.dtype),
                "mean": mean,
                "plan": digest_of(codec, dice),
            }
            completion = self._control.perform(
                Operation.REDUCE_SCATTER, _ASYNCHRONOUS, body, agreed=agreed, tensors=(tensor, out)
            )
        completion.current_stream_wait()

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
        issue: Callable[[Callable[[Link, frozenset[int]], None]], Completion],
        aside: Tensor | None = None,
        inspect: Callable[[Tensor], None] | None = None,
    ) -> PendingReduction:
        devices: list[int | str | torch.device] | None = [tensor.device] if tensor.is_cuda else None
        done: Future[Tensor] = Future(devices=devices)
        pending = PendingReduction(tensor, done)

        def body(link: Link, callers: frozenset[int]) -> None:
            net = PointToPoint(link)
            started, pending.callers = time.perf_counter(), callers
            try:
                # One element may have a stride of 0 and be contiguous; its bytes could not be viewed.
                out = tensor.detach().as_strided((tensor.numel(),), (1,))
                beside = [] if aside is None else [self._give(net, aside, pending)]
                self._reduce(net, out, plan, self.num_ranks if mean else 1, dice, beside)
                if inspect is not None:
                    inspect(out)
            finally:
                pending.seconds = time.perf_counter() - started
                self.bytes_sent += net.bytes_sent

        completion = pending._completion = issue(body)
        if isinstance(completion, HostCompletion):
            completion.future.add_done_callback(lambda ended: _settle(done, tensor, ended.exception()))
        else:
            with torch.cuda.stream(self._control.session.stream):
                done.set_result(tensor)
        return pending

    def _reduce(
        self,
        net: PointToPoint,
        out: Tensor,
        plan: ReductionPlan,
        divisor: int,
        dice: tuple[int, int, int] | None,
        beside: Sequence[Steps],
    ) -> None:
        kernels = None
        if plan.schedule == "nvlink" and out.is_cuda and out.dtype in NVLINK_DTYPES and net.num_ranks > 1:
            kernels = self._nvlink_of(self._control.membership.control())
        if kernels is None:
            reduce(net, out, plan, divisor, dice, beside)
            return
        self.bytes_sent += kernels.all_reduce(out, plan.codec, divisor, dice)
        drive(beside)

    def _nvlink_of(self, link: Link) -> NvlinkReducer | None:
        """The kernels' memory among the members, made by their first reduction; None where it cannot be."""
        if self._nvlink is None or self._nvlink[0] is not link:
            self._release()
            is_near = len({self._hosts[rank] for rank in link.members}) == 1
            timeout = self._control.timeout
            self._nvlink = link, NvlinkReducer.open(link, self.device, timeout) if is_near else None
        return self._nvlink[1]

    def _release(self) -> None:
        """Ends what kernels wait for on a link that is no more."""
        before, self._nvlink = self._nvlink, None
        if before is not None and before[1] is not None:
            before[1].release()

    def _check_device(self) -> None:
        if self._nvlink is not None and self._nvlink[1] is not None:
            self._nvlink[1].check()

    def survive(self, fault: PeerTimeoutError, min_members: int | None) -> Course:
        """As StepOperations has it; kernels of this rank wait for nobody any more."""
        self._release()
        return super().survive(fault, min_members)

    def _give(self, net: PointToPoint, aside: Tensor, pending: PendingReduction) -> Steps:
        """One round, beside a reduction's own: every rank's `aside` to every other."""
        pending.aside = [aside if rank == net.rank else aside.clone() for rank in range(net.num_ranks)]
        messages: list[Transfer] = [(t.view(torch.uint8), rank) for rank, t in enumerate(pending.aside)]
        mine = messages.pop(net.rank)[0]
        yield net.exchange([(mine, rank) for _, rank in messages], messages, _ASIDE)

    # measuring

    def probe(self) -> LinkSpeeds:
        """Measured speeds of the links between the ranks, the same on all of them. Collective, on the CPU."""
        found: list[LinkSpeeds] = []

        def body(link: Link) -> None:
            found.append(probe(PointToPoint(link), lambda values: _gathered(link, values)))

        self._perform(Operation.PROBE, body, {"numbers": 0})
        return found[0]

    def gather(self, values: list[float]) -> list[list[float]]:
        """Every rank's numbers, as many on each, by rank. Collective."""
        found: list[list[float]] = []
        agreed = {"numbers": len(values)}
        membership = self._control.membership
        self._perform(
            Operation.PROBE, lambda link: found.extend(_gathered(membership.control(), values)), agreed
        )
        return found

    def observe(self, observer: Observer | None) -> None:
        """Has `observer(operation, phase)` called where operations begin their phases, for tests."""
        self._control.observer = observer

    # the end

    def close(self) -> None:
        """Ends the communicator; collective, waits for the other ranks up to the time-out. Idempotent."""
        if self._finalizer.detach():
            self._control.leave()

    def abandon(self) -> None:
        """Ends it on this rank, whose peers learn that it will not come. Idempotent."""
        if self._finalizer.detach():
            self._release()
            self._control.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()


def _gathered(link: Link, values: list[float]) -> list[list[float]]:
    found = link.all_gather(torch.tensor(values, dtype=torch.float64, device="cpu"))
    return [found[rank].tolist() for rank in sorted(found)]


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
