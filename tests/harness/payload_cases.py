"""Lists of tensors that travel with a row, and what has to arrive: on any device and backend."""

from __future__ import annotations

from typing import Any

import torch

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
    """[N, bytes] on the CPU."""
    flat = tensor.reshape(len(tensor), -1) if tensor.dtype.itemsize > 1 else tensor.view(torch.uint8)
    return flat.reshape(len(tensor), -1).contiguous().view(torch.uint8).cpu()


def check(received: Any, kinds: Any, expected: list[torch.Tensor]) -> None:
    assert type(received) is list
    assert len(received) == len(kinds)
    for (name, shape), tensor, bits in zip(kinds, received, expected, strict=True):
        assert tensor.dtype == getattr(torch, name)
        assert tensor.shape[1:] == shape
        assert torch.equal(as_bytes(tensor)[: len(bits)], bits)


def exchange(buffer: Any, group: Any, backend: str | None, forms: Any, device: Any = "cpu") -> None:
    """Sends lists every way: fresh, cached, with events and a worst case, and the same by ElasticBuffer."""
    from deepep import Buffer, ElasticBuffer

    rank, idx = buffer.rank, topk_of(buffer.rank).to(device)
    weights = torch.ones(idx.shape, device=device)
    options = {"num_max_tokens_per_rank": MOST, "hidden": 128, "num_topk": 2, "backend": backend}
    with ElasticBuffer(group, **options) as v2:
        for number, kinds in enumerate(forms):
            strided = bool(number % 2)
            x = [tensor.to(device) for tensor in tensors_of(kinds, rank, strided)]
            bits = [as_bytes(tensor) for tensor in x]
            expected = expected_of(kinds, rank, strided)
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
