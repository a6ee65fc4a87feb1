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
