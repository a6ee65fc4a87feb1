"""Lists of tensors that travel with a row: any dtypes of 1, 2 or 4 bytes, bit for bit, on every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.payload_cases import EXPERTS, FORMS, MOST, RANKS, SKIPPED, exchange, tensors_of, topk_of

from deepep.api.payloads import PayloadForm


def exchanged(ctx: Any, buffer_of: Any, backend: str | None, forms: Any) -> None:
    exchange(buffer_of(ctx, backend=backend), ctx.group, backend, forms)


@pytest.mark.parametrize("backend", [None, "emulator"])
def test_tensors_arrive_bit_for_bit(world_of: Any, buffer_of: Any, backend: str | None) -> None:
    if backend == "emulator":
        pytest.importorskip("deepep._emulator")
    forms = [kinds for kinds in FORMS.values() if not SKIPPED & {name for name, _ in kinds}]
    if backend == "emulator":  # each way of packing once
        forms = forms[1:3] + forms[-2:]
    world_of(RANKS).run(exchanged, buffer_of, backend, forms)


def shared(ctx: Any, buffer_of: Any) -> list[bool]:
    """Rows, scales and weights that lie in one allocation, and travel under several dtypes."""
    idx = topk_of(ctx.rank)
    memory = torch.arange(len(idx) * (64 + idx.shape[1]), dtype=torch.float32)
    parts = [memory[: len(idx) * 64].view(len(idx), 64), memory[len(idx) * 64 :].view(idx.shape)]
    buffer = buffer_of(ctx, backend="emulator")
    given = {"topk_idx": idx, "topk_weights": parts[1], "num_experts": EXPERTS}
    of_list, alone = buffer.dispatch(parts, **given), buffer.dispatch(parts[0], **given)
    pairs = zip(of_list.recv_x, (alone.recv_x, alone.recv_topk_weights), strict=True)
    there = alone.recv_topk_idx >= 0
    return [bool((a == b)[there if a.shape == there.shape else ...].all()) for a, b in pairs]


def test_tensors_of_one_allocation_reach_the_emulator(world_of: Any, buffer_of: Any) -> None:
    pytest.importorskip("deepep._emulator")
    assert world_of(RANKS).run(shared, buffer_of) == [[True, True]] * RANKS


def test_formats_with_scales_are_not_copied() -> None:
    """The longest goes as the row, and one other as words, where they lie."""
    from deepep.api.payloads import form_of, pack
    from deepep.runtime.requests import Schedule

    for name in ("MXFP8", "BF16 and its residual", "scales first"):
        if SKIPPED & {dtype for dtype, _ in FORMS[name]}:
            continue
        tensors = tensors_of(FORMS[name], 0, False)
        form = form_of(tensors, "cpu")
        (row, words), made = pack(form, tensors, None, Schedule())
        assert made is None
        assert {row.data_ptr(), words.data_ptr()} == {tensor.data_ptr() for tensor in tensors}
    (alone,) = tensors_of(FORMS["one alone"], 0, False)
    (row, none), made = pack(form_of([alone], "cpu"), [alone], None, Schedule())
    assert row.data_ptr() == alone.data_ptr()
    assert none is made is None


@pytest.mark.parametrize("name", FORMS)
def test_fields_lie_apart_and_on_their_own_boundaries(name: str) -> None:
    if SKIPPED & {dtype for dtype, _ in FORMS[name]}:
        pytest.skip("a dtype that this torch does not have")
    form = PayloadForm.of([(getattr(torch, dtype), shape) for dtype, shape in FORMS[name]])
    taken: set[int] = set()
    for number in form.rest():
        field = form.fields[number]
        span = set(range(field.begin, field.begin + field.num_bytes))
        assert not taken & span
        assert field.begin % field.dtype.itemsize == 0
        taken |= span
    assert form.num_bytes % (16 if form.main is None else 4) == 0
    assert not taken or max(taken) < form.num_bytes


def refused(ctx: Any, buffer_of: Any) -> list[str]:
    """Errors of all ranks for what rank 0 does; then a dispatch that is none of it."""
    from deepep import ArgumentError, ElasticBuffer

    buffer, idx = buffer_of(ctx), topk_of(ctx.rank)
    weights, tokens = torch.ones(idx.shape), len(idx)
    good = [torch.ones(tokens, 16, dtype=torch.uint8)]
    bad: list[Any] = [
        [],
        [1],
        [torch.ones(tokens, 2, dtype=torch.float64)],
        [torch.ones(tokens, 0)],
        [torch.ones(())],
    ]
    bad += [[*good, torch.ones(tokens + 1, 4)], [torch.ones(tokens, 4, device="meta")]]
    found = []
    for x in bad:
        try:
            given = x if ctx.rank == 0 else good
            buffer.dispatch(given, topk_idx=idx, topk_weights=weights, num_experts=EXPERTS)
        except ArgumentError as error:
            found.append(type(error).__name__)
    handle = buffer.dispatch(good, topk_idx=idx, topk_weights=weights, num_experts=EXPERTS).handle
    calls = [
        lambda: (
            buffer.dispatch([good[0].repeat(1, 3)], handle=handle)
            if ctx.rank
            else buffer.dispatch(good, handle=handle)
        ),
        lambda: buffer.dispatch([good[0].view(torch.int16 if ctx.rank else torch.uint8)], handle=handle),
        lambda: buffer.combine(good, handle),
        lambda: buffer.low_latency_dispatch(good, idx, MOST, EXPERTS),
    ]
    options = {"num_max_tokens_per_rank": MOST, "hidden": 128}
    with ElasticBuffer(ctx.group, **options) as v2:
        wide = [torch.ones(tokens, 257 * 16, dtype=torch.uint8)]
        named = {"num_experts": EXPERTS}
        calls += [
            lambda: v2.dispatch(good, idx, weights, use_tma_aligned_col_major_sf=True, **named),
            lambda: v2.dispatch(wide, idx, weights, **named),
            lambda: v2.dispatch([good[0].view(torch.int32)] if ctx.rank else good, idx, weights, **named),
        ]
        for call in calls:
            try:
                call()
            except ArgumentError as error:
                found.append(type(error).__name__)
        v2.dispatch(good, idx, weights, num_experts=EXPERTS)
    return found


def test_what_cannot_travel_is_refused_on_all_ranks(world_of: Any, buffer_of: Any) -> None:
    kinds = ["ShapeError", "ArgumentTypeError", "ArgumentTypeError", "ShapeError", "ShapeError"]
    kinds += ["ShapeError", "DeviceError"]
    calls = [
        "MismatchError",
        "MismatchError",
        "ArgumentTypeError",
        "ArgumentTypeError",
        "ArgumentError",
        "CapacityError",
    ]
    calls.append("MismatchError")
    for found in world_of(RANKS).run(refused, buffer_of):
        assert found == [*kinds, *calls]
