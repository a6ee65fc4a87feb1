"""Sizes and numbers that ElasticBuffer suggests: memory, SMs, queue pairs. From this library's own needs and
measurements (docs/performance.md), not from DeepEP's formulas.
"""

from __future__ import annotations

import math

from deepep.config import DEFAULT_NUM_SMS, DEFAULT_SYMMETRIC_BYTES
from deepep.errors import ArgumentError, RangeError
from deepep.runtime.checks import MOST, check_int, check_num_experts

MIB = 1 << 20
BYTES_ALIGNMENT = 2 * MIB
MOST_TOPK = 32
DEFAULT_NUM_QPS = 17
"""Of a buffer that says nothing; V2's number for ranks that reach each other directly."""

_CONTROL_BYTES = 4 * MIB
_LIVE_DISPATCHES = 2
_LARGEST_USEFUL_SMS = 32
"""More have gained nothing in any measurement: T = 128, where 32 SMs are the best by a little, EP2; T = 4096
at EP4, where 24 and 32 take alike."""
_NVLINK_GBS, _READ_GBS, _WRITE_GBS = 370, 200, 50
"""Rates of the machine that DEFAULT_NUM_SMS was measured on: what SMs push over its links, and V2's defaults
for what one SM reads and writes."""


def buffer_size_hint(
    num_ranks: int,
    num_max_tokens: int,
    hidden: int,
    num_topk: int,
    *,
    use_fp8: bool,
    multiple_reduction: bool,
) -> int:
    """Bytes of symmetric memory for calls of this size, a multiple of 2 MiB.

    What every rank's M tokens take when all come here, twice (the rows of one dispatch may still be in use
    when the next arrives); and M rows back from each of the others, which have a quarter of the memory.
    """
    topk = num_topk or MOST_TOPK
    row = hidden + 4 * math.ceil(hidden / 32) if use_fp8 else 2 * hidden
    received = num_ranks * num_max_tokens * (row + 12 * topk + 4)
    if not multiple_reduction:  # every lane's row is dispatched back
        received += num_max_tokens * topk * (2 * hidden + 28)
    returned = (num_ranks - 1) * num_max_tokens * (2 * hidden + 4 * topk + 16)
    pool = math.ceil(_LIVE_DISPATCHES * received * 4 / 3)
    return aligned(max(4 * returned, pool) + _CONTROL_BYTES)


def aligned(num_bytes: int) -> int:
    """Rounded up to a multiple of 2 MiB."""
    return -(-num_bytes // BYTES_ALIGNMENT) * BYTES_ALIGNMENT


def symmetric_bytes(num_bytes: int | None, hint: int, environment: int) -> int:
    """Bytes that the engine is asked for: the number given, or DEEPEP_SYMMETRIC_BYTES, or as much as other
    buffers have, more if the hint says so: memory makes calls faster, for rows that find none are copied out.
    """
    return num_bytes or environment or max(hint, DEFAULT_SYMMETRIC_BYTES)


def theoretical_num_sms(
    num_ranks: int,
    num_experts: int,
    num_topk: int,
    *,
    prefer_overlap: bool,
    num_scaleout_topk: int,
    rates: tuple[int, int, int, int],
) -> int:
    """SMs of a dispatch or a combine. rates: RDMA, NVLink, what an SM reads and writes, GB/s; 0: as measured.

    The measured number holds for any experts and top-k: they change how many rows travel, and with them what
    travels and what is copied locally alike. It grows with links that are faster than the measured ones, and
    with slower SMs. Raises RangeError.
    """
    check_num_experts(num_experts, num_ranks)
    check_int("num_topk", num_topk, 1, min(MOST_TOPK, num_experts))
    check_int("num_scaleout_topk", num_scaleout_topk, 0, num_topk)
    names = ("rdma_gbs", "nvlink_gbs", "sm_read_gbs", "sm_write_gbs")
    _, link, read, write = (check_int(name, rate, 0, MOST) for name, rate in zip(names, rates, strict=True))
    if not prefer_overlap:
        base = _LARGEST_USEFUL_SMS
    else:
        base = DEFAULT_NUM_SMS
    slower = max(_READ_GBS / (read or _READ_GBS), _WRITE_GBS / (write or _WRITE_GBS))
    sms = math.ceil(base * (link or _NVLINK_GBS) / _NVLINK_GBS * slower)
    return max(4, sms + sms % 2)


def theoretical_num_qps(num_sms: int, num_allocated: int) -> int:
    """Queue pairs of a call with so many SMs: V2's number. No backend opens queue pairs of its own."""
    return min(check_int("num_sms", num_sms, 1, MOST), 9, num_allocated)


def check_num_bytes(num_bytes: object) -> int:
    """A size that the constructor was given."""
    size = check_int("num_bytes", num_bytes, 1, 1 << 62)
    if size % BYTES_ALIGNMENT:
        raise RangeError("num_bytes", str(size), "a multiple of 2 MiB")
    return size


def check_storage_bytes(num_cpu_bytes: object, num_bytes: object) -> int:
    """Engram storage's share of a buffer's size, which is given then, and more."""
    storage = check_int("num_cpu_bytes", num_cpu_bytes, 0, 1 << 62)
    if storage % BYTES_ALIGNMENT:
        raise RangeError("num_cpu_bytes", str(storage), "a multiple of 2 MiB")
    if storage and (num_bytes is None or check_num_bytes(num_bytes) <= storage):
        got = f"{storage}, with num_bytes = {num_bytes}"
        raise ArgumentError("num_cpu_bytes", got, "less than num_bytes, of which it is a part")
    return storage
