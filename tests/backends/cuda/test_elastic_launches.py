"""ElasticBuffer's calls on the CUDA engine, on stubs: which kernels each launches, in which order. No GPU."""

from __future__ import annotations

from harness.on_stubs import on_stubs

START = """
import torch
from harness import stub_cuda
stub_cuda.install(8)
import deepep
from deepep import EventHandle
x, idx = torch.zeros((8, 256), dtype=torch.bfloat16), torch.zeros((8, 2), dtype=torch.int64)
weights = torch.ones((8, 2))
sizes = {"num_max_tokens_per_rank": 8, "hidden": 256}
launches = []
stub_cuda.Domain.launched = staticmethod(launches.append)

def launched(call):
    launches.clear()
    result = call()
    return result, list(launches)

def both_ways(call):
    # at once, and on the communication stream behind an event
    result, names = launched(call)
    for how in (
        {"async_with_compute_stream": True},
        {"previous_event": EventHandle(), "async_with_compute_stream": True, "allocate_on_comm_stream": True},
        {"previous_event_before_epilogue": EventHandle()},
        {"previous_event_before_epilogue": EventHandle(), "async_with_compute_stream": True},
    ):
        later, again = launched(lambda: call(**how))
        assert again == names, (again, names, how)
        assert (later.event.event is None) == ("async_with_compute_stream" not in how)
    return result, names
"""


def test_plain_rows_take_the_kernels_of_buffer() -> None:
    on_stubs(
        START,
        """
        with stub_cuda.stub_buffer(elastic=True, **sizes) as buffer:
            def dispatch(**how):
                return buffer.dispatch(x, idx, weights, num_experts=1, **how)
            got, names = both_ways(dispatch)
            assert names == ["dispatch"]
            assert both_ways(lambda **how: dispatch(do_cpu_sync=False, **how))[1] == names
            def again(**how):
                return buffer.dispatch(x, handle=got.handle, **how)
            assert both_ways(again)[1] == ["dispatch_cached"]
            weighted = lambda **how: buffer.dispatch(x, topk_weights=weights, handle=got.handle, **how)
            assert both_ways(weighted)[1] == ["dispatch"]
            assert both_ways(lambda **how: buffer.combine(got.recv_x, got.handle, **how))[1] == ["combine"]
            assert launched(buffer.barrier)[1] == ["barrier"]
            assert launched(lambda: buffer.barrier(with_cpu_sync=True))[1] == ["barrier"]
        """,
    )


def test_expanded_rows_take_two_more_and_none_on_their_way_back() -> None:
    on_stubs(
        START,
        """
        with stub_cuda.stub_buffer(elastic=True, **sizes) as buffer:
            def dispatch(**how):
                options = {"do_expand": True, "expert_alignment": 4, "do_zero_padding": True, **how}
                return buffer.dispatch(x, idx, weights, num_experts=1, **options)
            got, names = both_ways(dispatch)
            assert names == ["dispatch", "sort_pairs", "spread_rows"]
            got, without = both_ways(lambda **how: dispatch(do_cpu_sync=False, **how))
            assert without == names
            assert got.recv_x.shape[0] == 12
            def again(**how):
                return buffer.dispatch(x, handle=got.handle, do_expand=True, **how)
            assert both_ways(again)[1] == ["dispatch_cached", "spread_rows"]
            def combine(**how):
                return buffer.combine(got.recv_x, got.handle, topk_weights=got.recv_topk_weights, **how)
            assert both_ways(combine)[1] == ["combine"]
        """,
    )


def test_with_many_sms_the_dispatch_spreads_rows_itself() -> None:
    on_stubs(
        START,
        """
        with stub_cuda.stub_buffer(elastic=True, **sizes) as buffer:
            def dispatch(**how):
                options = {"do_expand": True, "expert_alignment": 4, "do_zero_padding": True, **how}
                return buffer.dispatch(x, idx, weights, num_experts=1, num_sms=64, **options)
            got, names = launched(dispatch)
            assert names == ["dispatch"]
            assert got.recv_x.shape[0] == 8 and got.recv_topk_weights.shape == (8,)
            later, names = launched(lambda: dispatch(async_with_compute_stream=True, do_cpu_sync=False))
            assert names == ["dispatch"] and later.event.event is not None
            assert later.recv_x.shape[0] == 12 and later.handle.overflow_flag is not None
            loads = torch.zeros(1, dtype=torch.int32)
            assert launched(lambda: dispatch(cumulative_local_expert_recv_stats=loads))[1] == ["dispatch"]
            # an event that the epilogue comes behind: in a pass behind it
            behind = launched(lambda: dispatch(previous_event_before_epilogue=EventHandle()))[1]
            assert behind == ["dispatch", "sort_pairs", "spread_rows"]
            def again(handle=got.handle, **how):
                return launched(lambda: buffer.dispatch(x, handle=handle, do_expand=True, **how))
            assert again()[1] == ["dispatch_cached", "spread_rows"]
        """,
    )


def test_with_many_sms_a_dispatch_along_a_handle_spreads_rows_itself() -> None:
    on_stubs(
        START,
        """
        with stub_cuda.stub_buffer(elastic=True, **sizes) as buffer:
            first = {"do_expand": True, "expert_alignment": 4, "num_experts": 1, "num_sms": 64}
            for waits, rows in ((True, 8), (False, 12)):
                got = buffer.dispatch(x, idx, weights, do_cpu_sync=waits, **first)
                before = vars(got.handle.elastic_route).copy()
                def again(given=x, **how):
                    how = {"do_expand": True, "num_sms": 64, **how}
                    return launched(lambda: buffer.dispatch(given, handle=got.handle, **how))
                bare, names = again()
                assert names == ["dispatch"]
                assert bare.recv_x.shape == (rows, 256)
                assert bare.recv_topk_weights is bare.recv_topk_idx is None
                weighted, names = again(topk_weights=weights, async_with_compute_stream=True)
                assert names == ["dispatch"] and weighted.event.event is not None
                assert weighted.recv_topk_weights.shape == (rows,)
                scaled = x.to(torch.float8_e4m3fn), torch.zeros((8, 2))
                columns, names = again(scaled, use_tma_aligned_col_major_sf=True, do_zero_padding=True)
                assert names == ["dispatch"]
                assert columns.recv_x[1].shape == (rows, 2) and columns.recv_x[1].stride() == (1, rows)
                behind = again(previous_event_before_epilogue=EventHandle())[1]
                assert behind == ["dispatch", "spread_rows"]
                assert again(num_sms=24)[1] == ["dispatch_cached", "spread_rows"]
                now = vars(got.handle.elastic_route)
                assert before.keys() <= now.keys() and all(now[key] is before[key] for key in before)
        """,
    )


def test_a_handle_of_before_a_rank_was_masked_is_refused_with_weights_too() -> None:
    """A dispatch of new weights is a new one to the engine, whose rows are read as the handle has them."""
    on_stubs(
        START,
        """
        with stub_cuda.stub_buffer(elastic=True, **sizes) as buffer:
            got = buffer.dispatch(x, idx, weights, num_experts=1)
            got.handle.elastic_route.route.plan.live = 3
            for how in ({}, {"topk_weights": weights}):
                try:
                    buffer.dispatch(x, handle=got.handle, **how)
                except deepep.HandleError as error:
                    assert "masked" in str(error)
                else:
                    raise AssertionError(how)
        """,
    )


def test_what_a_timed_out_dispatch_leaves_is_no_address() -> None:
    """Kernels that gave up have left indices of any value: an index out of bounds would end the process."""
    on_stubs(
        START,
        """
        torch.use_deterministic_algorithms(True)  # what is not initialised has the largest value there is
        assert torch.empty(4, dtype=torch.int64).min() > 1 << 60
        for many in (True, False):
            with stub_cuda.stub_buffer(elastic=True, allow_multiple_reduction=many, **sizes) as buffer:
                how = {"do_expand": True, "do_cpu_sync": False, "expert_alignment": 4, "num_experts": 2}
                got = buffer.dispatch(x, idx, weights, do_zero_padding=True, **how)
                buffer.combine(got.recv_x, got.handle, topk_weights=got.recv_topk_weights)
        """,
    )


def test_one_sum_dispatches_the_rows_back() -> None:
    on_stubs(
        START,
        """
        with stub_cuda.stub_buffer(elastic=True, allow_multiple_reduction=False, **sizes) as buffer:
            got = buffer.dispatch(x, idx, weights, num_experts=1, do_expand=True, do_cpu_sync=False)
            def combine(**how):
                return buffer.combine(got.recv_x, got.handle, topk_weights=got.recv_topk_weights, **how)
            assert both_ways(combine)[1] == ["dispatch", "reduce_rows"]
            ones = torch.ones_like(x).requires_grad_()
            assert not buffer.combine(got.recv_x, got.handle, bias=ones).combined_x.requires_grad
        """,
    )


def test_rows_that_kernels_do_not_take_are_summed_by_torch() -> None:
    """Rows at odd addresses: the kernel reads 16 bytes at a time."""
    on_stubs(
        START,
        """
        with stub_cuda.stub_buffer(elastic=True, **sizes) as buffer:
            got = buffer.dispatch(x, idx, weights, num_experts=1, do_expand=True, do_cpu_sync=False)
            odd = torch.zeros(got.recv_x.numel() + 1, dtype=torch.bfloat16)[1:].view_as(got.recv_x)
            assert odd.data_ptr() % 16
            assert launched(lambda: buffer.combine(odd, got.handle))[1] == ["combine"]
        """,
    )


def test_calls_at_once_come_behind_the_dispatch_on_the_communication_stream() -> None:
    """They read, on the current stream, where rows stand, which an asynchronous dispatch has written."""
    on_stubs(
        START,
        """
        waits = []
        stub_cuda.Stream.wait_event = lambda self, event: waits.append(event)
        for many in (True, False):
            with stub_cuda.stub_buffer(elastic=True, allow_multiple_reduction=many, **sizes) as buffer:
                how = {"do_expand": True, "do_cpu_sync": False}
                got = buffer.dispatch(x, idx, num_experts=1, async_with_compute_stream=True, **how)
                end = got.event.event.completion.event
                for call in (
                    lambda: buffer.dispatch(x, handle=got.handle, do_expand=True),
                    lambda: buffer.combine(got.recv_x, got.handle),
                ):
                    waits.clear()
                    call()
                    assert end in waits
        """,
    )
