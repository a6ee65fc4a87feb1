"""Return of experts: a rank that joins has its own again, from those who took them over meanwhile.

The table of the places is worked out alike by all (deepep.placement.spare.given_back); rows travel from the
ranks that have the experts to those whose places they take, weights and what optimizers keep of them. What
members' copies are of travels beside the state that all have alike, so a newcomer works out what is to be
restored as the others do, whoever dies in the hand-over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepep.parallel.expert_backup import Copies, ExpertBackup, ExpertRows, Move
from deepep.placement.experts import EMPTY, ExpertPlacement
from deepep.placement.spare import given_back

_log = logging.getLogger(__name__)


class ExpertReturn:
    """This rank's part in a hand-over to ranks that join, of what a backup of experts keeps."""

    def __init__(self, backup: ExpertBackup) -> None:
        self._backup = backup

    # the state that all ranks have alike, but for the rows

    def state(self) -> dict[str, Any]:
        """Placements, what the copies are of, and what optimizers keep of experts beside their rows: numbers
        by layer, parameter and optimizer, in which ranks may differ.
        """
        backup, copies = self._backup, self._backup.copies
        return {
            "every": backup.every,
            "home": [placement.experts for placement in backup.home],
            "placements": [rows.placement.experts for rows in backup.layers],
            "restored": [[*expert, version] for expert, version in sorted(backup.restored.items())],
            "copies": {
                "version": copies.version,
                "members": list(copies.members),
                "placements": [placement.experts for placement in copies.placements],
                "parts": list(copies.parts),
                "keepers": [[*expert, *ranks] for expert, ranks in sorted(copies.keepers.items())],
            },
            "kept": [_kept(rows) for rows in backup.layers],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over a state: layers go by its placements, and optimizers have rows of zeros."""
        backup, copies = self._backup, state["copies"]

        def placements(tables: Sequence[Sequence[int]]) -> tuple[ExpertPlacement, ...]:
            sizes = [(rows.layer.num_experts, rows.layer.num_expert_ranks) for rows in backup.layers]
            pairs = zip(sizes, tables, strict=False)
            return tuple(ExpertPlacement(*size, tuple(table)) for size, table in pairs)

        backup.every, backup.home = state["every"], placements(state["home"])
        backup.restored = {(layer, expert): version for layer, expert, version in state["restored"]}
        keepers = {(layer, expert): ranks for layer, expert, *ranks in copies["keepers"]}
        backup.copies = Copies(
            version=copies["version"],
            members=tuple(copies["members"]),
            placements=placements(copies["placements"]),
            parts=tuple(copies["parts"]),
            keepers=keepers,
        )
        for rows, placement in zip(backup.layers, placements(state["placements"]), strict=True):
            rows.layer.leave_out(())  # its buffer knows of no other rank yet
            rows.layer.go_by(placement)
        for rows, kept in zip(backup.layers, state["kept"], strict=True):
            _keep(rows, kept)

    def names_in(self, model: nn.Module) -> list[str]:
        """The names of the experts' parameters in a model."""
        experts = {id(parameter) for rows in self._backup.layers for parameter in rows.parameters}
        named = model.named_parameters(remove_duplicate=False)
        return [name for name, parameter in named if id(parameter) in experts]

    def without_experts(self, states: Mapping[str, Any], objects: Mapping[str, Any]) -> dict[str, Any]:
        """The objects' states without what optimizers keep of experts."""
        experts = {id(parameter) for rows in self._backup.layers for parameter in rows.parameters}
        made = dict(states)
        for name, each in objects.items():
            if isinstance(each, torch.optim.Optimizer):
                every = [parameter for group in each.param_groups for parameter in group["params"]]
                left_out = {number for number, parameter in enumerate(every) if id(parameter) in experts}
                whole = states[name]["state"]
                kept = {number: value for number, value in whole.items() if number not in left_out}
                made[name] = {**states[name], "state": kept}
        return made

    # the rows

    def give_back(self, members: Collection[int], newcomers: Collection[int]) -> Callable[[], None]:
        """Gives newcomers their experts, and others what they have at home, as far as it is there. Returns a
        function that has layers go by the new placements, once all have theirs. Collective. Raises
        PeerTimeoutError, MismatchError.
        """
        backup = self._backup
        here = [rank for rank in backup.comm.members if rank in members]
        moves, placements = self._moves(here, newcomers)
        parts = [rows.parts() for rows in backup.layers]
        adopt = backup.bring(moves, placements, self._held, parts)

        away = set(range(placements[0].num_ranks)) - set(backup.comm.members)

        def adopt_and_say() -> None:
            for rows in backup.layers:  # gates may need what comes back
                rows.layer.leave_out(away)
            adopt()
            if backup.comm.rank == 0:
                given = [sorted({m.expert[1] for m in moves if m.expert[0] == n}) for n in range(len(parts))]
                _log.warning("ranks %s have come; experts given back: %s", sorted(newcomers), given)

        return adopt_and_say

    def _held(self, move: Move) -> list[Tensor]:
        return [row.clone() for row in self._backup.layers[move.expert[0]].of(move.source)]

    def _moves(
        self, here: Collection[int], newcomers: Collection[int]
    ) -> tuple[list[Move], list[ExpertPlacement]]:
        found: list[Move] = []
        placements: list[ExpertPlacement] = []
        for number, rows in enumerate(self._backup.layers):
            old = rows.placement
            new = given_back(old, self._backup.home[number], newcomers, here)
            holders: dict[int, list[tuple[int, int]]] = {}
            for rank in here:
                for place, expert in enumerate(old.of_rank(rank)):
                    holders.setdefault(expert, []).append((rank, place))
            for taker in sorted({*here, *newcomers}):
                for place, expert in enumerate(new.of_rank(taker)):
                    stays = taker not in newcomers and old.of_rank(taker)[place] == expert
                    if expert == EMPTY or stays or expert not in holders:
                        continue
                    having = holders[expert]
                    own = [one for one in having if one[0] == taker]
                    keeper, source = own[0] if own else having[taker % len(having)]
                    found.append(Move((number, expert), keeper, taker, place, source))
            placements.append(new)
        return found, placements


def _kept(rows: ExpertRows) -> list[list[dict[str, Any]]]:
    """By parameter and optimizer: the shapes and dtypes of what has a row for each expert, and the rest."""
    found = []
    for parameter in rows.parameters:
        of_parameter = []
        for optimizer in rows.optimizers:
            state = optimizer.state.get(parameter, {})
            names = [name for name in sorted(state) if rows.is_rowed(parameter, state[name])]
            shapes = {n: [str(state[n].dtype).removeprefix("torch."), *state[n].shape] for n in names}
            others = {name: state[name] for name in sorted(state) if name not in shapes}
            of_parameter.append({"rows": shapes, "values": others})
        found.append(of_parameter)
    return found


def _keep(rows: ExpertRows, kept: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Has optimizers keep what `_kept` found elsewhere, with rows of zeros."""
    for parameter, of_parameter in zip(rows.parameters, kept, strict=True):
        for optimizer, found in zip(rows.optimizers, of_parameter, strict=True):
            optimizer.state.pop(parameter, None)
            made = {
                name: torch.zeros(shape, dtype=getattr(torch, dtype), device=parameter.device)
                for name, (dtype, *shape) in found["rows"].items()
            }
            if made or found["values"]:
                optimizer.state[parameter] = {**made, **found["values"]}
