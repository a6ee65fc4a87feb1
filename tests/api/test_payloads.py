"""Lists of tensors that travel with a row: any dtypes of 1, 2 or 4 bytes, bit for bit, on every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepep.api.payloads import PayloadForm

RANKS, EXPERTS, MOST = 2, 4, 8
FORMS: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "MXFP8": [("float8_e4m3fn", (256,)), ("float8_e8m0fnu", (8,))],  # a scale of 32 channels
    "NVFP4": [("float4_e2m1fn_x2", (64,)), ("float8_e4m3fn", (8,)), ("float32", ())],  # of 16, and of a token
    "NVFP4 and an odd one": [("uint8", (64,)), ("float8_e4m3fn", (8,)), ("uint8", (3,)), ("bfloat16", (1,))],
    "BF16 and its residual": [("bfloat16", (64,)), ("bfloat16", (64,))],
    "scales first": [("float32", (4,)), ("int8", (128,))],
    "one alone": [("uint8", (32,))],
    "none of whole 16 bytes": [("int16", (5,)), ("float16", (2, 3)), ("bool", (3,)), ("complex32", (2,))],
    "a word of a row each": [("int32", ()), ("uint16", ())],
}
SKIPPED = {name for name in ("float4_e2m1fn_x2", "float8_e8m0fnu") if not hasattr(torch, name)}


def tensors_of(kinds: list[tuple[str, tuple[int, ...]]], rank: int, strided: bool) -> list[torch.Tensor]:
    """Random bits, NaNs among them, of T tokens; rank 1 has fewer. strided: no tensor lies as it travels."""
    generator = torch.Generator().manual_seed(7 * rank)
    found = []
    for name, shape in kinds:
        dtype = getattr(torch, name)
        size = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(0, 2 if name == "bool" else 256, (6 - 4 * rank, size), generator=generator)
        wide = torch.cat([raw.to(torch.uint8), raw.to(torch.uint8)], 1) if strided else raw.to(torch.uint8)
        rows = wide.view(dtype)[:, : size // dtype.itemsize]
        found.append(
            rows.view(len(rows), *shape) if not strided or len(shape) < 2 else rows.reshape(-1, *shape)
        )
    return found


def topk_of(rank: int) -> torch.Tensor:
    """[T, 2]: tokens for both ranks, for one, for none, an expert twice."""
    if rank:
        return torch.tensor([[3, 0], [2, 1]])
    return torch.tensor([[0, 1], [2, 3], [0, 2], [-1, -1], [3, -1], [1, 1]])


def expected_of(kinds: list[tuple[str, tuple[int, ...]]], receiver: int, strided: bool) -> list[torch.Tensor]:
    """By definition: the rows of source ranks ascending, whose tokens name an expert of the receiver."""
    parts = []
    for source in range(RANKS):
        wanted = (topk_of(source) // (EXPERTS // RANKS) == receiver).any(1)
        parts.append([as_bytes(t)[wanted] for t in tensors_of(kinds, source, strided)])
    return [torch.cat(pair) for pair in zip(*parts, strict=True)]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[N, bytes], a copy."""
    flat = tensor.reshape(len(tensor), -1) if tensor.dtype.itemsize > 1 else tensor.view(torch.uint8)
    return flat.reshape(len(tensor), -1).contiguous().view(torch.uint8)


def check(received: Any, kinds: Any, expected: list[torch.Tensor]) -> None:
    assert type(received) is list
    assert len(received) == len(kinds)
    for (name, shape), tensor, bits in zip(kinds, received, expected, strict=True):
        assert tensor.dtype == getattr(torch, name)
        assert tensor.shape[1:] == shape
        assert torch.equal(as_bytes(tensor)[: len(bits)], bits)


def exchanged(ctx: Any, buffer_of: Any, backend: str | None, forms: Any) -> None:
    from deepep import Buffer, ElasticBuffer

    buffer, idx = buffer_of(ctx, backend=backend), topk_of(ctx.rank)
    weights = torch.ones(idx.shape)
    options = {"num_max_tokens_per_rank": MOST, "hidden": 128, "num_topk": 2, "backend": backend}
    with ElasticBuffer(ctx.group, **options) as v2:
        for number, kinds in enumerate(forms):
            strided = bool(number % 2)
            x = tensors_of(kinds, ctx.rank, strided)
            bits = [as_bytes(tensor) for tensor in x]
            expected = expected_of(kinds, ctx.rank, strided)
            routed = {"topk_idx": idx, "topk_weights": weights, "num_experts": EXPERTS}
            first = buffer.dispatch(x, **routed)
            check(first.recv_x, kinds, expected)
            assert len(first.recv_x[0]) == len(expected[0])
            again = buffer.dispatch(x, handle=first.handle)
            check(again.recv_x, kinds, expected)
            event = Buffer.capture()
            later = buffer.dispatch(x, **routed, previous_event=event, async_finish=True, num_worst_tokens=20)
            later.event.current_stream_wait()
            check(later.recv_x, kinds, expected)
            assert len(later.recv_x[0]) == 20
            plain = v2.dispatch(x, idx, weights, num_experts=EXPERTS, async_with_compute_stream=True)
            plain.event.current_stream_wait()
            check(plain.recv_x, kinds, expected)
            check(v2.dispatch(x, handle=plain.handle).recv_x, kinds, expected)
            rows = v2.dispatch(x, idx, weights, num_experts=EXPERTS, do_expand=True)
            lanes = rows.handle.recv_src_metadata[:, 2:]
            for token, of_token in enumerate(lanes.tolist()):
                for row in (row for row in of_token if row >= 0):
                    for got, wanted in zip(rows.recv_x, expected, strict=True):
                        assert torch.equal(as_bytes(got)[row], wanted[token])
            assert sum(int(row >= 0) for of_token in lanes.tolist() for row in of_token) == len(
                rows.recv_x[0]
            )
            assert all(torch.equal(as_bytes(t), b) for t, b in zip(x, bits, strict=True))


@pytest.mark.parametrize("backend", [None, "emulator"])
def test_tensors_arrive_bit_for_bit(world_of: Any, buffer_of: Any, backend: str | None) -> None:
    if backend == "emulator":
        pytest.importorskip("deepep._emulator")
    forms = [kinds for kinds in FORMS.values() if not SKIPPED & {name for name, _ in kinds}]
    if backend == "emulator":  # each way of packing once
        forms = forms[1:3] + forms[-2:]
    world_of(RANKS).run(exchanged, buffer_of, backend, forms)


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
