"""A case: everything that determines one example, as plain data.

A case can be written to a small JSON file and read back, on another machine, to the same bits; shrunk
(sim/fuzz/shrinking.py); and drawn from a seed (`draw_case`) or by hypothesis (strategies.py), by the same
code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from deepep.sim.cases.choices import Choices
from deepep.sim.cases.files import CaseError, Fields, check_integer, make_dataclass, parse_json
from deepep.sim.cases.options import SPACE, WORDS, Options
from deepep.sim.cases.routing import PATTERNS, TWISTS, Indices, RoutingShape

FORMAT = "deepep.case"
VERSION = 1
#: Bounds of what a file may ask for.
MAX_RANKS, MAX_TOPK, MAX_HIDDEN, MAX_ELEMENTS = 256, 256, 1 << 16, 1 << 28


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens of another case: rank r holds the values of `tokens[r]` of rank `ranks[r]` there."""

    case: Case
    ranks: tuple[int, ...]
    tokens: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Case:
    """One example.

    Attributes:
        num_experts: E, a multiple of the number of ranks.
        topk_idx: by rank: [T, K] int64, global expert or -1. K is the same on all ranks, T need not be.
        hidden: H, channels of a row.
        seed: determines the values of rows, scales, weights and biases.
        options: all else.
        masked: ranks that are left out.
        origin: how the routing was made, for people and for coverage.
        parent: if set, the tensors' values are taken from another case instead of the seed.
    """

    num_experts: int
    topk_idx: tuple[Indices, ...]
    hidden: int = 128
    seed: int = 0
    options: Options = field(default_factory=Options)
    masked: tuple[int, ...] = ()
    origin: str = "given"
    parent: Window | None = None

    @property
    def num_ranks(self) -> int:
        return len(self.topk_idx)

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def num_topk(self) -> int:
        return int(self.topk_idx[0].shape[1])

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """T by rank."""
        return tuple(len(indices) for indices in self.topk_idx)

    @property
    def num_max_tokens(self) -> int:
        """M of the low-latency operations."""
        return max(1, max(self.num_tokens) + self.options.spare_slots)

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that take part to the end."""
        return tuple(r for r in range(self.num_ranks) if r not in self.masked)

    @property
    def dispatch_members(self) -> tuple[int, ...]:
        """The ranks that take part in the dispatch."""
        return self.members if self.options.mask_at == "dispatch" else tuple(range(self.num_ranks))

    @property
    def masked_at_dispatch(self) -> tuple[int, ...]:
        """The ranks that are left out of the dispatch."""
        return self.masked if self.options.mask_at == "dispatch" else ()

    @property
    def domains(self) -> tuple[range, ...]:
        """The ranks of each scale-up domain that rows are summed in first; one, if none are."""
        size = self.options.ranks_per_node if self.sums_by_domain else self.num_ranks
        ranks = range(self.num_ranks)
        return tuple(ranks[first : first + size] for first in ranks[::size])

    @property
    def sums_by_domain(self) -> bool:
        """True for a high-throughput case between domains: its combine rounds each domain's sum."""
        options = self.options
        apart = options.ranks_per_node < self.num_ranks
        return options.mode == "ht" and options.reduce == "domain" and apart

    def is_token_in_rank(self, source: int) -> npt.NDArray[np.bool_]:
        """[T, R]: which ranks each token of `source` goes to, masks not considered."""
        owner = self.topk_idx[source] // self.num_local_experts  # -1 stays negative: floor division
        return (owner[:, :, None] == np.arange(self.num_ranks)).any(axis=1)

    def with_options(self, **changes: Any) -> Case:
        return replace(self, options=replace(self.options, **changes))

    def legal(self) -> Case:
        """The nearest case that the interface allows: some options exclude or need each other."""
        options, hidden = self.options, self.hidden
        changes: dict[str, Any] = {}
        if options.mode == "ht":
            if options.worst != "off" or options.combine_weights:
                changes["topk"] = True  # rows past the last are recognised by their index; weights need K
            if options.payload != "bf16":
                changes["combine_rows"] = "other"  # combine takes bf16 alone
            row = 8 if options.payload == "bf16" else 16  # rows are multiples of 16 bytes
            hidden = -(-hidden // row) * row
        else:
            group = 512 if options.low_latency == "fp8+ue8m0" else 128  # channels per word of scales
            hidden = -(-hidden // group) * group
            if options.reduce == "domain":
                changes["reduce"] = "rank"
            if options.low_latency != "bf16":
                changes["combine_rows"] = "other"
            if options.logfmt:
                changes["zero_copy"] = False
        return replace(self.with_options(**changes), hidden=hidden)

    def features(self) -> dict[str, Any]:
        """The features that coverage counts: the options, and the traits of the routing."""
        tokens = self.num_tokens
        empty = sum(t == 0 for t in tokens)
        return {
            **self.options.to_json(),
            "origin": self.origin.split("+")[0],
            "num_ranks": self.num_ranks,
            "empty_ranks": "all" if empty == self.num_ranks else "some" if empty else "none",
            "tokens": "equal" if len(set(tokens)) == 1 else "uneven",
            "topk_to_ranks": ("K<R", "K=R", "K>R")[
                (self.num_topk > self.num_ranks) - (self.num_topk < self.num_ranks) + 1
            ],
            "one_expert_per_rank": self.num_local_experts == 1,
            "masked": len(self.masked) > 0,
        }

    def to_json(self) -> str:
        """The case as JSON text."""
        return json.dumps(self.to_plain())

    def to_plain(self) -> dict[str, Any]:
        """The case as values that JSON has; a parent, whose tensors it takes, goes along."""
        plain = {
            "format": FORMAT,
            "version": VERSION,
            "num_experts": self.num_experts,
            "num_topk": self.num_topk,  # a matrix without tokens does not say
            "hidden": self.hidden,
            "seed": self.seed,
            "masked": list(self.masked),
            "origin": self.origin,
            "options": self.options.to_json(),
            "topk_idx": [indices.tolist() for indices in self.topk_idx],
        }
        if self.parent is not None:
            plain["parent"] = {
                "case": self.parent.case.to_plain(),
                "ranks": list(self.parent.ranks),
                "tokens": [tokens.indices(2**31)[:2] for tokens in self.parent.tokens],
            }
        return plain

    @staticmethod
    def from_json(text: str) -> Case:
        """Reads what `to_json` wrote.

        Raises:
            CaseError: the text is not a case, or not one of a known version. It is a ValueError.
        """
        return Case.from_plain(parse_json(text, "the case"))

    @staticmethod
    def from_plain(plain: Any) -> Case:
        """Reads what `to_plain` gave, and checks every field. Raises CaseError."""
        given = Fields(plain, "case")
        if plain.get("format") != FORMAT:
            raise CaseError(f"not a {FORMAT} file")
        given.integer("version", VERSION, VERSION)
        num_topk = given.integer("num_topk", 1, MAX_TOPK)
        rows = given.items("topk_idx", MAX_RANKS)
        hidden = given.integer("hidden", 1, MAX_HIDDEN)
        matrices = tuple(_matrix(part, num_topk, f"rank {rank}: topk_idx") for rank, part in enumerate(rows))
        if sum(map(len, matrices)) * hidden > MAX_ELEMENTS:
            raise CaseError(f"hidden: got {hidden}; allowed: tensors of at most {MAX_ELEMENTS} elements")
        masked = tuple(
            check_integer(rank, 0, len(rows) - 1, "masked") for rank in given.items("masked", len(rows) - 1)
        )
        case = Case(
            num_experts=given.integer("num_experts", 1, 2**31 - 1),
            topk_idx=matrices,
            hidden=hidden,
            seed=given.integer("seed", 0, 2**64 - 1),
            options=make_dataclass(Options, given.get("options"), "options", words=WORDS),
            masked=masked,
            origin=given.text("origin", 200),
            parent=_parent(given.get("parent"), matrices) if "parent" in given else None,
        )
        case.validate()
        return case

    def validate(self) -> None:
        """Raises CaseError, a ValueError, if the case is not a valid call."""
        if not self.topk_idx or self.num_experts < 1 or self.num_experts % self.num_ranks:
            raise CaseError(f"num_experts: got {self.num_experts} for {self.num_ranks} ranks")
        for rank, indices in enumerate(self.topk_idx):
            if indices.ndim != 2 or indices.shape[1] != self.num_topk or self.num_topk < 1:
                raise CaseError(f"rank {rank}: topk_idx: got {indices.shape}; allowed: [T, {self.num_topk}]")
            if indices.size and not (indices.min() >= -1 and indices.max() < self.num_experts):
                raise CaseError(f"rank {rank}: topk_idx: entries outside [-1, {self.num_experts})")
        for name, value in self.options.to_json().items():
            if not isinstance(value, type(SPACE[name][0])):
                raise CaseError(f"options: {name}: got {value!r}; allowed: like {SPACE[name][0]!r}")

    def __repr__(self) -> str:
        changed = {n: v for n, v in self.options.to_json().items() if v != SPACE[n][0]}
        options = ", ".join(f"{n}={v!r}" for n, v in changed.items())
        return (
            f"Case(R={self.num_ranks}, E={self.num_experts}, K={self.num_topk}, H={self.hidden}, "
            f"T={list(self.num_tokens)}, {self.origin}, seed={self.seed}"
            + (f", masked={list(self.masked)}" if self.masked else "")
            + (f", {options}" if options else "")
            + ")"
        )


def _matrix(rows: Any, num_topk: int, what: str) -> Indices:
    """[T, K] int64 of lists of integers; a float or a truth value is refused, not converted."""
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == num_topk for row in rows):
        raise CaseError(f"{what}: allowed: a list of lists of {num_topk}")
    for row in rows:
        for expert in row:
            check_integer(expert, -1, 2**31 - 1, f"{what}: entries outside")
    return np.array(rows, dtype=np.int64).reshape(-1, num_topk)


def _parent(plain: Any, matrices: tuple[Indices, ...]) -> Window:
    """The window of another case that the tokens of `matrices` are."""
    given = Fields(plain, "parent")
    case = Case.from_plain(given.get("case"))
    ranks = given.items("ranks", len(matrices))
    bounds = given.items("tokens", len(matrices))
    if not len(ranks) == len(bounds) == len(matrices):
        raise CaseError(f"parent: {len(ranks)} ranks and {len(bounds)} windows for {len(matrices)} ranks")
    tokens = []
    for rank, pair, matrix in zip(ranks, bounds, matrices, strict=True):
        check_integer(rank, 0, case.num_ranks - 1, "parent: ranks")
        if not isinstance(pair, list) or len(pair) != 2:
            raise CaseError("parent: tokens: allowed: pairs of a first token and the one past the last")
        first = check_integer(pair[0], 0, 2**31, "parent: tokens")
        last = check_integer(pair[1], 0, 2**31, "parent: tokens")
        if len(range(*slice(first, last).indices(case.num_tokens[rank]))) != len(matrix):
            raise CaseError(f"parent: tokens {first} to {last} of rank {rank} are not {len(matrix)}")
        tokens.append(slice(first, last))
    return Window(case, tuple(ranks), tuple(tokens))


@dataclass(frozen=True)
class Limits:
    """Bounds of drawn cases: how large they may be, and what they may contain.

    Attributes:
        ranks: R is one of these.
        max_local_experts, max_topk, max_tokens: bounds of L, K and of T on each rank.
        hidden: H is one of these; multiples of 8. Rounded up where an operation needs more.
        patterns: names of routing patterns (deepep.sim.cases.routing.PATTERNS).
        masks: how many of the examples mask ranks, 0 to 1.
        fixed: options that are not drawn.
    """

    ranks: Sequence[int] = (1, 2, 3, 4, 8)
    max_local_experts: int = 8
    max_topk: int = 10
    max_tokens: int = 12
    hidden: Sequence[int] = (128, 16, 136, 512, 640, 1024)
    patterns: Sequence[str] = tuple(PATTERNS)
    masks: float = 0.15
    fixed: dict[str, Any] = field(default_factory=dict)


def draw_case(choices: Choices, limits: Limits | None = None) -> Case:
    """One case, every decision of which is made by `choices`."""
    limits = limits or Limits()
    shape = draw_shape(choices, limits)
    matrix, origin = draw_indices(choices, limits, shape)
    return Case(
        num_experts=shape.num_experts,
        topk_idx=split(matrix, shape.num_tokens),
        hidden=choices.pick(limits.hidden),
        seed=choices.seed(),
        options=draw_options(choices, limits.fixed),
        masked=draw_mask(choices, shape.num_ranks, limits.masks),
        origin=origin,
    ).legal()


def draw_shape(choices: Choices, limits: Limits) -> RoutingShape:
    """R, E, K and each rank's T: equal, uneven, with empty ranks, or all empty."""
    num_ranks = choices.pick(limits.ranks)
    local = choices.integer(1, limits.max_local_experts)
    num_topk = choices.integer(1, limits.max_topk)
    style = choices.pick(("uneven", "equal", "some empty", "uneven", "one", "uneven"))
    most = choices.integer(0, limits.max_tokens)
    if style == "equal":
        tokens = [most] * num_ranks
    elif style == "one":
        tokens = [1] * num_ranks
    else:
        tokens = [choices.integer(0, most) for _ in range(num_ranks)]
        if style == "some empty":
            tokens = [0 if choices.flag() else t for t in tokens]
    return RoutingShape(num_ranks, local * num_ranks, num_topk, tuple(tokens))


def draw_indices(choices: Choices, limits: Limits, shape: RoutingShape) -> tuple[Indices, str]:
    """[n, K] for the tokens of all ranks, and how it was made."""
    entries = shape.total_tokens * shape.num_topk
    if entries <= choices.entries_one_by_one and choices.flag():
        flat = [choices.integer(-1, shape.num_experts - 1) for _ in range(entries)]
        return np.array(flat, dtype=np.int64).reshape(shape.total_tokens, shape.num_topk), "entries"
    pattern = choices.pick(limits.patterns)
    rng = np.random.default_rng(choices.seed())
    matrix = PATTERNS[pattern](shape, rng)
    if not choices.flag(0.4):
        return matrix, pattern
    twist = choices.pick(tuple(TWISTS))
    return TWISTS[twist](matrix, shape, rng), f"{pattern}+{twist}"


def draw_options(choices: Choices, fixed: dict[str, Any] | None = None) -> Options:
    """An alternative for each option that `fixed` does not set."""
    drawn = dict(fixed or {})
    for name, alternatives in SPACE.items():
        if name not in drawn:
            # The plain alternative more often than its share: rules often say most about plain calls.
            drawn[name] = alternatives[0] if choices.flag(0.4) else choices.pick(alternatives)
    return Options(**drawn)


def draw_mask(choices: Choices, num_ranks: int, probability: float) -> tuple[int, ...]:
    """Ranks that are left out: usually none, never all."""
    if num_ranks == 1 or probability == 0 or not choices.flag(probability):
        return ()
    count = choices.integer(1, min(2, num_ranks - 1))
    first = choices.integer(0, num_ranks - 1)
    return tuple(sorted((first + i) % num_ranks for i in range(count)))


def split(matrix: Indices, num_tokens: Sequence[int]) -> tuple[Indices, ...]:
    """The matrix of all ranks' tokens cut into one per rank."""
    return tuple(np.ascontiguousarray(part) for part in np.split(matrix, np.cumsum(num_tokens)[:-1]))
