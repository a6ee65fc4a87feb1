"""Attempts: training steps that go on without ranks that died, each applied by all survivors or by none.

A step's gradients count once every rank has its sums (`Communicator.commit`), at the end of the backward: so
what comes after, clipping, a GradScaler, the optimizer, works on gradients that all have. A rank that is
missing by then is left out. Either every survivor has its sums, and they count, or all of them sum again what
each has kept of its own; where a forward or a backward has failed there is nothing to sum, and the body of
the attempt runs again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import AllgatherOptions

# What torch's own process groups in Python return; it has no public name, and no type.
from torch._C._distributed_c10d import _create_work_from_future as work_of  # type: ignore[attr-defined]
from torch.futures import Future

from deepep.collectives import Communicator
from deepep.errors import ModeError, PeerTimeoutError, RangeError
from deepep.parallel.exchanges import Exchanges, check_experts
from deepep.parallel.expert_backup import ExpertBackup
from deepep.parallel.expert_return import ExpertReturn
from deepep.parallel.joining import Admissions
from deepep.parallel.state import optimizers_in
from deepep.runtime.checks import MOST, check_int
from deepep.runtime.control.shrinking import Course

if TYPE_CHECKING:
    from deepep.parallel.ddp import DistributedDataParallel
    from deepep.parallel.hook import Bucket, BucketReducer

KEEP = ("buckets", "recompute")
_MOST_FAULTS = 10
"""Faults in a row, without a step that counts between them, after which a rank gives up."""


@dataclass
class HeldBucket:
    """A bucket whose sums do not count yet. own: this rank's gradients, [N], which torch's reducer keeps
    until its next backward; sums: [N], of all ranks, once they are there; done: what that reducer waits for.
    """

    own: Tensor
    sums: Tensor
    done: Future[Tensor]


class AttemptFailed(Exception):
    """Ends an attempt that is made again; internal, `StepAttempt` takes it."""


class StepCollectives(dist.ProcessGroup):
    """Collectives of torch's DDP itself (module buffers, the order of buckets, unused parameters) and of
    clipping, between the members of a communicator and in its order, so that a fault in one is a fault of the
    step.
    """

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm.rank, comm.num_ranks)  # type: ignore[call-arg]
        self.comm = comm

    def broadcast(self, tensors: Any, options: Any = None) -> Any:  # type: ignore[override]
        """In place, complete on return."""
        options = options or dist.BroadcastOptions()
        return self._run("broadcast", tensors, lambda group: group.broadcast(tensors, options))

    def allreduce(self, tensors: Any, options: Any = None) -> Any:  # type: ignore[override]
        """In place, complete on return."""
        options = options or dist.AllreduceOptions()
        return self._run("all_reduce", tensors, lambda group: group.allreduce(tensors, options))

    def allgather(self, outputs: Any, tensors: Any, options: Any = None) -> Any:
        """Complete on return."""
        options = options or AllgatherOptions()
        return self._run("all_gather", tensors, lambda group: group.allgather(outputs, tensors, options))

    def getBackendName(self) -> str:  # torch has this name
        """The name that torch shows."""
        return "deepep"

    def _run(self, name: str, tensors: list[Tensor], call: Callable[[dist.ProcessGroup], dist.Work]) -> Any:
        sizes = [tensor.numel() for tensor in tensors]
        device_type = tensors[0].device.type if tensors else "cpu"
        self.comm.collective(call, zlib.crc32(repr((name, sizes)).encode()), device_type)
        done: Future[Any] = _future_of(tensors)
        done.set_result(tensors)
        return work_of(done)


def _future_of(tensors: list[Tensor]) -> Future[Any]:
    """A future of tensors, which on GPUs has to know where."""
    devices: list[int | str | torch.device] = [tensor.device for tensor in tensors[:1] if tensor.is_cuda]
    return Future(devices=devices or None)


class Steps:
    """State that the attempts of one model have in common.

    renew: begins torch's reducer anew, among the members; with True they agree on the order of buckets at the
    next forward, which ranks may not know of each other after a fault, else they find the order of arrival.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        reducer: BucketReducer,
        renew: Callable[[bool], None],
        experts: Sequence[nn.Parameter] = (),
    ) -> None:
        self._experts = experts
        self._model, self._reducer, self._renew = model, reducer, renew
        self._exchanges = Exchanges(model, reducer.comm)
        self.keep = KEEP[0]
        self.min_members: int | None = None
        self.is_open = self.is_committed = False
        self._is_over = self._is_stale = self._is_renewed = False
        self._faults = 0
        self._held: dict[int, HeldBucket] = {}
        self._error: BaseException | None = None
        self._last_fault: PeerTimeoutError | None = None
        self._versions: list[int] = []  # of the weights, when the sums came to count
        self.admissions = Admissions(model, reducer, self)
        self._announced = 0

    def configure(
        self, keep: str | None, min_members: int | None, backup: int | None, state: Mapping[str, Any] | None
    ) -> None:
        """Sets what holds for attempts from now on. backup: steps after which experts are copied; None:
        never. Raises RangeError, ModeError or ArgumentTypeError.
        """
        exchanges = bool(self._exchanges.layers)
        if keep is None:
            keep = KEEP[exchanges]
        if keep not in KEEP:
            raise RangeError("keep", repr(keep), " or ".join(map(repr, KEEP)))
        if (
            exchanges and keep == KEEP[0]
        ):  # gradients of experts, and through them, have the dead rank's share
            raise ModeError("keep", repr(keep), f"{KEEP[1]!r}, for a model whose layers exchange tokens")
        if min_members is not None:
            check_int("min_members", min_members, 1, MOST)
        self.keep, self.min_members = keep, min_members
        self.configure_backup(backup, state or {})

    def configure_backup(self, every: int | None, state: Mapping[str, Any]) -> None:
        """Sets after how many steps experts are copied, as of `configure`."""
        exchanges = self._exchanges
        if every is None:
            exchanges.backup = None
            return
        check_int("expert_backup", every, 1, MOST)
        optimizers = optimizers_in(state)
        backup = exchanges.backup
        if backup is None or (backup.every, backup.optimizers) != (every, optimizers):
            check_experts(exchanges.layers, self._experts, optimizers)
            if (device := self._reducer.comm.device).type != "cpu":
                raise ModeError("expert_backup", f"a model on {device}", "a model on the CPU, or None")
            exchanges.backup = ExpertBackup(exchanges.layers, self._reducer.comm, optimizers, every)

    # between two steps

    def admit(self) -> None:
        """Takes in who was announced when the last step was committed. Raises what `survive` does."""
        if self._announced:
            self.secure_experts(True)  # so that no step of the experts is lost whose rank dies meanwhile
        announced, self._announced = self._announced, 0
        if announced:
            self.admissions.admit(announced)

    def expert_return(self) -> ExpertReturn | None:
        """Hand-over of experts to ranks that join; None for a model without."""
        backup = self._exchanges.backup
        return None if backup is None else ExpertReturn(backup)

    def give_back_experts(
        self, members: Collection[int], newcomers: Collection[int]
    ) -> Callable[[], None] | None:
        """Gives newcomers their experts. Returns a function that has layers and buffers go on with them, to
        be called once all have theirs; None for a model without. Collective. Raises PeerTimeoutError.
        """
        giving = self.expert_return()
        if giving is None:
            return None
        adopt, everybody = giving.give_back(members, newcomers), self._reducer.comm.members

        def adopt_with_buffers() -> None:
            adopt()
            self._exchanges.admit(everybody)

        return adopt_with_buffers

    def secure_experts(self, afresh: bool = False) -> None:
        """Before an attempt: restores experts of ranks that died, as far as there are copies, and has copies
        be made, if they are due. afresh: if they are of an earlier step. Raises what `survive` does;
        MismatchError.
        """
        while (backup := self._exchanges.backup) is not None:
            try:
                moves, placements = backup.moves()
                if moves:
                    self._carry_out(backup.restore(moves, placements))
                elif backup.is_due(self._reducer.step, afresh):
                    self._carry_out(backup.refresh(self._reducer.step))
                else:
                    self._exchanges.leave_out()
                    return
            except PeerTimeoutError as fault:
                self.survive(fault, self.min_members)
                self.begin_anew()

    def restored(self) -> dict[tuple[int, int], int]:
        """Experts that were restored, by layer and number: to what they were after so many steps."""
        backup = self._exchanges.backup
        return {} if backup is None else dict(backup.restored)

    def _carry_out(self, adopt: Callable[[], None]) -> None:
        """Calls `adopt` on all members, or on none: once each has come here."""
        try:
            self._reducer.comm.commit(self._reducer.step)
        except PeerTimeoutError as fault:
            course = self.survive(fault, self.min_members)
            self.begin_anew()
            if course is not Course.GO_ON:
                return
        adopt()

    # of a backward

    def hold(self, bucket: Bucket) -> HeldBucket:
        """A place for the sums of a bucket, until they count."""
        own = bucket.buffer()
        held = self._held[bucket.index()] = HeldBucket(own, own.clone(), _future_of([own]))
        return held

    def settle(self, failure: BaseException | None) -> None:
        """At the end of a backward, whose sums have met `failure`, before torch's reducer takes them: returns
        once they count on every survivor, or it is known that they do not (`finish`).
        """
        try:
            if self.is_committed:
                allowed = "one backward that reduces gradients in an attempt; those before it in no_sync()"
                raise ModeError("backward", "a second one", allowed)
            self._commit(failure)
        except Exception as error:  # `finish` raises it: inside autograd it would leave the reducer half done
            self._error = error
        for held in self._held.values():
            held.done.set_result(held.sums)
        self._held.clear()

    def finish(self) -> None:
        """After torch's reducer. Raises AttemptFailed if the attempt has to be made again; a failure of the
        sums that is no missing rank's; what `Communicator.survive` does.
        """
        error, self._error = self._error, None
        if self._is_stale or self._is_renewed:
            self.begin_anew()
        if error is not None:
            raise error

    def begin_anew(self, is_stale: bool = False) -> None:
        """Begins torch's reducer anew, among the members. is_stale: as `renew` has it."""
        self._is_stale = self._is_stale or is_stale
        self._renew(self._is_stale)
        self._is_stale, self._is_renewed = False, self._is_stale

    def _commit(self, failure: BaseException | None) -> None:
        comm = self._reducer.comm
        while True:
            try:
                if failure is not None:
                    raise failure
                self._exchanges.sum_replicas()
                self._announced = comm.commit(self._reducer.step, self.admissions.news())
                break
            except PeerTimeoutError as fault:
                course = self.survive(fault, self.min_members)
                if course is Course.GO_ON:
                    break
                if course is Course.RESTART or self.keep == "recompute":
                    raise AttemptFailed from fault
            failure = self._reducer.sum_again(self._held)
        self.is_committed = True
        self._faults = 0
        self._versions = self._versions_now()

    def after_sums(self, exchange: Callable[[], object]) -> None:
        """Makes an exchange of what comes between a backward and the optimizer, and in an attempt commits it:
        nobody goes on with it whom the others do not follow. Raises AttemptFailed if a rank is missing in it,
        or since the sums were made: the body then runs again, on all that are left; what `survive` does;
        PeerTimeoutError if weights have changed since the sums, and it cannot.
        """
        if not (self.is_open and self.is_committed):
            exchange()
            return
        comm, fault = self._reducer.comm, self._last_fault
        if comm.members == self._reducer.members:
            try:
                exchange()
                comm.commit(self._reducer.step)
                return
            except PeerTimeoutError as failed:
                fault, course = failed, self.survive(failed, self.min_members)
                self.begin_anew()
                if course is Course.GO_ON:
                    return
        assert fault is not None
        if self._versions != self._versions_now():
            self._is_over = True
            raise fault
        self._reducer.step -= 1
        self.is_committed = False
        raise AttemptFailed from fault

    def _versions_now(self) -> list[int]:
        """Numbers that change with the weights."""
        return [parameter._version for parameter in self._model.parameters()]

    def survive(self, fault: PeerTimeoutError, min_members: int | None) -> Course:
        """As `Communicator.survive`; with plans for those who are left."""
        comm = self._reducer.comm
        self._faults += 1
        self._last_fault = fault
        self._announced = 0  # not all may have learned of it
        try:
            if self._faults > _MOST_FAULTS:
                raise fault
            before = comm.members
            course = comm.survive(fault, min_members)
        except PeerTimeoutError:
            self._is_over = True
            raise
        self._reducer.restart()
        self._is_stale = True
        self._exchanges.go_on(before)
        return course

    # of an attempt

    def begin(self) -> None:
        """An attempt begins: notes what its backward and its forward will change."""
        self.is_open, self.is_committed = True, False
        self._held.clear()
        self._reducer.share_steps()  # by who has joined, too
        self._exchanges.begin()
        self._gradients = [(p, None if p.grad is None else p.grad.clone()) for p in self._model.parameters()]
        counters = self._exchanges.counters()
        self._buffers = [(buffer, buffer.clone()) for buffer in (*self._model.buffers(), *counters)]
        self._random = torch.get_rng_state()
        device = self._reducer.comm.device
        self._device_random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def end(self, error: BaseException | None) -> bool:
        """An attempt has ended, by `error` perhaps: whether it has to be made again."""
        self.is_open = False
        try:
            return self._has_failed(error)
        finally:
            self._exchanges.end()

    def _has_failed(self, error: BaseException | None) -> bool:
        failed = isinstance(error, AttemptFailed)
        if isinstance(error, PeerTimeoutError) and not (self._is_over or self.is_committed):
            # Of a collective in the forward, or of somebody else's: a Buffer's.
            self.survive(self._reducer.comm.give_up(error), self.min_members)
            self.begin_anew()
            failed = True
        if failed:
            with torch.no_grad():
                for parameter, gradient in self._gradients:
                    parameter.grad = gradient
                for buffer, values in self._buffers:
                    buffer.copy_(values)
            torch.set_rng_state(self._random)
            if self._device_random is not None:
                torch.cuda.set_rng_state(self._device_random, self._reducer.comm.device)
        self._gradients, self._buffers = [], []
        self._reducer.end_step(self.is_committed and not failed)
        if failed:
            self.secure_experts()
        return failed


class StepAttempt:
    """One run of a step's body: `with attempt: ...`. is_done: the step needs no other."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.is_done = False

    def __enter__(self) -> StepAttempt:
        self._steps.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        again = self._steps.end(error)
        self.is_done = not again
        return again
