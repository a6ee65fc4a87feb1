"""Cases of ElasticBuffer: drawn inputs of all ranks, and a rank's round trip against the oracle, to the bit.

For processes on any backend and device: the same cases run on the reference, the emulator and GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepep.reference import elastic as oracle
from deepep.reference.layout import align_up
from harness.device_calls import laid_out, same_bits


@dataclass(frozen=True)
class ElasticCase:
    """One round trip. tokens: of each rank. most: M, 0: the largest. pattern, scale_layout: by name."""

    tokens: tuple[int, ...]
    hidden: int = 64
    topk: int = 3
    local_experts: int = 3
    most: int = 0
    alignment: int = 1
    expand: bool = False
    fp8: bool = False
    waits: bool = True
    asynchronous: bool = False
    zero_padding: bool = False
    column_major: bool = False
    single_reduction: bool = False
    num_biases: int = 0
    with_weights: bool = True
    pattern: str = "uniform"
    scale_layout: str = "row"
    index_dtype: torch.dtype = torch.int64
    ranks_per_domain: int = 0
    num_sms: int = 0

    @property
    def num_experts(self) -> int:
        return self.local_experts * len(self.tokens)

    @property
    def num_max_tokens(self) -> int:
        return self.most or max(1, *self.tokens)


_PLAIN = ElasticCase((5, 9))
_EXPANDED = replace(_PLAIN, expand=True, alignment=4)
CASES = {
    "plain": replace(_PLAIN, num_biases=1),
    "plain, FP8, by columns": replace(_PLAIN, fp8=True, column_major=True, hidden=256, scale_layout="column"),
    "plain, no wait, async": replace(_PLAIN, waits=False, asynchronous=True, most=12),
    "plain, no weights": replace(_PLAIN, with_weights=False, alignment=8, pattern="holes"),
    "expanded": _EXPANDED,
    "expanded, zero padding, biases": replace(
        _EXPANDED, zero_padding=True, num_biases=2, alignment=8, pattern="holes"
    ),
    "expanded, FP8, by columns": replace(
        _EXPANDED, fp8=True, column_major=True, zero_padding=True, hidden=256, scale_layout="every other"
    ),
    "expanded, FP8, by rows, no wait": replace(_EXPANDED, fp8=True, waits=False, hidden=256),
    "expanded, no wait": replace(_EXPANDED, waits=False, most=16, zero_padding=True, pattern="duplicates"),
    "expanded, async": replace(_EXPANDED, asynchronous=True, num_biases=1, index_dtype=torch.int32),
    "expanded, no weights": replace(_EXPANDED, with_weights=False, local_experts=1, topk=1),
    "expanded, one sum": replace(_EXPANDED, single_reduction=True),
    "expanded, one sum, biases, async": replace(
        _EXPANDED, single_reduction=True, num_biases=2, asynchronous=True, waits=False, pattern="holes"
    ),
    "duplicates": replace(_EXPANDED, pattern="duplicates", topk=4),
    "one rank gets all": replace(_EXPANDED, pattern="one rank"),
    "nobody is chosen": replace(_EXPANDED, pattern="none", zero_padding=True),
    "no token on one rank": replace(_EXPANDED, tokens=(0, 6)),
    "no token at all": replace(_EXPANDED, tokens=(0, 0)),
    "no token at all, plain": replace(_PLAIN, tokens=(0, 0)),
    "no token at all, no wait, one sum": replace(
        _EXPANDED, tokens=(0, 0), waits=False, single_reduction=True, num_biases=1
    ),
}


def draw_indices(case: ElasticCase, rank: int, generator: torch.Generator) -> Tensor:
    """[T, K] distinct experts but for "duplicates"; patterns that routing code gets wrong."""
    shape = (case.tokens[rank], case.topk)
    scores = torch.rand(shape[0], case.num_experts, generator=generator)
    idx = scores.argsort(1)[:, : case.topk]
    if case.pattern == "holes":
        idx[torch.rand(shape, generator=generator) < 0.4] = -1
        idx[::3] = -1
    elif case.pattern == "duplicates":
        idx[:, 1:] = idx[:, :1]
        idx[::2, -1] = -1
    elif case.pattern == "one rank":
        idx = idx % case.local_experts + case.num_experts - case.local_experts
    elif case.pattern == "none":
        idx = torch.full_like(idx, -1)
    return idx.to(case.index_dtype).contiguous()


def draw(case: ElasticCase, seed: int) -> list[oracle.ElasticInput]:
    """The arguments of all ranks, on the CPU. bf16 rows are of any bits but those of NaN and infinity."""
    drawn = []
    for rank, tokens in enumerate(case.tokens):
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        idx = draw_indices(case, rank, generator)
        scales = None
        if case.fp8:
            raw = torch.randint(0, 256, (tokens, case.hidden), generator=generator, dtype=torch.uint8)
            x = raw.view(torch.float8_e4m3fn)
            scales = laid_out(torch.rand(tokens, case.hidden // 128, generator=generator), case.scale_layout)
        else:
            x = torch.randn(tokens, case.hidden, generator=generator).bfloat16()
        weights = torch.rand(idx.shape, generator=generator) if case.with_weights else None
        drawn.append(oracle.ElasticInput(x, idx, weights, scales))
    return drawn


def returned(case: ElasticCase, outputs: list[oracle.ElasticOutput], seed: int) -> list[Tensor]:
    """Rows to return, of all ranks, on the CPU; poison in the gaps."""
    made = []
    for rank, out in enumerate(outputs):
        generator = torch.Generator().manual_seed(77 * seed + rank)
        rows = torch.randn(len(out.is_real), case.hidden, generator=generator).bfloat16()
        rows[~out.is_real] = torch.nan
        made.append(rows)
    return made


def expect(case: ElasticCase, inputs: list[oracle.ElasticInput]) -> list[oracle.ElasticOutput]:
    """The rows that every rank receives."""
    return oracle.dispatch(
        inputs,
        case.num_experts,
        num_max_tokens=case.num_max_tokens,
        alignment=case.alignment,
        expand=case.expand,
    )


def moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """The same on a device, strides included."""
    if tensor is None or tensor.is_contiguous():
        return None if tensor is None else tensor.to(device)
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return out.copy_(tensor)


def waited(result: Any, case: ElasticCase) -> Any:
    """The same, once its event has passed."""
    assert (result[-1].event is not None) == case.asynchronous
    if case.asynchronous:
        result[-1].current_stream_wait()
    return result


def check_received(case: ElasticCase, got: Any, want: oracle.ElasticOutput) -> None:
    """Compares what a dispatch handed out with the oracle's; behind the real rows, what is promised."""
    x, scales = got.recv_x if case.fp8 else (got.recv_x, None)
    rows, real = len(want.is_real), want.is_real
    if case.waits:
        assert x.shape[0] == rows
    else:
        assert x.shape[0] >= rows
    compared = torch.ones_like(real) if case.zero_padding else real

    def check(found: Tensor | None, wanted: Tensor | None) -> None:
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            assert found.shape[0] == x.shape[0]
            assert same_bits(found[:rows].contiguous().cpu()[compared], wanted[compared])

    check(x, want.recv_x)
    check(scales, want.recv_scales)
    check(got.recv_topk_weights, want.recv_topk_weights)
    assert (got.recv_topk_idx is None) == case.expand
    if got.recv_topk_idx is not None:
        assert torch.equal(got.recv_topk_idx[:rows].cpu(), want.recv_topk_idx)
        assert (got.recv_topk_idx[rows:] == -1).all()
    if scales is not None:
        columns = (1, align_up(x.shape[0], 4))
        assert scales.stride() == (columns if case.column_major else (scales.shape[1], 1)) or len(x) == 0


def check_handle(case: ElasticCase, handle: Any, want: oracle.ElasticOutput, ranks: int) -> None:
    """Every field of a handle."""
    counts, tokens = want.expert_counts, want.rank_ends[-1]
    assert handle.do_expand == case.expand
    assert (handle.num_experts, handle.expert_alignment) == (case.num_experts, case.alignment)
    assert handle.num_max_tokens_per_rank == case.num_max_tokens
    assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == want.rank_ends
    assert handle.psum_num_recv_tokens_per_expert.tolist() == want.expert_ends
    assert handle.num_unaligned_recv_tokens_per_expert.tolist() == counts
    assert handle.psum_num_recv_tokens_per_scaleup_rank.dtype == torch.int32
    assert handle.psum_num_recv_tokens_per_expert.dtype == torch.int32
    metadata = handle.recv_src_metadata
    assert metadata.dtype == torch.int32
    assert torch.equal(metadata[:tokens].cpu(), want.metadata)
    assert (metadata[tokens:] == -1).all()
    assert metadata.shape[0] == handle.num_recv_tokens
    if case.waits:
        aligned = [align_up(count, case.alignment) for count in counts]
        assert handle.num_recv_tokens_per_expert_list == aligned
        assert (handle.num_recv_tokens, handle.num_expanded_tokens) == (tokens, want.num_rows)
    else:
        pairs = ranks * case.num_max_tokens * min(case.topk, case.local_experts)
        worst = align_up(pairs + (case.alignment - 1) * case.local_experts, case.alignment)
        assert handle.num_recv_tokens_per_expert_list == []
        assert handle.num_recv_tokens == ranks * case.num_max_tokens
        assert handle.num_expanded_tokens == worst


def round_trip(ctx: Any, case: ElasticCase, seed: int, buffer: Any, device: torch.device) -> None:
    """Dispatch, combine, cached dispatches of other rows and a combine again, of one rank; all checked."""
    ranks, rank = len(case.tokens), ctx.rank
    inputs = draw(case, seed)
    outputs = expect(case, inputs)
    want, own = outputs[rank], inputs[rank]

    def rows_of(given: oracle.ElasticInput) -> Any:
        x, scales = moved(given.x, device), moved(given.scales, device)
        return x if scales is None else (x, scales)

    loads = torch.full((case.local_experts,), 7, dtype=torch.int32, device=device)
    how = {
        "num_max_tokens_per_rank": case.num_max_tokens,
        "async_with_compute_stream": case.asynchronous,
        "do_expand": case.expand,
        "do_zero_padding": case.zero_padding,
        "use_tma_aligned_col_major_sf": case.column_major,
        "num_sms": case.num_sms,
    }
    got = buffer.dispatch(
        rows_of(own),
        topk_idx=own.topk_idx.to(device),
        topk_weights=moved(own.topk_weights, device),
        cumulative_local_expert_recv_stats=loads,
        num_experts=case.num_experts,
        expert_alignment=case.alignment,
        do_cpu_sync=case.waits,
        **how,
    )
    waited(got, case)
    check_received(case, got, want)
    check_handle(case, got.handle, want, ranks)
    assert loads.tolist() == [7 + count for count in want.expert_counts]
    check_combine(ctx, case, seed, buffer, device, inputs, outputs, got)

    others = draw(case, seed + 1)
    again_inputs = [replace(new, topk_idx=old.topk_idx) for new, old in zip(others, inputs, strict=True)]
    again_want = expect(case, again_inputs)[rank]
    again = buffer.dispatch(
        rows_of(others[rank]),
        topk_weights=moved(others[rank].topk_weights, device),
        handle=got.handle,
        **how,
    )
    waited(again, case)
    assert again.handle is got.handle
    check_received(case, again, again_want)
    bare = buffer.dispatch(rows_of(others[rank]), handle=got.handle, **how)
    waited(bare, case)
    assert bare.recv_topk_weights is None
    check_received(replace(case, with_weights=False), bare, replace(again_want, recv_topk_weights=None))
    check_combine(ctx, case, seed + 5, buffer, device, inputs, outputs, got)


def check_combine(
    ctx: Any,
    case: ElasticCase,
    seed: int,
    buffer: Any,
    device: torch.device,
    inputs: list[oracle.ElasticInput],
    outputs: list[oracle.ElasticOutput],
    got: Any,
) -> None:
    """A combine of drawn rows along a dispatch's handle."""
    rank = ctx.rank
    rows = returned(case, outputs, seed)
    weights = [
        torch.rand(out.shape, generator=torch.Generator().manual_seed(seed)) for out in _lanes(case, outputs)
    ]
    biases = [
        [
            torch.randn(tokens, case.hidden, generator=torch.Generator().manual_seed(seed + r)).bfloat16()
            for _ in range(case.num_biases)
        ]
        for r, tokens in enumerate(case.tokens)
    ]
    want = oracle.combine(
        rows,
        inputs,
        case.num_experts,
        alignment=case.alignment,
        expanded=case.expand,
        single_reduction=case.single_reduction,
        topk_weights=weights,
        biases=biases,
        ranks_per_domain=case.ranks_per_domain or None,
    )[rank]

    def filled(values: Tensor, size: int) -> Tensor:
        whole = torch.full((size, *values.shape[1:]), torch.nan, dtype=values.dtype)
        whole[: len(values)] = values
        return whole.to(device)

    size = len(got.recv_x[0] if case.fp8 else got.recv_x)
    own = tuple(bias.to(device) for bias in biases[rank])
    out, out_weights, event = buffer.combine(
        filled(rows[rank], size),
        got.handle,
        topk_weights=filled(weights[rank], size),
        bias=None if not own else own[0] if len(own) == 1 else own,
        async_with_compute_stream=case.asynchronous,
    )
    waited((event,), case)
    assert same_bits(out, want.x)
    assert same_bits(out_weights, want.topk_weights)


def _lanes(case: ElasticCase, outputs: list[oracle.ElasticOutput]) -> list[Tensor]:
    """Tensors of the weights' shapes."""
    return [
        torch.empty(len(out.is_real)) if case.expand else torch.empty(len(out.metadata), case.topk)
        for out in outputs
    ]
