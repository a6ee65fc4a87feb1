"""Experts' weights under a placement: equal replicas in training, and the way from one placement to another.

Tensors here are a rank's [L, ..], one entry a local expert: parameters, or what an optimizer keeps of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from deepep.errors import ArgumentError, ArgumentTypeError, MismatchError, ModeError, RangeError, ShapeError
from deepep.nn.precision import check_plain
from deepep.placement.experts import EMPTY, ExpertPlacement
from deepep.runtime.checks import check_int
from deepep.runtime.control.transport import gather_bytes

CHUNK = 1 << 24
"""Elements that one all_reduce takes, or one expert's replicas if they are more."""

_watched: MutableMapping[Tensor, RemovableHandle] = WeakIdKeyDictionary()
"""Hooks of the weights of replicated experts."""
_unsummed: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()
"""Those whose gradient is this rank's share alone."""
_is_watching = False


def checked_placement(placement: object, num_experts: int, num_ranks: int) -> ExpertPlacement | None:
    """The placement of a layer. Raises ArgumentTypeError or RangeError."""
    if placement is None:
        return None
    if not isinstance(placement, ExpertPlacement):
        raise ArgumentTypeError("placement", type(placement).__name__, "a deepep.placement.ExpertPlacement")
    if (placement.num_experts, placement.num_ranks) != (num_experts, num_ranks):
        got = f"{placement.num_experts} experts on {placement.num_ranks} ranks"
        raise RangeError("placement", got, f"{num_experts} experts on {num_ranks} ranks")
    return placement


def checked_change(placement: object, old: ExpertPlacement) -> ExpertPlacement:
    """A placement that a layer may go by after `old`, with as many places.

    Raises ArgumentTypeError or RangeError.
    """
    found = checked_placement(placement, old.num_experts, old.num_ranks)
    if found is None:
        raise ArgumentTypeError("placement", "None", "a deepep.placement.ExpertPlacement")
    if found.num_physical != old.num_physical:
        got = f"{found.num_physical} physical experts"
        raise RangeError("placement", got, f"{old.num_physical}, as now")
    return found


def agree_on(placement: ExpertPlacement, old: ExpertPlacement, group: Any) -> None:
    """Raises ArgumentTypeError, RangeError or MismatchError, on all ranks, unless all go from `old` to one
    placement of as many physical experts.
    """
    problem: ArgumentError | None = None
    digest = ""
    try:
        found = checked_change(placement, old)
        both = json.dumps([old.experts, found.experts])
        digest = hashlib.sha256(both.encode()).hexdigest()
    except ArgumentError as refused:
        problem = refused
    texts = [raw.decode() for raw in gather_bytes(group, (digest or f"! {problem}").encode())]
    if problem is not None:
        raise problem
    for rank, text in enumerate(texts):
        if text != digest:
            got = text[2:] if text.startswith("! ") else f"another here than on rank {rank}"
            raise MismatchError("placement", got, "the same on all ranks, before and after", rank)


def sum_replica_gradients(
    weights: Sequence[torch.nn.Parameter],
    placement: ExpertPlacement,
    rank: int,
    add_up: Callable[[Tensor], object],
) -> None:
    """Sums the gradients of an expert's replicas: `ExpertParallelMoE.sum_replica_gradients`.

    add_up: sums a tensor over the ranks that take part, in place.
    """
    for weight in weights:
        _unsummed.pop(weight, None)
    local, first = placement.num_local, rank * placement.num_local
    shared = [replicas for replicas in placement.replicas_of if len(replicas) > 1]
    for weight in weights:
        if not shared:
            return
        if not weight.requires_grad:  # an optimizer passes it by, as long as it has no gradient
            continue
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        gradient, size = weight.grad, max(1, weight[0].numel())
        for part in _parts(shared, CHUNK // size):
            rows = [physical for replicas in part for physical in replicas]
            sent = gradient.new_zeros(len(rows), *gradient.shape[1:])
            for row, physical in enumerate(rows):
                if physical // local == rank:
                    sent[row] = gradient[physical - first]
            add_up(sent)  # each row is one rank's, and zeros: exact in any order
            wide = torch.promote_types(sent.dtype, torch.float32)
            begin = 0
            for replicas in part:
                total = sent[begin].to(wide)
                for row in range(begin + 1, begin + len(replicas)):
                    total = total + sent[row].to(wide)
                for physical in replicas:
                    if physical // local == rank:
                        gradient[physical - first] = total.to(sent.dtype)
                begin += len(replicas)


def watch_replica_gradients(weights: Iterable[torch.nn.Parameter]) -> None:
    """Has an optimizer raise ModeError that steps after a backward without `sum_replica_gradients`, before it
    changes anything: replicas would part, and every rank would go on with experts of its own.
    """
    global _is_watching
    if not _is_watching:
        register_optimizer_step_pre_hook(_check_summed)
        _is_watching = True
    for weight in weights:
        if weight.requires_grad and weight not in _watched:
            _watched[weight] = weight.register_post_accumulate_grad_hook(_note_gradient)


def _note_gradient(weight: Tensor) -> None:
    _unsummed[weight] = True


def _check_summed(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    if not _unsummed:
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None and weight in _unsummed:
                allowed = "layer.sum_replica_gradients() before it, or the experts' replicas part"
                raise ModeError("step", "gradients of one replica alone", allowed)


@torch.no_grad()
def move_experts(
    tensors: Sequence[Tensor], old: ExpertPlacement, new: ExpertPlacement, rank: int, group: Any
) -> list[Tensor]:
    """A rank's `tensors`, [L, ..] of its experts by `old`, as new constants, of its experts by `new`.

    An expert that the rank held is copied from its first replica there; others come from one of the ranks
    that held it, taken in turn; an empty place has zeros. Collective over `group`, in whose numbers `rank`
    is; all ranks pass the same placements, and tensors of the same shapes. Raises ArgumentTypeError,
    ShapeError, DeviceError or RangeError, before anything is sent.
    """
    rank = _check_move(tensors, old, new, rank, group)
    made = [tensor.new_empty(new.num_local, *tensor.shape[1:]) for tensor in tensors]
    given = [tensor.contiguous() for tensor in tensors]
    operations: list[dist.P2POp] = []
    for target in range(new.num_ranks):
        held = old.of_rank(target)
        for place, expert in enumerate(new.of_rank(target)):
            if expert == EMPTY:
                if target == rank:
                    for into in made:
                        into[place] = 0
                continue
            if expert in held:
                if target == rank:
                    for into, source in zip(made, given, strict=True):
                        into[place] = source[held.index(expert)]
                continue
            replicas = old.replicas_of[expert]
            owner, index = divmod(replicas[target % len(replicas)], old.num_local)
            for into, source in zip(made, given, strict=True):
                if target == rank:
                    peer = dist.get_global_rank(group, owner)
                    operations.append(dist.P2POp(dist.irecv, into[place], peer, group))
                elif owner == rank:
                    peer = dist.get_global_rank(group, target)
                    operations.append(dist.P2POp(dist.isend, source[index], peer, group))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return made


def _check_move(tensors: object, old: object, new: object, rank: object, group: object) -> int:
    """Raises ArgumentTypeError, ShapeError or RangeError for arguments of `move_experts`; the rank."""
    for name, placement in (("old", old), ("new", new)):
        if not isinstance(placement, ExpertPlacement):
            raise ArgumentTypeError(name, type(placement).__name__, "an ExpertPlacement")
    assert isinstance(old, ExpertPlacement)
    assert isinstance(new, ExpertPlacement)
    new.num_moved(old)  # refuses what cannot be compared
    if not isinstance(tensors, list | tuple):
        raise ArgumentTypeError("tensors", type(tensors).__name__, "a list of tensors [L, ..]")
    for tensor in tensors:
        found = check_plain("tensors", tensor)
        if found.ndim == 0 or found.shape[0] != old.num_local:
            raise ShapeError("tensors", str(list(found.shape)), f"[{old.num_local}, ..]")
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentTypeError("group", type(group).__name__, "a process group")
    if group.size() != old.num_ranks:
        raise RangeError("group", f"{group.size()} ranks", f"{old.num_ranks} ranks, as placed")
    return check_int("rank", rank, 0, old.num_ranks - 1)


def _parts(shared: list[tuple[int, ...]], rows: int) -> list[list[tuple[int, ...]]]:
    """Experts' replicas in parts of at most so many rows, or of one expert."""
    parts: list[list[tuple[int, ...]]] = []
    number = 0
    for replicas in shared:
        if not parts or number + len(replicas) > rows:
            parts.append([])
            number = 0
        parts[-1].append(replicas)
        number += len(replicas)
    return parts
