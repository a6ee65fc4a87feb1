"""Low latency of the CUDA engine around its launches, on stubs: no GPU is needed. A process a test."""

from __future__ import annotations

import pytest
from harness.on_stubs import on_stubs

START = """
import pytest, torch
from harness import stub_cuda
stub_cuda.install(8)
import deepep
from deepep.backends.cuda.launch import Phase
x, idx = torch.zeros((8, 256), dtype=torch.bfloat16), torch.zeros((8, 2), dtype=torch.int64)
weights = torch.ones((8, 2))

launches, pending = [], []
stub_cuda.Domain.launched = staticmethod(launches.append)
stub_cuda.LowLatencyDomain.has_fault = lambda self: bool(pending)
stub_cuda.LowLatencyDomain.take_fault = lambda self, stream: pending.pop() if pending else None

def since():
    made = list(launches)
    launches.clear()
    return made

def fault(phase):
    pending.append(stub_cuda.Fault(operation=4, phase=phase, missing=1, expected=1, seen=0))

def buffer_of(**how):
    return stub_cuda.stub_buffer(reduction="expert_rank", **how)

def dispatch(buffer, most=8, experts=4, **how):
    return buffer.low_latency_dispatch(x, idx, most, experts, use_fp8=False, **how)

def memory(buffer):
    return buffer.info.memory["low-latency memory"]

agreements = []
def watch(buffer):
    control = buffer.runtime._control
    perform = control.perform
    def performing(operation, *args, **named):
        agreements.append(operation.label)
        return perform(operation, *args, **named)
    control.perform = performing
"""


def test_ranks_agree_once_and_then_launch() -> None:
    """Nothing of the host is in a call whose sizes and formats were seen; memory grows with them alone."""
    on_stubs(
        START,
        """
        with buffer_of() as buffer:
            watch(buffer)
            assert memory(buffer) == 0
            rows, _, handle, _, _ = dispatch(buffer)
            assert since() == ["low_latency_dispatch"]
            assert agreements == ["low_latency_dispatch"]
            first = memory(buffer)
            assert first > 0 and buffer.info.memory["symmetric memory"] == 0
            for _ in range(2):
                dispatch(buffer, num_sms=3)
                buffer.low_latency_combine(rows, idx, weights, handle)
                buffer.low_latency_combine(rows, idx, weights, tuple(handle))
            assert since() == ["low_latency_dispatch", "low_latency_combine", "low_latency_combine"] * 2
            assert len(agreements) == 1
            dispatch(buffer, most=32)  # agreed on, after all have said that they do not launch
            assert since() == ["low_latency_dispatch elsewhere", "low_latency_dispatch"]
            assert len(agreements) == 2 and memory(buffer) == 4 * first
            dispatch(buffer, topk_weights=weights)
            dispatch(buffer)
            assert len(agreements) == 3 and memory(buffer) == 4 * first
            buffer.low_latency_combine(rows, idx, weights, handle)  # a handle is not bound to memory
        """,
    )


def test_hooks_are_launches_of_halves() -> None:
    on_stubs(
        START,
        """
        with buffer_of() as buffer:
            rows, _, handle, _, hook = dispatch(buffer, return_recv_hook=True)
            assert since() == ["low_latency_dispatch send"]
            hook()
            hook()
            assert since() == ["low_latency_dispatch receive"]
            _, _, hook = buffer.low_latency_combine(rows, idx, weights, handle, return_recv_hook=True)
            assert since() == ["low_latency_combine send"]
            for call in (
                lambda: dispatch(buffer),
                lambda: buffer.low_latency_combine(rows, idx, weights, handle),
            ):
                with pytest.raises(deepep.HookPendingError, match="low_latency_combine"):
                    call()
                # What was sent is received, so that the words of the refusal are not taken for its.
                assert since()[0] == "low_latency_combine receive"
                hook()
                assert since() == []
                _, _, hook = buffer.low_latency_combine(rows, idx, weights, handle, return_recv_hook=True)
                since()
            with pytest.raises(deepep.HookPendingError):
                buffer.clean_low_latency_buffer(8, 256, 4)
            hook()
            assert since() == ["low_latency_combine receive"]
            buffer.clean_low_latency_buffer(8, 256, 4)
        """,
    )


def test_a_refusal_is_posted_and_raised() -> None:
    on_stubs(
        START,
        """
        with buffer_of() as buffer:
            with pytest.raises(deepep.CapacityError):  # no memory yet: over the control plane
                dispatch(buffer, most=4)
            assert since() == [] and memory(buffer) == 0
            rows, _, handle, _, _ = dispatch(buffer)
            since()
            with pytest.raises(deepep.CapacityError):
                dispatch(buffer, most=4)
            assert since() == ["low_latency_dispatch refused"]
            with pytest.raises(deepep.ArgumentError, match="one of the two"):
                dispatch(buffer, async_finish=True, return_recv_hook=True)
            assert since() == ["low_latency_dispatch refused"]
            copies = (handle[0].clone(), *handle[1:])
            for change in (
                {"x": rows[:, 1:]},
                {"topk_idx": idx[:4], "topk_weights": weights[:4]},
                {"topk_weights": weights.double()},
                {"handle": copies},
                {"out": torch.zeros((8, 257), dtype=torch.bfloat16)[:, 1:]},
            ):
                given = dict(x=rows, topk_idx=idx, topk_weights=weights, handle=handle)
                with pytest.raises(deepep.ArgumentError):
                    buffer.low_latency_combine(**{**given, **change})
                assert since() == ["low_latency_combine refused"], change
        """,
    )


def test_what_kernels_report_is_raised_by_the_next_call() -> None:
    """A disagreement once, by a call that is made nonetheless; a missing peer until it is masked."""
    on_stubs(
        START,
        """
        with buffer_of(enable_shrink=True) as buffer:
            rows, _, handle, _, _ = dispatch(buffer)
            since()
            fault(Phase.DISAGREEMENT)
            with pytest.raises(deepep.MismatchError):
                buffer.low_latency_combine(rows, idx, weights, handle, return_recv_hook=True)
            assert since() == ["low_latency_combine send", "low_latency_combine receive"]
            dispatch(buffer)
            *_, hook = dispatch(buffer, return_recv_hook=True)
            fault(Phase.DISAGREEMENT)
            with pytest.raises(deepep.MismatchError):
                hook()
            since()
            fault(Phase.ROWS)
            for _ in range(2):
                with pytest.raises(deepep.PeerTimeoutError):
                    dispatch(buffer)
                with pytest.raises(deepep.PeerTimeoutError):
                    dispatch(buffer, most=4)  # whatever else is wrong with it
            assert since() == []
            built = buffer.runtime._low_latency.state.memory
            buffer.low_latency_clean_mask_buffer()
            buffer.low_latency_combine(rows, idx, weights, handle)
            assert since() == ["low_latency_combine"]
            assert buffer.runtime._low_latency.state.memory is not built
        """,
    )


def test_what_kernels_do_not_do_is_announced_and_goes_by_the_fallback() -> None:
    on_stubs(
        START,
        """
        from deepep.backends.reference.low_latency import LowLatencyOperations
        from deepep.runtime.requests import LowLatencyCombined, LowLatencyDispatched, LowLatencyRoute

        def dispatch_by_nccl(self, request, schedule):
            launches.append("fallback")
            route = LowLatencyRoute(idx, idx, 1 << 16, 256, 4, self._engine)
            return LowLatencyDispatched(x, None, idx, route)

        def combine_by_nccl(self, request, schedule):
            launches.append("fallback")
            return LowLatencyCombined(x)

        LowLatencyOperations.dispatch, LowLatencyOperations.combine = dispatch_by_nccl, combine_by_nccl
        with buffer_of() as buffer:
            assert buffer.info.operations["low-latency dispatch"] == "CUDA kernels"
            rows, _, handle, _, _ = dispatch(buffer)
            since()
            staged = buffer.get_next_low_latency_combine_buffer(handle)
            buffer.low_latency_combine(rows, idx, weights, handle, zero_copy=True)
            assert since() == ["low_latency_combine"]
            with pytest.raises(deepep.ArgumentError, match="no buffer filled"):
                buffer.low_latency_combine(rows, idx, weights, handle, zero_copy=True)
            since()
            dispatch(buffer, most=1 << 16)
            assert since() == ["low_latency_dispatch elsewhere", "fallback"]
        """,
    )


@pytest.mark.parametrize("reduction", ["expert_rank", "exact"])
def test_logfmt_is_a_combine_of_its_own_of_whole_groups(reduction: str) -> None:
    on_stubs(
        START,
        f"""
        with stub_cuda.stub_buffer(reduction="{reduction}") as buffer:
            rows, _, handle, _, _ = dispatch(buffer)
            since()
            def combine(given=rows, along=handle, **how):
                return buffer.low_latency_combine(given, idx, weights, along, use_logfmt=True, **how)
            combine()
            assert since() == ["low_latency_combine in LogFMT"]
            combine(return_recv_hook=True)[2]()
            assert since() == ["low_latency_combine in LogFMT send", "low_latency_combine in LogFMT receive"]
            odd = x[:, :136].contiguous()
            rows, _, handle, _, _ = buffer.low_latency_dispatch(odd, idx, 8, 4, use_fp8=False)
            since()
            with pytest.raises(deepep.ArgumentError, match="use_logfmt"):
                combine(rows, handle)
            assert since() == ["low_latency_combine refused"]
        """,
    )


def test_the_exact_mode_has_kernels_and_memory_of_its_own() -> None:
    """Room for a row of each top-k entry; of each source, where ranks can be left out."""
    on_stubs(
        START,
        """
        sizes = []
        for how in ({"reduction": "expert_rank"}, {"reduction": "exact"}, {"reduction": "expert_rank"}):
            with stub_cuda.stub_buffer(**how) as buffer:
                assert memory(buffer) == 0
                rows, _, handle, _, _ = dispatch(buffer)
                sizes.append(memory(buffer))
                buffer.low_latency_combine(rows, idx, weights, handle)
                buffer.get_next_low_latency_combine_buffer(handle)
                _, _, hook = buffer.low_latency_combine(
                    rows, idx, weights, handle, zero_copy=True, return_recv_hook=True
                )
                hook()
                assert since() == [
                    "low_latency_dispatch",
                    "low_latency_combine",
                    "low_latency_combine send",
                    "low_latency_combine receive",
                ]
        assert sizes[0] == sizes[2] and sizes[1] == 3 * sizes[0]  # of the stub; K is 2
        """,
    )


def test_a_capture_does_not_begin_with_an_agreement() -> None:
    on_stubs(
        START,
        """
        with buffer_of() as buffer:
            for most in (8, 16):
                torch.cuda.is_current_stream_capturing = lambda: True
                with pytest.raises(deepep.ArgumentError, match="outside of a graph"):
                    dispatch(buffer, most=most)
                torch.cuda.is_current_stream_capturing = lambda: False
                dispatch(buffer, most=most)
                torch.cuda.is_current_stream_capturing = lambda: True
                dispatch(buffer, most=most)
            since()
            with pytest.raises(deepep.CapacityError):
                dispatch(buffer, most=4)
            assert since() == []  # a graph would post it again and again
            torch.cuda.is_current_stream_capturing = lambda: False
        """,
    )


def test_arrays_of_a_dispatch_lie_apart() -> None:
    on_stubs(
        START,
        """
        from deepep.backends.cuda.low_latency_launch import LowLatencyFormat

        cpu = torch.device("cpu")
        for how in ({}, {"use_fp8": True}, {"use_fp8": True, "round_scale": True, "use_ue8m0": True}):
            form = LowLatencyFormat(3, 5, 7, 2, 1024, torch.int64, **how)
            (out, plan), (other, _) = (form.outputs(4, cpu, 0) for _ in range(2))
            rows = 3 * 7
            dtype = torch.float8_e4m3fn if how else torch.bfloat16
            assert out.x.shape == (5, rows, 1024) and out.x.dtype == dtype and out.x.is_contiguous()
            assert out.count.shape == (5,) and out.count.dtype == torch.int32
            assert out.source.shape == (5, rows) and out.source.dtype == torch.int32
            assert out.ranges.shape == (5, 3) and out.ranges.dtype == torch.int64
            if how:
                columns = 1024 // (512 if "use_ue8m0" in how else 128)
                assert out.scales.shape == (5, rows, columns)
                assert out.scales.stride() == (columns * rows, 1, rows)  # column-major
            # Nothing lies in anything else: parts of one array side by side, behind the handle's own.
            assert out.ranges.untyped_storage().data_ptr() == out.ranges.data_ptr()
            begins = [plan.sent, plan.came, plan.routes]
            ends = [plan.identity + 8, plan.sent + 4 * 7, plan.came + 4 * 3]
            parts = [out.count, out.source]
            begins += [part.data_ptr() for part in parts]
            ends += [plan.routes + 4 * rows * 2 * 2, *(p.data_ptr() + p.nbytes for p in parts[:-1])]
            assert all(end <= begin for end, begin in zip(ends, begins, strict=True))
            assert all(begin % 16 == 0 for begin in begins)
            assert parts[-1].data_ptr() + parts[-1].nbytes <= plan.identity + plan.table.nbytes
            assert other.count.data_ptr() != out.count.data_ptr()
        """,
    )


def test_a_query_tells_what_kernels_have_masked() -> None:
    """From the device's own word; and it is no mask of the control plane's yet."""
    on_stubs(
        START,
        """
        with buffer_of(enable_shrink=True) as buffer:
            status = torch.full((1,), 7, dtype=torch.int32)
            buffer.low_latency_query_mask_buffer(status)
            assert status.tolist() == [0]
            dispatch(buffer)
            stub_cuda.LowLatencyDomain.masked_ranks = 1
            buffer.low_latency_query_mask_buffer(status)
            assert status.tolist() == [1]
            assert buffer.info.masked_ranks == (0,)
            assert buffer.runtime._control.masked == frozenset()
            stub_cuda.LowLatencyDomain.masked_ranks = 0
            buffer.runtime._low_latency.state.memory.endpoint.masked_word().fill_(1)
            buffer.low_latency_query_mask_buffer(status)  # what the host has not seen yet
            assert status.tolist() == [1]
        """,
    )


def test_hosts_that_agree_go_on_without_ranks_that_do_not_come() -> None:
    """They mask them; on a rank that is missing itself the error is raised."""
    on_stubs(
        START,
        """
        from deepep.errors import FaultRecord, PeerTimeoutError

        def meeting(state, missing):
            errors = [PeerTimeoutError(FaultRecord("low_latency_dispatch", "counts", 0, missing, 3, 1, 0.1))]
            meet = type(state)._meet
            def once(operation, statement):
                if errors:
                    raise errors.pop()
                return meet(state, operation, statement)
            state._meet = once

        with buffer_of(enable_shrink=True) as buffer:
            masked, engine = [], buffer.runtime
            engine.mask = lambda rank, leave_out: masked.append((rank, leave_out))
            meeting(engine._low_latency.state, (2, 3))
            dispatch(buffer)
            assert masked == [(2, True), (3, True)]
            assert since() == ["low_latency_dispatch"]
            meeting(engine._low_latency.state, (0,))
            with pytest.raises(deepep.PeerTimeoutError):
                dispatch(buffer, most=32)
            assert len(masked) == 2
        """,
    )


def test_memory_begins_anew_when_members_change() -> None:
    """A rank that was left out has not the memory that others have agreed on meanwhile."""
    on_stubs(
        START,
        """
        with buffer_of(enable_shrink=True) as buffer:
            dispatch(buffer)
            first = memory(buffer)
            dispatch(buffer, most=32)
            assert memory(buffer) == 4 * first
            buffer.low_latency_clean_mask_buffer()
            dispatch(buffer)
            assert memory(buffer) == first
            dispatch(buffer, most=32)
            assert memory(buffer) == 4 * first
        """,
    )


def test_without_masks_a_rank_that_does_not_come_to_agree_is_an_error() -> None:
    on_stubs(
        START,
        """
        from deepep.errors import FaultRecord, PeerTimeoutError

        with buffer_of() as buffer:
            def meet(operation, statement):
                raise PeerTimeoutError(FaultRecord("low_latency_dispatch", "counts", 0, (2,), 3, 2, 0.1))
            buffer.runtime._low_latency.state._meet = meet
            with pytest.raises(deepep.PeerTimeoutError):
                dispatch(buffer)
            assert since() == []
        """,
    )


def test_kernels_add_to_the_buffers_own_sums_while_waits_are_measured() -> None:
    """Launches that add 5 ns for rank 0 where they are told to. The caller's own statistics come first."""
    on_stubs(
        START,
        """
        import ctypes
        told = []
        def launch(self, *args, **named):
            told.append(named["waits"])
            if told[-1]:
                ctypes.c_int64.from_address(told[-1]).value += 5
        stub_cuda.LowLatencyDomain.dispatch = stub_cuda.LowLatencyDomain.combine = launch
        def trips(buffer, **how):
            rows, _, handle, _, _ = dispatch(buffer, **how)
            buffer.low_latency_combine(rows, idx, weights, handle)
        with buffer_of() as buffer:
            trips(buffer)
            assert told == [0, 0] and buffer.wait_statistics().nanoseconds == {}
            buffer.measure_waits()
            trips(buffer)
            trips(buffer, dispatch_wait_recv_cost_stats=(own := torch.zeros(1, dtype=torch.int64)))
            _, _, handle, _, hook = dispatch(buffer, return_recv_hook=True)
            hook()  # of the two launches the stub takes both for ones that wait
            assert own.tolist() == [5] and told[4] == own.data_ptr()
            sums = {name: waited.tolist() for (name, phase), waited in
                    buffer.wait_statistics(clear=True).nanoseconds.items() if phase == "kernels"}
            assert sums["low_latency_combine"] == [10], sums
            assert sums["low_latency_dispatch"][0] in (10, 15), sums
            buffer.measure_waits(False)
            told.clear()
            trips(buffer)
            assert told == [0, 0]
            assert not any(w.any() for w in buffer.wait_statistics().nanoseconds.values())
        """,
    )


def test_quick_checks_refuse_what_full_ones_do() -> None:
    """A call of a known format with one tensor that is wrong: whatever the quick checks look at."""
    on_stubs(
        START,
        """
        def spoiled(t):
            yield "negated", torch._neg_view(t.clone())
            yield "strided", torch.zeros((t.shape[0], 2 * t.shape[1]), dtype=t.dtype)[:, ::2]
            yield "transposed", torch.zeros(t.shape[::-1], dtype=t.dtype).T
            yield "of another dtype", t.double()
            yield "of another rank", t[None]
            yield "of a row more", torch.cat([t, t[:1]])
            yield "a subclass", torch.Tensor._make_wrapper_subclass(Wrapped, t.shape, dtype=t.dtype)
            yield "a list", t.tolist()

        class Wrapped(torch.Tensor):
            @classmethod
            def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
                return function(*args, **(kwargs or {}))

        with buffer_of() as buffer:
            def low_latency(x=x, topk_idx=idx, topk_weights=weights):
                how = dict(use_fp8=False, topk_weights=topk_weights)
                return buffer.low_latency_dispatch(x, topk_idx, 8, 4, **how)

            def back(topk_idx=idx, topk_weights=weights):
                return buffer.low_latency_combine(slots, topk_idx, topk_weights, handle)

            def combine(x=x, topk_weights=weights):
                return buffer.combine(x, route, topk_weights)

            def fresh(x=x, topk_idx=idx, topk_weights=weights):
                how = dict(num_experts=4, num_worst_tokens=8)
                return buffer.dispatch(x, topk_idx=topk_idx, topk_weights=topk_weights, **how)

            for _ in range(4):
                slots, _, handle, _, _ = low_latency()
                back()
                *_, route, _ = fresh()
                combine()
            since()
            good = {"x": x, "topk_idx": idx, "topk_weights": weights}
            back_by, sum_by = ("topk_idx", "topk_weights"), ("x", "topk_weights")
            for call, names in ((low_latency, good), (fresh, good), (back, back_by), (combine, sum_by)):
                for name in names:
                    for how, wrong in spoiled(good[name]):
                        if call is fresh and name == "x" and how == "of another dtype":
                            continue  # which travels as well
                        with pytest.raises((deepep.errors.ArgumentError,)):
                            call(**{name: wrong})
                            raise AssertionError(f"{call.__name__}: {name} {how} was taken")
                        call()  # and a good one passes
        """,
    )
