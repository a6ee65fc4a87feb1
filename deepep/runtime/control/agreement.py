"""The control exchange: what the ranks post before any payload moves.

Every operation starts with one small all_gather of headers. It settles that all ranks are in the same
operation, with arguments that fit together, and that none of them was given bad input; if not, all raise the
same error. A rank with bad input takes part like any other, so nobody is left half inside an operation.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import deepep.errors as errors
from deepep.errors import ArgumentError, MismatchError
from deepep.runtime.control import liveness
from deepep.runtime.control.transport import Link
from deepep.runtime.control.waits import NOT_MEASURED
from deepep.runtime.requests import Operation

if TYPE_CHECKING:
    from deepep.runtime.control.membership import Membership

_MAX_AGREED = 16
_HEADER_WORDS = 5 + _MAX_AGREED + 2  # the last two: of waits.py
_ERROR_BYTES = 1024
_MAX_TEXT = 300  # characters of each part of an error message that travel

NO_LIMIT = -1

# Dtypes travel as their position here.
_DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)


def dtype_code(dtype: torch.dtype | None) -> int:
    """The number a dtype travels as; -1 for none. Dtypes outside the list share -2."""
    if dtype is None:
        return -1
    return _DTYPES.index(dtype) if dtype in _DTYPES else -2


@dataclass(frozen=True)
class Header:
    """A rank's statement about the operation that it enters.

    sequence: how many operations this rank has started on the present link. agreed: arguments that must be
    the same on all ranks, in an order that depends on the operation alone. num_tokens and limit may differ:
    T, and how many rows this rank is able to receive (NO_LIMIT when it does not matter). busy, asks: how long
    this rank waited for nobody, in nanoseconds, and whether it wants waits measured (waits.py).
    """

    operation: Operation
    sequence: int
    agreed: Mapping[str, int] = field(default_factory=dict)
    num_tokens: int = 0
    limit: int = NO_LIMIT
    busy: int = NOT_MEASURED
    asks: bool = False

    def encode(self, bad: bool) -> torch.Tensor:
        """[_HEADER_WORDS] int64 on the host."""
        values = list(self.agreed.values())
        assert len(values) <= _MAX_AGREED
        words = [self.operation, self.sequence, self.num_tokens, self.limit, bad, *values]
        words += [0] * (_HEADER_WORDS - 2 - len(words))
        return torch.tensor([*words, self.busy, self.asks], dtype=torch.int64, device="cpu")


def exchange(
    link: Link,
    header: Header,
    problem: ArgumentError | None,
    arrived: Callable[[dict[int, int], bool], None] | None = None,
) -> dict[int, int]:
    """Compares this rank's header with all others'; returns every rank's limit.

    arrived: called once all headers are there, with every rank's `busy`, and whether any asks.
    Raises `problem`, or the error of the lowest rank that has one, or MismatchError; the same on every rank.
    """
    headers = {
        rank: words.tolist() for rank, words in link.all_gather(header.encode(problem is not None)).items()
    }
    if arrived is not None:
        busy = {rank: words[-2] for rank, words in headers.items()}
        arrived(busy, any(words[-1] for words in headers.values()))
    if any(words[4] for words in headers.values()):
        raise _lowest_problem(link, problem)
    first = min(headers)
    for rank, words in sorted(headers.items()):
        _check_same_operation(rank, words, first, headers[first])
    for rank, words in sorted(headers.items()):
        _check_agreed(header, rank, words, first, headers[first])
    return {rank: words[3] for rank, words in headers.items()}


def _lowest_problem(link: Link, problem: ArgumentError | None) -> ArgumentError:
    """The error of the lowest rank that has one: those who have none learn it, those who have agree on it."""
    packed = torch.zeros(_ERROR_BYTES, dtype=torch.uint8, device="cpu")
    if problem is not None:
        raw = encode_error(problem.at(link.rank))
        packed[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    everyone = link.all_gather(packed)
    for rank in sorted(everyone):
        raw = bytes(everyone[rank].tolist()).rstrip(b"\0")
        if raw:
            return decode_error(raw)
    raise AssertionError("a rank announced an error and did not post it")


def _check_same_operation(rank: int, words: list[int], first: int, reference: list[int]) -> None:
    if words[:2] != reference[:2]:
        raise MismatchError(
            "operation", _operation_text(words), f"{_operation_text(reference)}, as on rank {first}", rank
        )


def _operation_text(words: list[int]) -> str:
    return f"{Operation(words[0]).label} (operation number {words[1]})"


def _check_agreed(header: Header, rank: int, words: list[int], first: int, reference: list[int]) -> None:
    for position, (name, mine) in enumerate(header.agreed.items(), start=5):
        if words[position] != reference[position]:
            raise _mismatch(name, mine, words[position], reference[position], rank, first)


def _mismatch(
    name: str, mine: int | str, theirs: int | str, reference: int | str, rank: int, first: int
) -> MismatchError:
    def text(value: int | str) -> str:
        if name.endswith("dtype"):
            assert isinstance(value, int)
            return str(_DTYPES[value]).removeprefix("torch.") if value >= 0 else "none"
        return str(bool(value) if isinstance(mine, bool) else value)

    return MismatchError(name, text(theirs), f"{text(reference)}, as on rank {first}", rank)


def encode_error(problem: ArgumentError) -> bytes:
    """An error as at most _ERROR_BYTES bytes; its texts are cut if need be."""
    texts = [problem.got[:_MAX_TEXT], problem.allowed[:_MAX_TEXT]]
    while True:
        parts = [type(problem).__name__, problem.argument, *texts, problem.rank]
        raw = json.dumps(parts, ensure_ascii=False).encode()
        if len(raw) <= _ERROR_BYTES:
            return raw
        texts = [text[: len(text) * 3 // 4] for text in texts]


def decode_error(raw: bytes) -> ArgumentError:
    """The error that `encode_error` packed."""
    name, argument, got, allowed, rank = json.loads(raw)
    kind = getattr(errors, name, ArgumentError)
    assert issubclass(kind, ArgumentError)
    return kind(argument, got, allowed, rank)


def agree(
    membership: Membership,
    stage: str,
    statement: Mapping[str, int | str],
    problem: ArgumentError | None,
    facts: Mapping[str, Any] | None = None,
) -> dict[int, dict[str, Any]]:
    """A stage of the construction: every rank is there and states the same, or all raise.

    facts: what may differ; returns every rank's. Raises the error of the lowest rank that has a `problem`,
    MismatchError, or PeerTimeoutError.
    """
    mine = (
        json.dumps([dict(statement), liveness.identity(), dict(facts or {})])
        if problem is None
        else encode_error(problem.at(membership.rank)).decode()
    )
    met = membership.exchange(stage, mine, "they did not construct")
    posts = {rank: json.loads(raw) for rank, raw in sorted(met.items())}
    for rank, post in posts.items():
        if not isinstance(post[0], dict):
            raise decode_error(met[rank])
    membership.introduce({rank: identity for rank, (_, identity, _) in posts.items()})
    first = min(posts)
    for rank, (stated, _, _) in posts.items():
        for name, value in stated.items():
            wanted = posts[first][0].get(name)
            if value != wanted:
                raise _mismatch(name, value, value, wanted, rank, first)
    return {rank: facts for rank, (_, _, facts) in posts.items()}


def arrival(backend: str | None, able: Sequence[str]) -> dict[str, Any]:
    """A rank's facts when it comes to construct: the backend that it asks for, if it does; the backends that
    its machine can run; its host.
    """
    return {"backend": backend, "able": list(able), "host": socket.gethostname()}


def reason(rank: int, error: BaseException) -> str:
    """The text for the others of what this rank raises."""
    text = f"rank {rank} raised {type(error).__name__}: {error}"
    return text.partition("\n")[0].rstrip(": ")
