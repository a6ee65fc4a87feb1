"""The copy kernels that floors are measured with: plain accesses, and bulk copies through rings of stages."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_bytes", [0, 16, 8192, 8208, 5 * 8192 * 4 + 16, 100_000_000])
@pytest.mark.parametrize("blocks", [1, 7, 132])
@pytest.mark.parametrize(
    "ring",
    [{}, {"bulk": True}, {"bulk": True, "warps": 1, "stages": 3, "stage_bytes": 16}],
    ids=["plain", "bulk", "bulk, small stages"],
)
def test_a_copy_is_the_original(num_bytes: int, blocks: int, ring: dict[str, int]) -> None:
    from deepep import _cuda

    if ring.get("stage_bytes") == 16 and num_bytes > 1_000_000:
        pytest.skip("a minute of sixteen bytes at a time")
    device = torch.device("cuda")
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.full((num_bytes + 16,), 7, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream().cuda_stream
    _cuda.copy(source.data_ptr(), target.data_ptr(), num_bytes, blocks, stream, **ring)
    assert torch.equal(target[:num_bytes], source)
    assert (target[num_bytes:] == 7).all()


def test_blocks_hold_as_many_sms_for_as_long() -> None:
    """Two launches that do not fit beside each other come one after the other. Bounds from below alone: what
    each holds by its own clock, and both together if the second begins behind the first.
    """
    from deepep import _cuda

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    streams = [torch.cuda.Stream() for _ in range(2)]

    def milliseconds(blocks: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for stream in streams:
            stream.wait_event(begin)
            _cuda.hold(20_000_000, blocks, stream.cuda_stream)
            torch.cuda.current_stream().wait_stream(stream)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    assert milliseconds(1) >= 20
    assert milliseconds(sms) >= 40
