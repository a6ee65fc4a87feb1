"""Roles of a launch's blocks: measured numbers (docs/kernels.md, "Why roles are split by SM")."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockSplit:
    """Numbers of a launch's blocks by role: that write to other ranks, that work on rows that stay.

    The two are disjoint, or both are all blocks. In a combine `local` may be all blocks whatever `remote` is:
    then they must be resident together, and where rows are few the kernel has each do both kinds of work.
    """

    total: int
    remote: int
    local: int


#: SMs that push at most, in a dispatch and in a combine, whose sums need the rest (docs/performance.md)
PUSHING_SMS = 12
RETURNING_SMS = 9
#: the same in a dispatch of more than two ranks: with four, 12 were slower
PUSHING_SMS_TO_MANY = 8
#: SMs that keep pace with them on the rank-local rows of two ranks, and the fewest that can
LOCAL_SMS = 15
FEWEST_LOCAL_SMS = 8
#: up to so many SMs of a dispatch, and of a combine, each does both kinds of work; beyond, the kinds keep out
#: of each other's way
SHARING_SMS = 12
MIXING_SMS = 20
#: up to so many SMs, a combine of at least so many bytes a peer leaves what travels to the copy engine
COPY_ENGINE_SMS = 12
COPY_ENGINE_BYTES = 8 << 20
#: what it is ordered costs the host time: a few orders a call
CE_ORDERS = 8
#: from so many SMs on, or with so few bytes of them, a combine sums expanded rows itself; else a pass of all
#: SMs before it is faster
SUMMING_SMS = 48
SUMMED_BYTES = 16 << 20
#: from so many SMs on a dispatch spreads expanded rows itself; with fewer a pass of all SMs behind it is to
#: be faster: both predicted
SPREADING_SMS = 48
#: no parts: SMs return the rows
NO_COPY_ENGINE = (0, 100)
#: how long all sums take by so many SMs, of what the engine takes, in percent
SUMMING = ((8, 100), (COPY_ENGINE_SMS, 85))
#: up to so many SMs, a combine may count on all its blocks being resident together
RESIDENT_SMS = 32


@functools.cache
def dispatch_split(num_sms: int, num_ranks: int) -> BlockSplit:
    """Roles of a dispatch's blocks, using no more than `num_sms`. The model is docs/kernels.md's.

    With more ranks less stays on each, and fewer local SMs do.
    """
    if num_ranks == 1:
        return BlockSplit(num_sms, 0, num_sms)
    if num_sms <= SHARING_SMS:
        return BlockSplit(num_sms, num_sms, num_sms)
    if num_ranks == 2:
        pushing = min(PUSHING_SMS, (num_sms + 1) // 2)
    else:
        pushing = min(PUSHING_SMS_TO_MANY, num_sms - -(-FEWEST_LOCAL_SMS // (num_ranks - 1)))
    local = min(num_sms - pushing, max(2, -(-LOCAL_SMS // (num_ranks - 1))))
    return BlockSplit(pushing + local, pushing, local)


@functools.cache
def expanded_split(num_sms: int, num_ranks: int) -> BlockSplit:
    """Roles of a dispatch that spreads rows as they come: who does not push spreads this rank's and others'.

    Who does helps with others' behind it (docs/kernels.md). Raises ValueError for fewer than two SMs.
    """
    if num_ranks == 1:
        return BlockSplit(num_sms, 0, num_sms)
    if num_sms < 2:
        raise ValueError("rows are spread by others than those that push: two SMs at least")
    most = PUSHING_SMS if num_ranks == 2 else PUSHING_SMS_TO_MANY
    pushing = min(most, num_sms // 2)
    return BlockSplit(num_sms, pushing, num_sms - pushing)


@functools.cache
def ce_chunks(num_sms: int, num_ranks: int) -> tuple[int, int]:
    """Into how many parts the copy engine cuts what it returns in a combine, and how long each is of the one
    before, in percent: so that sums never wait long, and little is left to sum at the end. No parts: SMs
    return it.
    """
    if num_ranks == 1 or num_sms > COPY_ENGINE_SMS:
        return NO_COPY_ENGINE
    chunks = min(4, max(2, CE_ORDERS // (num_ranks - 1)))
    return chunks, next(percent for sms, percent in SUMMING if num_sms <= sms)


@functools.cache
def combine_split(num_sms: int, num_ranks: int, *, expanded: bool = False) -> BlockSplit:
    """Roles of a combine's blocks: with few SMs all push and sum, else RETURNING_SMS push, the rest sum.

    Half push where they sum expanded rows first: the others sum as many, of as many bytes.
    """
    if num_ranks == 1:
        return BlockSplit(num_sms, 0, num_sms)
    if num_sms <= MIXING_SMS:
        return BlockSplit(num_sms, num_sms, num_sms)
    pushing = num_sms // 2 if expanded else RETURNING_SMS
    return BlockSplit(num_sms, pushing, num_sms if num_sms <= RESIDENT_SMS else num_sms - pushing)
