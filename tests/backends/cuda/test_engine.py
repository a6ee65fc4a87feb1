"""The CUDA engine around its launches, on stubs: no GPU is needed. Each test is a process of its own."""

from __future__ import annotations

from harness.on_stubs import on_stubs

START = """
import pytest, torch
from harness import stub_cuda
stub_cuda.install(8)
import deepep
x, idx = torch.zeros((8, 256), dtype=torch.bfloat16), torch.zeros((8, 1), dtype=torch.int64)
weights = torch.ones((8, 1))

def dispatch(buffer, **how):
    layout = buffer.get_dispatch_layout(idx, 2)
    return buffer.dispatch(
        x, num_tokens_per_rank=layout[0], is_token_in_rank=layout[3], num_tokens_per_expert=layout[2],
        topk_idx=idx, topk_weights=weights, **how
    )

def made(buffer):
    return buffer.runtime.memory()["symmetric memory"]

launches = []
stub_cuda.Domain.launched = staticmethod(launches.append)
"""


def test_memory_is_made_by_the_first_dispatch() -> None:
    on_stubs(
        START,
        """
        with stub_cuda.stub_buffer() as buffer:
            dispatch_layout = buffer.get_dispatch_layout(idx, 2)
            buffer.clean_low_latency_buffer(8, 256, 2)
            buffer.low_latency_dispatch(x, idx, 8, 2, use_fp8=False)
            assert made(buffer) == 0
            with pytest.raises(deepep.ShapeError):  # and by one that is refused: the others make it, too
                buffer.get_dispatch_layout(idx.view(-1), 2)
            assert made(buffer) == 64 << 20
            assert launches == ["layout", "low_latency_dispatch", "refuse dispatch"]
        with stub_cuda.stub_buffer() as buffer:
            dispatch(buffer)
            assert made(buffer) == 64 << 20
            symmetric = buffer.runtime.symmetric
            dispatch(buffer)
            assert buffer.runtime.symmetric is symmetric
        with stub_cuda.stub_buffer() as buffer:
            pass  # never made, and left without it
        """,
    )


def test_a_capture_does_not_begin_with_making_memory() -> None:
    on_stubs(
        START,
        """
        with stub_cuda.stub_buffer() as buffer:
            torch.cuda.is_current_stream_capturing = lambda: True
            with pytest.raises(deepep.ArgumentError, match="after one outside of a graph"):
                dispatch(buffer, num_worst_tokens=16)
            assert made(buffer) == 0
            torch.cuda.is_current_stream_capturing = lambda: False
            dispatch(buffer)
        """,
    )


def test_masks_have_memory_made_anew() -> None:
    on_stubs(
        START,
        """
        with stub_cuda.stub_buffer(enable_shrink=True) as buffer:
            *_, handle, _ = dispatch(buffer)
            buffer.dispatch(x, handle=handle)
            prepared, symmetric = handle.route.cached, buffer.runtime.symmetric
            assert prepared.launch(x, None, deepep.Buffer.num_sms) is not None
            buffer.low_latency_clean_mask_buffer()
            assert prepared.launch(x, None, deepep.Buffer.num_sms) is None
            buffer.dispatch(x, handle=handle)
            assert buffer.runtime.symmetric is not symmetric
            assert prepared.launch(x, None, deepep.Buffer.num_sms) is None
            assert handle.route.cached.launch(x, None, deepep.Buffer.num_sms) is not None
        """,
    )


def test_reported_faults_are_raised_before_the_next_launch() -> None:
    """A disagreement is raised once, and the call refused on all ranks; a missing peer until it is masked."""
    on_stubs(
        START,
        """
        from types import SimpleNamespace
        from deepep.backends.cuda.launch import Phase

        pending = []
        stub_cuda.Domain.has_fault = lambda self: bool(pending)
        stub_cuda.Domain.take_fault = lambda self, stream: pending.pop() if pending else None

        def fault(phase):
            pending.append(stub_cuda.Fault(operation=1, phase=phase, missing=1, expected=1, seen=0))

        with stub_cuda.stub_buffer(enable_shrink=True) as buffer:
            *_, handle, _ = dispatch(buffer)
            buffer.dispatch(x, handle=handle)
            launches.clear()
            fault(Phase.DISAGREEMENT)
            with pytest.raises(deepep.MismatchError):
                buffer.dispatch(x, handle=handle)
            assert launches == ["refuse dispatch"]
            fault(Phase.DISAGREEMENT)  # of the refusal, which this rank knows of
            buffer.dispatch(x, handle=handle)
            assert launches == ["refuse dispatch", "dispatch_cached"]
            fault(Phase.COUNTS)
            for _ in range(2):
                with pytest.raises(deepep.PeerTimeoutError):
                    buffer.dispatch(x, handle=handle)
                with pytest.raises(deepep.PeerTimeoutError):
                    dispatch(buffer)
            buffer.low_latency_clean_mask_buffer()
            dispatch(buffer)
        """,
    )


def test_the_number_of_a_list_goes_to_the_kernels() -> None:
    """Of a cached one as well, which the next of another list, or of none, does not take over."""
    on_stubs(
        START,
        """
        from deepep.api.payloads import PayloadForm

        numbers = []

        def note(name):
            method = getattr(stub_cuda.Domain, name)

            def noting(domain, **named):
                numbers.append(named["payload"])
                return method(domain, **named)

            setattr(stub_cuda.Domain, name, noting)

        for name in ("dispatch", "prepare_cached"):
            note(name)
        words, reals = (torch.zeros((8, 4), dtype=d) for d in (torch.int32, torch.float32))
        of = [PayloadForm.of([(rows.dtype, (4,))]).number() for rows in (words, reals)]
        assert of[0] != of[1] and 0 not in of
        with stub_cuda.stub_buffer() as buffer:
            handle = dispatch(buffer).handle
            for rows in ([words], [words], [reals], [words], words.view(torch.bfloat16)):
                buffer.dispatch(rows, handle=handle)
            assert numbers == [0, of[0], of[1], of[0], 0]
        """,
    )


def test_the_short_way_is_for_handles_of_this_buffer() -> None:
    on_stubs(
        START,
        """
        with stub_cuda.stub_buffer() as buffer, stub_cuda.stub_buffer() as other:
            handle = dispatch(buffer).handle
            for _ in range(2):
                buffer.dispatch(x, handle=handle)
            launches.clear()
            with pytest.raises(deepep.HandleError, match="another buffer"):
                other.dispatch(x, handle=handle)
            assert launches == ["refuse dispatch"]
        """,
    )
