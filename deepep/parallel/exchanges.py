"""Exchanges: what layers of experts send through Buffers in training steps that outlive ranks.

A rank that dies is first missed by whoever waits for it, in an exchange of a layer or in a sum of gradients,
on one rank here and on another there. So it is settled once, by the communicator: in an attempt a Buffer's
operation that fails raises on its rank alone, and both then have the same members.
"""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from deepep.collectives import Communicator
from deepep.errors import ModeError, RangeError
from deepep.nn.buffers import engine_of
from deepep.nn.moe import ExpertParallelMoE
from deepep.parallel.expert_backup import ExpertBackup, ExpertRows
from deepep.placement.experts import contiguous
from deepep.runtime.engine import Engine

_log = logging.getLogger(__name__)


class Exchanges:
    """Layers of a model that exchange tokens, and the engines of their buffers.

    backup: copies of the layers' experts, if ranks keep any.

    Raises ModeError for a buffer of other ranks than the communicator's.
    """

    def __init__(self, model: nn.Module, comm: Communicator) -> None:
        self._comm = comm
        self.backup: ExpertBackup | None = None
        self.layers = layers_of(model)
        ranks = comm.group.rank(), comm.group.size()
        for engine in self._engines():
            found = engine.info.rank, engine.info.num_ranks
            if found != ranks:
                got = f"a layer's buffer, where this is rank {found[0]} of {found[1]}"
                raise ModeError(
                    "buffer", got, f"one of the model's group, where it is {ranks[0]} of {ranks[1]}"
                )
            engine.control_plane()

    def _engines(self) -> list[Engine]:
        return [engine_of(number) for number in dict.fromkeys(layer.buffer_number for layer in self.layers)]

    def begin(self) -> None:
        """An attempt begins."""
        self._comm.lead(self._engines())

    def end(self) -> None:
        """It has ended: what fails in a buffer from now on is the buffer's own affair."""
        self._comm.lead([])

    def sum_replicas(self) -> None:
        """At the end of a backward: replicas of an expert have the sum of their gradients, all or none, since
        the commit comes after it. Raises PeerTimeoutError.
        """
        for number, layer in enumerate(self.layers):
            layer.sum_replica_gradients_by(partial(self._add_up, number))

    def _add_up(self, number: int, tensor: Tensor) -> None:
        about = zlib.crc32(repr((number, tensor.numel())).encode())
        self._comm.collective(lambda group: group.allreduce([tensor]), about)

    def counters(self) -> list[Tensor]:
        """Tensors that forwards change, and that are no buffers of the model."""
        return [tensor for layer in self.layers for tensor in layer.counters()]

    def go_on(self, before: tuple[int, ...]) -> None:
        """Has buffers and gates go on with the communicator's members, after a fault among those `before`.

        Raises RangeError where gates need more experts than are left, and none can be restored.
        """
        members = self._comm.members
        for engine in self._engines():
            engine.follow(members)
        with contextlib.nullcontext() if self.backup is None else contextlib.suppress(RangeError):
            self.leave_out()
        if self.layers and len(members) < len(before) and self._comm.rank == 0:
            lost = sorted(set(before) - set(members))
            _log.warning("ranks %s are gone; experts that nobody has any more: %s", lost, self._not_chosen())

    def admit(self, members: tuple[int, ...]) -> None:
        """Has buffers go on among `members`, who have handed over to some of them that the buffers do not
        know; and then without those of them whom the communicator has lost since.
        """
        self._comm.bring(self._engines(), members)
        for layer in self.layers:
            layer.has_joined = True
        if self._comm.members != members:
            for engine in self._engines():
                engine.follow(self._comm.members)

    def leave_out(self) -> None:
        """Has gates choose among the experts of those who are there. Raises RangeError."""
        for layer in self.layers:
            layer.leave_out(engine_of(layer.buffer_number).masked)

    def _not_chosen(self) -> list[list[int]]:
        """By layer: the experts that no rank has any more."""
        found = []
        for layer in self.layers:
            placed = layer.placement or contiguous(layer.num_experts, layer.num_expert_ranks)
            left = placed.alive_without(engine_of(layer.buffer_number).masked)
            found.append(sorted(set(range(layer.num_experts)) - set(left)))
        return found


def check_experts(
    layers: Iterable[ExpertParallelMoE],
    experts: Iterable[nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Raises ModeError for a model without experts, with others than those of the layers, or without an
    optimizer that has them all.
    """
    found = {id(parameter) for parameter in experts}
    others = found - {id(p) for layer in layers for p in layer.expert_parameters()}
    if others or not found:
        got = "experts of another module" if others else "a model without experts"
        raise ModeError("expert_backup", got, "None, but for experts of deepep.nn.ExpertParallelMoE")
    for layer in layers:
        ExpertRows(layer, optimizers)


def layers_of(model: nn.Module) -> list[ExpertParallelMoE]:
    """The model's layers that exchange tokens."""
    return [part for part in model.modules() if isinstance(part, ExpertParallelMoE)]


def statement_of_layers(model: nn.Module) -> str:
    """Text of what layers that exchange tokens, and their buffers, have to have alike on all ranks."""
    layers = layers_of(model)
    buffers = list(dict.fromkeys(layer.buffer_number for layer in layers))
    facts = [
        f"{layer.num_experts} experts on {layer.num_physical} places, top {layer.num_topk}, "
        f"of buffer {buffers.index(layer.buffer_number)}"
        for layer in layers
    ]
    return "; ".join([*facts, *(str(engine_of(number).control_plane().statement) for number in buffers)])
