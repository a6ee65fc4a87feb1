"""Experts in data parallelism: whose they are, how their gradients are scaled, and reduced over replicas.

R ranks, an expert on D of them: its gradient arrives as the sum over the losses of the R / D ranks that
exchange tokens with it, and is to be the mean over all R.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.futures import Future
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from deepep.errors import ArgumentTypeError, RangeError
from deepep.parallel.hook import BucketReducer, at_the_end_of_backward

_scalings: MutableMapping[Tensor, RemovableHandle] = WeakIdKeyDictionary()
"""The hooks of `scale_gradients`, by parameter."""
_reductions: MutableMapping[Tensor, RemovableHandle] = WeakIdKeyDictionary()
"""The hooks of an ExpertReducer, by parameter."""


def expert_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that not all ranks have: those that a submodule's `expert_parameters()` gives."""
    owned: set[int] = set()
    for part in module.modules():
        find = getattr(part, "expert_parameters", None)
        if callable(find):
            owned.update(id(parameter) for parameter in find())
    for name, parameter in module.named_parameters():
        if id(parameter) in owned:
            yield name, parameter


def scale_gradients(parameters: Iterable[nn.Parameter], factor: int, divisor: int) -> None:
    """Multiplies and divides what every backward adds to these parameters' gradients, in place of what an
    earlier call had it multiplied and divided by: a module may be wrapped again.
    """

    def scaled(gradient: Tensor) -> Tensor:
        return gradient * factor / divisor

    is_scaled = factor != divisor

    for parameter in parameters:
        if parameter in _scalings:
            _scalings.pop(parameter).remove()
        if parameter.requires_grad and is_scaled:
            _scalings[parameter] = parameter.register_hook(scaled)


def group_of_replicas(group: object) -> dist.ProcessGroup | None:
    """The process group that `expert_group` names: a group, or a device mesh of one dimension.

    Raises ArgumentTypeError or RangeError.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names or ("0", "1")
            allowed = f"one dimension of the mesh, as mesh[{names[0]!r}]"
            raise RangeError("expert_group", f"a mesh of {group.ndim} dimensions", allowed)
        return group.get_group()
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    raise ArgumentTypeError(
        "expert_group", type(group).__name__, "a process group that this rank is in, or a mesh"
    )


def check_replicas(module: nn.Module, num_ranks: int, num_replicas: int) -> None:
    """Raises RangeError unless the layers' experts, each on `num_replicas` ranks, are on all `num_ranks`."""
    for part in module.modules():
        shared_by = getattr(part, "num_expert_ranks", None)
        if shared_by is not None and shared_by * num_replicas != num_ranks:
            allowed = f"{num_ranks} ranks, as data parallelism has"
            if num_ranks % shared_by == 0:
                allowed = f"the group of the {num_ranks // shared_by} ranks that hold the same experts"
            got = f"{num_replicas} ranks, where layers exchange among {shared_by}"
            raise RangeError("expert_group", got, allowed)
    if num_ranks % num_replicas:
        raise RangeError("expert_group", f"{num_replicas} ranks", f"a divisor of {num_ranks}, the ranks")


def statement_of_experts(module: nn.Module) -> str:
    """Text that is the same on ranks that hold the same experts."""
    shapes = [(name, list(p.shape), str(p.dtype)) for name, p in expert_parameters(module)]
    numbers = [getattr(part, "expert_numbers", None) for part in module.modules()]
    return repr((shapes, [found for found in numbers if found is not None]))


@dataclass(frozen=True)
class ExpertBucket:
    """One parameter's gradient, as torch's reducer would give a bucket to its hook."""

    number: int
    gradient: Tensor
    last: bool

    def index(self) -> int:
        """Its place in the order of the backward."""
        return self.number

    def buffer(self) -> Tensor:
        """The gradient, which is reduced in place."""
        return self.gradient

    def is_last(self) -> bool:
        """True of the last one in a backward."""
        return self.last


class ExpertReducer:
    """Averages experts' gradients over the ranks that hold the same experts, in every backward.

    A parameter is a bucket: large ones are what experts have. They go in the order of the parameters from the
    last to the first, on every rank, each as soon as it and those before it are there, while the backward
    goes on; those without a gradient as zeros at its end, if another has one. syncs: False in a backward
    that only accumulates.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], reducer: BucketReducer, syncs: Callable[[], bool]
    ) -> None:
        self.parameters = [parameter for parameter in reversed(list(parameters)) if parameter.requires_grad]
        self.reducer, self.syncs = reducer, syncs
        self._ready: set[int] = set()
        self._pending: list[Future[Tensor]] = []
        self._is_under_way = False
        for number, parameter in enumerate(self.parameters):
            take = partial(_take, weakref.ref(self), number)
            _reductions[parameter] = parameter.register_post_accumulate_grad_hook(take)

    def take(self, number: int) -> None:
        """Reduces the gradient of a parameter that has it, and those that waited for it."""
        if not self.syncs():
            return
        if not self._is_under_way:
            self._is_under_way = True
            self._ready.clear()
            self._pending.clear()
            at_the_end_of_backward(self._finish)
        self._ready.add(number)
        while len(self._pending) in self._ready:
            self._start()

    def _start(self) -> None:
        number = len(self._pending)
        parameter = self.parameters[number]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif not parameter.grad.is_contiguous():
            parameter.grad = parameter.grad.contiguous()
        is_last = number == len(self.parameters) - 1
        self._pending.append(self.reducer.reduce(ExpertBucket(number, parameter.grad, is_last)))

    def _finish(self) -> None:
        self._is_under_way = False
        while len(self._pending) < len(self.parameters):
            self._start()
        for done in self._pending:
            done.wait()


def forget_reductions(parameters: Iterable[nn.Parameter]) -> None:
    """Ends what an earlier wrapper has done with these parameters' gradients."""
    for parameter in parameters:
        if parameter in _reductions:
            _reductions.pop(parameter).remove()


@torch.no_grad()
def make_equal(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Gives all replicas the weights of the first. Collective over the group."""
    for parameter in parameters:
        dist.broadcast(parameter.detach(), dist.get_global_rank(group, 0), group)


def _take(reducer: weakref.ref[ExpertReducer], number: int, parameter: Any) -> None:
    found = reducer()
    if found is not None:
        found.take(number)
