"""Invitations: what a new process needs to know to join ranks that are at work, as one line of text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from deepep.errors import RangeError

_KIND = "deepep-invitation-1"
_ALLOWED = "what invite() returned"


@dataclass(frozen=True)
class Invitation:
    """An invitation of `ranks` by `members`, who meet them under `token`, a name that nobody used before.

    num_ranks: R. place: where their store is, as `stores.place_of` has it. backend, options: what newcomers
    have to construct. identities: processes of the invited, by `liveness.identity`, where they are known.
    """

    token: str
    ranks: tuple[int, ...]
    members: tuple[int, ...]
    num_ranks: int
    place: str
    backend: str
    options: Mapping[str, int | str]
    identities: Mapping[int, str] = field(default_factory=dict)

    @property
    def everybody(self) -> tuple[int, ...]:
        """The ranks that are there once the invited have come, ascending."""
        return tuple(sorted({*self.members, *self.ranks}))

    def encode(self) -> str:
        """The invitation as one line."""
        return json.dumps([_KIND, asdict(self)])

    @classmethod
    def decode(cls, text: str) -> Invitation:
        """The invitation that `encode` made a line of. Raises RangeError for any other text."""
        try:
            kind, fields = json.loads(text)
            if kind != _KIND:
                raise ValueError(kind)
            lists = {name: tuple(fields[name]) for name in ("ranks", "members")}
            identities = {int(rank): text for rank, text in fields["identities"].items()}
            made = cls(**{**fields, **lists, "identities": identities})
            if not isinstance(made.token, str) or not all(isinstance(r, int) for r in made.everybody):
                raise ValueError(text)
            return made
        except (ValueError, TypeError, KeyError, AttributeError):
            raise RangeError("invitation", repr(text)[:100], _ALLOWED) from None
