"""Properties of the reference's rules that no operation shows: expanded rows, two-level routes, formats.

The core is compared with these rules and the kernels with the core, so they are judged here from the case
alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from deepep.sim.cases.case import Case
from deepep.sim.rules.checking import Violation, arriving, check_equal, floats, sent
from deepep.sim.rules.observed import bits
from deepep.sim.rules.oracle import REFERENCE, GlobalView

GROUP = 128
MAX_LOG2_RANGE = 32.0
STEPS = 510


def expanded_rows_are_grouped(case: Case, modules: GlobalView) -> None:
    """One row per (received row, local entry), by expert, then row, then k; experts begin aligned."""
    local, alignment = case.num_local_experts, case.options.expert_alignment
    for rank in case.dispatch_members:
        entries = [case.topk_idx[source][token] for source, token in arriving(case, rank)]
        global_idx = np.array(entries, dtype=np.int64).reshape(-1, case.num_topk)
        idx = np.where(global_idx // local == rank, global_idx - rank * local, -1)
        idx[global_idx < 0] = -1
        rows, psum = modules.layout.expanded_rows(torch.from_numpy(idx), local, alignment)
        expected, ends, start = np.full_like(idx, -1), [], 0
        for expert in range(local):
            for place in np.argwhere(idx == expert):
                expected[tuple(place)] = start
                start += 1
            ends.append(start)
            start = -(-start // alignment) * alignment
        check_equal("expanded rows", rank, expected, rows.numpy())
        check_equal("ends of experts", rank, ends, psum.numpy())


def two_levels_deliver_the_same(case: Case, modules: GlobalView) -> None:
    """A token goes to a node at most once, and from there to every rank that wants it, into the flat row."""
    size = case.options.ranks_per_node
    tables = [torch.from_numpy(case.is_token_in_rank(source)) for source in range(case.num_ranks)]
    routes = modules.layout.two_level_routes(tables, size)
    held = [list(zip(*(column.tolist() for column in rows), strict=True)) for rows in routes.gateway_rows]
    crossings = Counter(
        (source, token, gateway // size) for gateway, rows in enumerate(held) for source, token in rows
    )
    wanted = {
        (source, token, rank // size)
        for source, table in enumerate(tables)
        for token, rank in table.nonzero().tolist()
    }
    if set(crossings) != wanted:
        odd = sorted(set(crossings) ^ wanted)[0]
        raise Violation(f"token {odd[1]} of rank {odd[0]}: wrong about node {odd[2]}")
    if crossings and max(crossings.values()) > 1:
        (source, token, node), count = crossings.most_common(1)[0]
        raise Violation(f"token {token} of rank {source} goes to node {node} {count} times")
    for source, in_node in enumerate(routes.is_token_in_node):
        nodes = [
            [token, node]
            for token in range(len(in_node))
            for node in range(in_node.shape[1])
            if (source, token, node) in wanted
        ]
        check_equal("is_token_in_node", source, nodes, in_node.nonzero().tolist())
    for rank, rows in enumerate(routes.final_rows):
        delivered = [held[gateway][row] for gateway, row in zip(*(c.tolist() for c in rows), strict=True)]
        flat = [
            (source, token)
            for source, table in enumerate(tables)
            for token in table[:, rank].nonzero().flatten().tolist()
        ]
        check_equal("rows over two levels", rank, flat, delivered)
        if any(gateway // size != rank // size for gateway in rows.gateway.tolist()):
            raise Violation(f"rank {rank}: a row is forwarded from another node", rank)


def packed_exponents_round_trip(case: Case, modules: GlobalView) -> None:
    """UE8M0: power-of-two scales survive packing, byte j of a word is group 4p + j, of any strides."""
    rng = np.random.default_rng(case.seed)
    exponents = rng.integers(1, 255, (sum(case.num_tokens), 8))
    scales = torch.from_numpy((exponents << 23).astype(np.int32)).view(torch.float32)
    for stored in (scales, modules.formats.column_major_scales(scales)):
        packed = modules.formats.ue8m0_pack(stored)
        shifted = exponents.reshape(-1, 2, 4) << (8 * np.arange(4))
        check_equal("packed exponents", 0, shifted.sum(axis=2).astype(np.uint32), bits(packed))
        check_equal("unpacked exponents", 0, bits(scales), bits(modules.formats.ue8m0_unpack(packed)))
    column_major = modules.formats.column_major_scales(scales)
    if len(scales) and column_major.stride() != (1, len(scales)):
        raise Violation(f"column-major scales have strides {column_major.stride()}")


def logfmt_rounds_to_the_nearest_code(case: Case, modules: GlobalView) -> None:
    """Codes are exact in packing; a value is off by at most half the distance of its neighbouring codes.

    Neighbours are a factor 2^step apart, so half their distance is at most (2^step - 1) / 2 of the value;
    below the smallest code, half of that code. 2^-18 covers what the float32 roundings of the logarithms, of
    magnitudes below 64, do to the value.
    """
    rows = [sent(case, rank).tokens for rank in range(case.num_ranks)]
    tokens = np.concatenate(rows)[:, : case.hidden // GROUP * GROUP]
    if tokens.size == 0:
        return
    x = torch.from_numpy(tokens.view(np.int16)).view(torch.bfloat16)
    codes, meta, qualifies = modules.logfmt.logfmt_encode(x)
    packed = modules.logfmt.logfmt_pack(codes)
    check_equal("packed LogFMT codes", 0, codes.numpy(), modules.logfmt.logfmt_unpack(packed).numpy())
    with np.errstate(invalid="ignore"):  # signalling NaNs
        value = floats(tokens).astype(np.float64).reshape(len(tokens), -1, GROUP)
    largest, smallest = np.abs(value).max(axis=2), np.abs(value).min(axis=2)
    check_equal("LogFMT metadata", 0, *_comparable(np.stack([largest, smallest], axis=-1), meta))
    with np.errstate(all="ignore"):
        high, low = np.log2(largest), np.maximum(np.log2(smallest), np.log2(largest) - MAX_LOG2_RANGE)
    usable = (high < 0) & (low < high)
    _check_chunks(usable, qualifies.numpy())
    decoded = modules.logfmt.logfmt_decode(codes, meta).numpy().astype(np.float64).reshape(value.shape)
    with np.errstate(all="ignore"):
        half = np.abs(value) * (np.exp2((high - low) / STEPS) - 1)[..., None] / 2
        slack = np.maximum(half, np.exp2(low)[..., None] / 2) + np.abs(value) * 2.0**-18
        off = np.abs(decoded - value)
    wrong = (off > slack) & usable[..., None]
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise Violation(f"LogFMT{list(place)}: {value[place]} became {decoded[place]}", place=place)


def _comparable(expected: np.ndarray, meta: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both as numbers, NaNs as one value."""
    return np.nan_to_num(expected, nan=-1.0), np.nan_to_num(meta.double().numpy(), nan=-1.0)


def _check_chunks(usable: np.ndarray, qualifies: np.ndarray) -> None:
    """Chunks of 1024 channels (512 where 1024 does not divide the row) are encoded whole or not at all."""
    groups = usable.shape[1]
    size = 8 if groups % 8 == 0 else 4
    for start in range(0, groups, size):
        whole = usable[:, start : start + size].all(axis=1, keepdims=True)
        part = qualifies[:, start : start + size]
        check_equal(f"LogFMT chunk at group {start}", 0, np.broadcast_to(whole, part.shape), part)


ReferenceProperty = Callable[[Case, GlobalView], None]

RULES: dict[str, ReferenceProperty] = {
    "expanded rows are grouped": expanded_rows_are_grouped,
    "two levels deliver the same": two_levels_deliver_the_same,
    "packed exponents round trip": packed_exponents_round_trip,
    "LogFMT rounds to the nearest code": logfmt_rounds_to_the_nearest_code,
}


def check_rules(case: Case, modules: GlobalView = REFERENCE) -> None:
    """Raises Violation, with the rule's name, if one does not hold."""
    for name, rule in RULES.items():
        try:
            rule(case, modules)
        except Violation as violation:
            raise Violation(str(violation), violation.rank, violation.place, name) from None
