"""Backup of experts: every member keeps a copy of the next member's, from which they are restored.

A copy is of one moment, a step's end, on all ranks alike: it replaces the one before it once a commit has
shown that everybody has theirs. After a death the survivors work out the same table: for each expert that no
one has any more, who has a copy of it and whose place it takes (deepep.placement). Rows travel from the
former to the latter, and the layer goes by the new placement once a commit has shown that they are there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deepep.collectives import Communicator
from deepep.collectives.communicator import digest_of
from deepep.collectives.stripes import PIECE, ByteStream
from deepep.collectives.transport import PointToPoint, Steps, Transfer, drive, empty_message
from deepep.errors import ModeError, RangeError
from deepep.nn.moe import ExpertParallelMoE
from deepep.nn.precision import is_distributed
from deepep.placement.experts import EMPTY, ExpertPlacement, contiguous
from deepep.placement.spare import check_room, taken_over
from deepep.runtime.control.transport import Link

_log = logging.getLogger(__name__)

Expert = tuple[int, int]
"""A layer's number, and an expert's in it."""


@dataclass
class Copies:
    """Copies of one moment. version: steps that had counted then. parts: by layer, the names of what a row
    has: before its first step an optimizer keeps nothing. keepers: by expert, the ranks that have one of it;
    rows: those that this rank has, as `ExpertRows.of` gives them.
    """

    version: int = -1
    members: tuple[int, ...] = ()
    placements: tuple[ExpertPlacement, ...] = ()
    parts: tuple[tuple[str, ...], ...] = ()
    keepers: dict[Expert, list[int]] = field(default_factory=dict)
    rows: dict[Expert, list[Tensor]] = field(default_factory=dict)


class ExpertRows:
    """Rows that belong to a layer's experts on this rank: of its parameters, and of what optimizers keep.

    Raises ModeError for experts that no optimizer has, or that are no rows.
    """

    def __init__(self, layer: ExpertParallelMoE, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.layer, self.parameters = layer, list(layer.expert_parameters())
        self.optimizers = optimizers
        for parameter in self.parameters:
            count = 0 if is_distributed(parameter) or not parameter.ndim else parameter.shape[0]
            if count != layer.num_local_experts or not parameter.is_contiguous():
                got = f"a parameter {list(parameter.shape)}"
                allowed = f"contiguous ones of {layer.num_local_experts} rows, one for each expert"
                raise ModeError("expert_backup", got, allowed)
            owned = any(parameter is each for o in optimizers for g in o.param_groups for each in g["params"])
            if parameter.requires_grad and not owned:
                got = "experts that no optimizer in `state` has"
                raise ModeError("expert_backup", got, "state= with the optimizers of all experts")

    @property
    def placement(self) -> ExpertPlacement:
        """The layer's."""
        layer = self.layer
        return layer.placement or contiguous(layer.num_experts, layer.num_expert_ranks)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors whose first dimension is the experts', by names that are alike on all ranks."""
        for number, parameter in enumerate(self.parameters):
            yield f"{number}", parameter.detach()
            for place, optimizer in enumerate(self.optimizers):
                state: Mapping[str, Any] = optimizer.state.get(parameter, {})
                for name in sorted(state):
                    if self.is_rowed(parameter, state[name]):
                        yield f"{number}.{place}.{name}", state[name].detach()

    @staticmethod
    def is_rowed(parameter: Tensor, value: object) -> bool:
        """True if what an optimizer keeps of a parameter has a row for each expert."""
        return isinstance(value, Tensor) and bool(value.ndim) and value.shape[0] == parameter.shape[0]

    def statement(self) -> str:
        """Text that is the same where a row has the same parts."""
        return repr([(name, list(tensor.shape), tensor.dtype) for name, tensor in self._tensors()])

    def of(self, place: int) -> list[Tensor]:
        """The row of each tensor at a local index: views."""
        return [tensor[place] for _, tensor in self._tensors()]

    def parts(self) -> tuple[str, ...]:
        """The names of a row's tensors."""
        return tuple(name for name, _ in self._tensors())

    def room(self, parts: Collection[str]) -> list[Tensor]:
        """Tensors like those of a row that have these names."""
        rows = [row for name, row in zip(self.parts(), self.of(0), strict=True) if name in parts]
        return [torch.empty_like(row, memory_format=torch.contiguous_format) for row in rows]

    def put(self, place: int, rows: Sequence[Tensor], parts: Collection[str]) -> None:
        """Writes a row's tensors of these names to a local index, whose gradient is none of theirs; what an
        optimizer had not begun to keep is 0.
        """
        given = dict(zip(parts, rows, strict=True))
        with torch.no_grad():
            for name, row in zip(self.parts(), self.of(place), strict=True):
                if name in given:
                    row.copy_(given[name])
                else:
                    row.zero_()
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad[place].zero_()


@dataclass(frozen=True)
class Move:
    """An expert's way from a rank that has a copy to a place of another, or of the same; from its place
    `source` there, where it is not a copy.
    """

    expert: Expert
    keeper: int
    taker: int
    place: int
    source: int = -1


class ExpertBackup:
    """This rank's part in it, for all layers of a model.

    every: steps after which copies are made anew; they are, too, where members or placements have changed.
    Raises ModeError or RangeError for layers without room for a rank's experts.
    """

    def __init__(
        self,
        layers: Iterable[ExpertParallelMoE],
        comm: Communicator,
        optimizers: Sequence[torch.optim.Optimizer],
        every: int,
    ) -> None:
        self.comm, self.every, self.optimizers = comm, every, optimizers
        self.layers = [ExpertRows(layer, optimizers) for layer in layers]
        if comm.num_ranks == 1:
            raise ModeError("expert_backup", "one rank", "several: a copy is on another rank")
        for rows in self.layers:
            try:
                check_room(rows.placement)
            except RangeError as problem:
                raise RangeError("expert_backup", problem.got, problem.allowed) from None
        self.copies = Copies()
        self.home = tuple(rows.placement for rows in self.layers)
        """The layers' placements when all ranks were there, which ranks that join come back to."""
        self.restored: dict[Expert, int] = {}
        """Experts that were restored, and the version of the last copy that they were restored from."""

    @property
    def _rank(self) -> int:
        return self.comm.members[self.comm.rank]

    # copies

    def is_due(self, version: int, afresh: bool = False) -> bool:
        """True if copies are to be made anew. version: steps that have counted. afresh: those of an earlier
        step will not do, however many `every` is.
        """
        found = self.copies
        now = self.comm.members, tuple(rows.placement for rows in self.layers)
        is_old = version >= found.version + (1 if afresh else self.every)
        return is_old or (found.members, found.placements) != now

    def refresh(self, version: int) -> Callable[[], None]:
        """Gives each member's experts to the member before it. Returns a function that takes them for the
        copies that are good, to be called once all have theirs. Collective. Raises PeerTimeoutError,
        MismatchError.
        """
        members, placements = self.comm.members, tuple(rows.placement for rows in self.layers)
        made = Copies(version, members, placements, tuple(rows.parts() for rows in self.layers))
        place = self.comm.rank
        before, behind = members[place - 1], members[(place + 1) % len(members)]
        given: list[Tensor] = []
        for number, rows in enumerate(self.layers):
            for owner, keeper in zip(members, (members[-1], *members), strict=False):
                held = placements[number].of_rank(owner)
                for index, expert in enumerate(held):
                    if expert == EMPTY or owner == keeper or expert in held[:index]:
                        continue
                    keepers = made.keepers.setdefault((number, expert), [])
                    if keeper not in keepers:
                        keepers.append(keeper)
                    if owner == self._rank:
                        given += rows.of(index)
                    if keeper == self._rank:
                        made.rows[number, expert] = rows.room(made.parts[number])
        taken = [tensor for rows in made.rows.values() for tensor in rows]
        if len(members) > 1:
            self._pass_rows({before: given}, {behind: taken}, "copies")

        def adopt() -> None:
            self.copies = made
            if len(members) == placements[0].num_ranks:
                self.home = placements

        return adopt

    # restoring

    def moves(self) -> tuple[list[Move], list[ExpertPlacement]]:
        """Moves that restore what can be, and the layers' placements then; the same on all members."""
        found: list[Move] = []
        placements: list[ExpertPlacement] = []
        members = self.comm.members
        for number, rows in enumerate(self.layers):
            old = rows.placement
            gone = set(range(old.num_ranks)) - set(members)
            lost = set(range(old.num_experts)) - set(old.alive_without(gone))
            keepers = {
                expert: [rank for rank in self.copies.keepers.get((number, expert), ()) if rank in members]
                for expert in lost
            }
            new = taken_over(old, gone, [expert for expert, ranks in keepers.items() if ranks])
            for expert in sorted(lost & set(new.alive_without(gone))):
                taker, place = divmod(new.replicas_of[expert][0], new.num_local)
                found.append(Move((number, expert), min(keepers[expert]), taker, place))
            placements.append(new)
        return found, placements

    def restore(self, moves: Sequence[Move], placements: Sequence[ExpertPlacement]) -> Callable[[], None]:
        """Gives copies of experts to those who take them over. Returns a function that has layers go by the
        new placements, to be called once all have theirs. Collective. Raises PeerTimeoutError, MismatchError.
        """
        copies, version = self.copies, self.copies.version
        adopt = self.bring(moves, placements, lambda move: copies.rows[move.expert], copies.parts)

        def adopt_and_say() -> None:
            adopt()
            self.restored.update((move.expert, version) for move in moves)
            if self.comm.rank == 0:
                by_layer = [[m.expert[1] for m in moves if m.expert[0] == n] for n in range(len(placements))]
                _log.warning("experts restored as they were after %s steps: %s", version, by_layer)

        return adopt_and_say

    def bring(
        self,
        moves: Sequence[Move],
        placements: Sequence[ExpertPlacement],
        held: Callable[[Move], list[Tensor]],
        parts: Sequence[Collection[str]],
    ) -> Callable[[], None]:
        """Has experts travel. held: this rank's row of one, which does not change; parts: by layer, the names
        of a row's tensors. Returns a function that puts them in their places, and has layers go by the
        placements, to be called once all have theirs. Collective. Raises PeerTimeoutError, MismatchError.
        """
        gives: dict[int, list[Tensor]] = {}
        takes: dict[int, list[Tensor]] = {}
        staged: dict[Move, list[Tensor]] = {}
        for move in moves:
            number = move.expert[0]
            if move.taker == self._rank:
                if move.keeper == self._rank:
                    staged[move] = held(move)
                    continue
                staged[move] = self.layers[number].room(parts[number])
                takes.setdefault(move.keeper, []).extend(staged[move])
            elif move.keeper == self._rank:
                gives.setdefault(move.taker, []).extend(held(move))
        self._pass_rows(gives, takes, repr(moves))

        def adopt() -> None:
            for move, values in staged.items():
                self.layers[move.expert[0]].put(move.place, values, parts[move.expert[0]])
            for rows, placement in zip(self.layers, placements, strict=True):
                rows.layer.go_by(placement)

        return adopt

    def _pass_rows(
        self, gives: Mapping[int, Sequence[Tensor]], takes: Mapping[int, Sequence[Tensor]], about: str
    ) -> None:
        """Sends tensors to ranks, and has others from ranks, in place."""
        statements = [rows.statement() for rows in self.layers]

        def body(link: Link) -> None:
            net = PointToPoint(link)

            def streams(of: Mapping[int, Sequence[Tensor]]) -> dict[int, ByteStream]:
                return {link.members.index(rank): ByteStream(tensors) for rank, tensors in of.items()}

            drive([_pass(net, streams(gives), streams(takes))])

        self.comm.hand_over(body, digest_of(about, statements))


def _pass(net: PointToPoint, gives: Mapping[int, ByteStream], takes: Mapping[int, ByteStream]) -> Steps:
    """Piece by piece; a message of a pair is as large on both of them."""
    longest = max((stream.num_bytes for stream in (*gives.values(), *takes.values())), default=0)
    for begin in range(0, longest, PIECE):

        def spans(of: Mapping[int, ByteStream], begin: int = begin) -> dict[int, tuple[int, int]]:
            ends = {rank: min(begin + PIECE, stream.num_bytes) for rank, stream in of.items()}
            return {rank: (begin, end) for rank, end in ends.items() if end > begin}

        sends: list[Transfer] = [(gives[rank].read(span), rank) for rank, span in spans(gives).items()]
        receives: list[Transfer] = [
            (empty_message(end - begin, torch.device("cpu")), rank)
            for rank, (begin, end) in spans(takes).items()
        ]
        yield net.exchange(sends, receives, 0)
        for message, rank in receives:
            takes[rank].write(spans(takes)[rank], message)
