"""BucketReducer: what torch's DDP calls for every bucket of gradients, in place of its own all-reduce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from deepep.collectives import Communicator, ReductionPlan
from deepep.collectives.codecs import LOSSY
from deepep.parallel.config import ParallelConfig
from deepep.parallel.planning import plan_of


@dataclass
class BucketReducer:
    """Averages the buckets of one model's backwards over the ranks.

    step: backwards so far, by which dice differ. plans: of the last backward, by
    bucket. next_config: options that hold from the next backward on.
    """

    comm: Communicator
    config: ParallelConfig
    step: int = 0
    plans: dict[int, ReductionPlan] = field(default_factory=dict)
    next_config: ParallelConfig | None = None
    _failure: BaseException | None = None

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """Starts a bucket; its future is the bucket itself, reduced. Never raises inside autograd, which
        would leave torch's reducer half done: a bucket that fails is completed with what this rank has, and
        the failure raised once backward has come to its end.
        """
        index, tensor = bucket.index(), bucket.buffer()
        if index == 0:
            self._begin()
        in_backward = torch._C._current_graph_task_id() >= 0
        step = self.step
        if bucket.is_last():
            self.step += 1
            if in_backward:
                _at_the_end_of_backward(self._raise)
        if self._failure is not None:
            return _completed(tensor)
        try:
            pending = self._issue(index, step, tensor)
        except Exception as error:
            if not in_backward:
                raise
            self._failure = error
            return _completed(tensor)
        if tensor.is_cuda or not in_backward:  # a rank that has joined (`join`) waits for its buckets itself
            return pending
        done: Future[Tensor] = Future()

        def settle(ended: Future[Tensor]) -> None:
            try:
                ended.value()
            except Exception as error:
                self._failure = self._failure or error
            done.set_result(tensor)

        pending.add_done_callback(settle)
        return done

    def _begin(self) -> None:
        """Begins a backward, with the options that hold from now on."""
        if self.next_config is not None:
            self.config, self.next_config = self.next_config, None
        self.plans, self._failure = {}, None

    def _issue(self, index: int, step: int, tensor: Tensor) -> Future[Tensor]:
        size = tensor.numel() * tensor.element_size()
        plan = plan_of(self.config, size, tensor.dtype, self.comm.hosts, tensor.device.type)
        self.plans[index] = plan
        is_by_dice = plan.codec in LOSSY and self.config.rounding == "stochastic"
        dice = (self.config.seed, step, index) if is_by_dice else None
        if index == 0:
            # The whole of the options: those that make no difference to this bucket may to the next.
            pending = self.comm.all_reduce(
                tensor, plan, mean=True, dice=dice, async_op=True, statement=repr(self.config)
            )
            assert not isinstance(pending, Tensor)
        else:
            # The buckets' sizes are the ranks' common knowledge; and after a failure there is nothing to do.
            pending = self.comm.continue_with(
                tensor, plan, mean=True, dice=dice, unless=lambda: self._failure is not None
            )
        return pending.get_future()

    def _raise(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def reduce_bucket(state: BucketReducer, bucket: GradBucket) -> Future[Tensor]:
    """The communication hook, in the form that torch's register_comm_hook takes."""
    return state.reduce(bucket)


# torch reads the hook's annotations, and takes no text for them.
reduce_bucket.__annotations__.update({"bucket": GradBucket, "return": Future[Tensor]})


def _completed(tensor: Tensor) -> Future[Tensor]:
    future: Future[Tensor] = Future(devices=[tensor.device] if tensor.is_cuda else None)
    future.set_result(tensor)
    return future


def _at_the_end_of_backward(call: Callable[[], None]) -> None:
    """Calls after torch's reducer has waited for the buckets, in a callback that it queues after this one."""
    engine = torch.autograd.Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(call))
