"""Hand-over: all that ranks have alike in a training, from the members to those who join.

Every member sends a stripe of it. Members compare what they have first, by hashes, so that nobody gets parts
of two states; a newcomer compares what it has in the end, so that nothing is lost on the way or in loading.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from deepep.collectives.stripes import ByteStream, hand_over
from deepep.collectives.transport import PointToPoint, Steps, Transfer, drive
from deepep.errors import MismatchError
from deepep.parallel.expert_return import ExpertReturn
from deepep.parallel.state import PackedState, differing, load_states, states_of
from deepep.runtime.control.transport import Link

if TYPE_CHECKING:
    from deepep.parallel.hook import BucketReducer

_RANDOM, _EXPERTS = "random", "experts"


@dataclass
class TrainingState:
    """A rank's state that all ranks have alike: a model's, that of `objects`, and a reducer's.

    Module buffers may differ, as running statistics do that each rank has from its own batches: those of the
    lowest member are handed over. torch's random numbers are if all members have the same. experts: of a
    model that has some, whose rows travel by themselves, each from a rank that has it.
    """

    model: nn.Module
    reducer: BucketReducer
    objects: Mapping[str, object]
    experts: ExpertReturn | None = None

    def pack(self) -> PackedState:
        """The state as it is. Raises ArgumentError for one that cannot be handed over."""
        sampler, experts = self.reducer.sampler, self.experts
        model, objects, own = self.model.state_dict(), states_of(self.objects), set(self._names_of_experts())
        if experts is not None:
            objects = experts.without_experts(objects, self.objects)
        return PackedState.of(
            {
                "model": {name: value for name, value in model.items() if name not in own},
                "objects": objects,
                _EXPERTS: None if experts is None else experts.state(),
                "sampler": None if sampler is None else sampler.state_dict(),
                "step": self.reducer.step,
                "plans": self.reducer.plan_state(),
                _RANDOM: torch.get_rng_state(),
            }
        )

    def load(self, packed: PackedState, with_random: bool) -> None:
        """Takes a state over."""
        state = packed.unpack()
        model = self.model.state_dict()
        own = {name: model[name] for name in self._names_of_experts()}
        self.model.load_state_dict({**state["model"], **own})
        load_states(self.objects, state["objects"])
        if self.experts is not None:
            self.experts.load(state[_EXPERTS])
        if self.reducer.sampler is not None:
            self.reducer.sampler.load_state_dict(state["sampler"])
        self.reducer.step = state["step"]
        self.reducer.load_plan_state(state["plans"])
        if with_random:
            torch.set_rng_state(state[_RANDOM])

    def may_differ(self, name: str) -> bool:
        """True for tensors in which ranks may differ: buffers, and what counts experts' steps."""
        return name in self._buffers or name.startswith(f"{_EXPERTS}.")

    @functools.cached_property
    def _buffers(self) -> set[str]:
        return {f"model.{name}" for name, _ in self.model.named_buffers()}

    def _names_of_experts(self) -> list[str]:
        return [] if self.experts is None else self.experts.names_in(self.model)


class StateTransfer:
    """One hand-over: `run` on the link of members and newcomers, on all of them.

    members: those who have the state. may_differ: says by name of which tensors they may have different ones.
    packed: the state; on a newcomer None, until `run` has it. is_random_alike: all members have the same
    random numbers.
    """

    def __init__(
        self, members: Collection[int], may_differ: Callable[[str], bool], packed: PackedState | None = None
    ) -> None:
        self._members, self._may_differ = members, may_differ
        self.packed = packed
        self._digests = None if packed is None else packed.digests()
        self.is_random_alike = False

    def run(self, link: Link) -> None:
        """Sends or receives. Raises MismatchError, on all, if members have different states; LinkError."""
        net = PointToPoint(link)
        givers = [place for place, rank in enumerate(link.members) if rank in self._members]
        takers = [place for place in range(net.num_ranks) if place not in givers]
        packed = self.packed = self._agree_on_text(link, net, givers, takers)
        if self._digests is None:
            self._digests = torch.zeros(len(packed.names), 4, dtype=torch.int64, device="cpu")
        gathered = link.all_gather(self._digests)
        met = [gathered[link.members[place]] for place in givers]
        names = [packed.names[i] for i in differing(met)]
        different = {name for name in names if not self._may_differ(name)}
        self.is_random_alike = _RANDOM not in different
        if different - {_RANDOM}:
            got, leader = min(different - {_RANDOM}), link.members[givers[0]]
            raise MismatchError("state", f"other values of {got}", f"rank {leader}'s on all members")
        self._digests = met[0]
        is_buffer = [self._may_differ(name) for name in packed.names]
        buffers = [t for t, first in zip(packed.tensors, is_buffer, strict=True) if first]
        others = [t for t, first in zip(packed.tensors, is_buffer, strict=True) if not first]
        hand_over(net, ByteStream([*buffers, *others]), ByteStream(buffers).num_bytes, givers, takers)

    def _agree_on_text(
        self, link: Link, net: PointToPoint, givers: list[int], takers: list[int]
    ) -> PackedState:
        """The state, with all but the tensors' values on a newcomer."""
        raw = b"" if self.packed is None else self.packed.text.encode()
        words = torch.tensor([len(raw), zlib.crc32(raw)], dtype=torch.int64, device="cpu")
        met = link.all_gather(words)
        wanted = met[link.members[givers[0]]]
        if not all(torch.equal(met[link.members[place]], wanted) for place in givers):
            raise MismatchError("state", "other numbers or names", "the same on all members")
        message = torch.empty(int(wanted[0]), dtype=torch.uint8, device="cpu")
        if self.packed is not None:
            message = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        if net.rank == givers[0]:
            drive([_one_round(net, [(message, place) for place in takers], [])])
        elif net.rank in takers:
            drive([_one_round(net, [], [(message, givers[0])])])
        return self.packed or PackedState.room_for(bytes(message.tolist()).decode())

    def check(self, loaded: PackedState) -> None:
        """Raises MismatchError if a newcomer has another state now than the members."""
        assert self.packed is not None
        assert self._digests is not None
        if loaded.text != self.packed.text:
            raise MismatchError("state", "other numbers or names once it was loaded", "the members'")
        for i in differing([self._digests, loaded.digests()]):
            if loaded.names[i] != _RANDOM or self.is_random_alike:
                got = f"other values of {loaded.names[i]} once it was loaded"
                raise MismatchError("state", got, "the members'")


def _one_round(net: PointToPoint, sends: list[Transfer], receives: list[Transfer]) -> Steps:
    yield net.exchange(sends, receives, 0)
