"""One rank of several domains on GPUs, as tests/backends/cuda/test_domains.py starts it: a Buffer's calls.

Every rank compares its bits with those of the reference backend, on the CPU. Arguments: the number of rounds,
the ranks of a domain, and "silent" where a NIC falls silent: then PeerTimeoutError has to come, and the
context to live.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist

import deepep
from deepep import Buffer
from deepep.backends.cuda.memory.nvshmem import THIS_PROCESS

EXPERTS, HIDDEN, TOPK = 16, 512, 4


def calls(buffer: Buffer, device: str, seed: int) -> list[torch.Tensor]:
    """Fresh and cached dispatches and combines, with every option."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    tokens = (37, 0, 2100, 901)[(rank + seed) % 4]
    x = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    bias = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    idx = torch.rand(tokens, EXPERTS, generator=generator).topk(TOPK).indices
    idx[::5, 1:] = -1
    weights = torch.rand(tokens, TOPK, generator=generator)
    fp8 = (
        x.to(torch.float32).clamp(-400, 400).to(torch.float8_e4m3fn),
        torch.rand(tokens, HIDDEN // 128, generator=generator),
    )
    x, bias, idx, weights, fp8 = _to(device, x, bias, idx, weights, fp8)
    per_rank, per_domain, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    how: dict[str, Any] = {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_domain,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }
    made: list[Any] = [per_domain]
    rows, got_idx, got_weights, counts, handle, _ = buffer.dispatch(
        x, topk_idx=idx, topk_weights=weights, expert_alignment=4, **how
    )
    made += [rows, got_idx, got_weights, torch.tensor(counts, device=device)]
    made += buffer.combine(rows, handle, topk_weights=got_weights, bias=(bias, bias))[:2]
    again = buffer.dispatch(x.flip(0), handle=handle)[0]
    made += [again, buffer.combine(again, handle)[0]]
    (rows8, scales), idx8, *_ = buffer.dispatch(fp8, topk_idx=idx, topk_weights=weights, **how)
    made += [rows8.view(torch.uint8), scales, idx8]
    worst, idx_worst, *_ = buffer.dispatch(
        x, topk_idx=idx, topk_weights=weights, num_worst_tokens=4 * 2100, **how
    )
    came = int((idx_worst >= 0).any(1).sum())
    made += [worst[:came], idx_worst]
    late, *_, handle, event = buffer.dispatch(
        x, topk_idx=idx, topk_weights=weights, async_finish=True, allocate_on_comm_stream=False, **how
    )
    event.current_stream_wait()
    made += [late, buffer.combine(late, handle)[0]]
    return made


def _to(device: str, *given: Any) -> list[Any]:
    return [
        tuple(part.to(device) for part in one) if isinstance(one, tuple) else one.to(device) for one in given
    ]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def check_that_domains_share_no_memory(buffer: Buffer, rank: int, per_domain: int) -> None:
    """Neither heaps nor NVSHMEM's memory are mapped across."""
    engine = buffer.runtime
    mapped = engine._generations._present.mapped
    near = [r for r in range(dist.get_world_size()) if r // per_domain == rank // per_domain]
    addresses = {mapped[r].data_ptr() for r in near}
    assert len(addresses) == len(near)
    assert {heap.data_ptr() for heap in mapped} == addresses
    process = THIS_PROCESS.process
    assert process is not None
    core = process._binding._core
    for pe in set(range(process.num_pes)) - set(near):
        try:
            theirs = core.get_peer_tensor(process.slab, pe)
        except core.NvshmemError:  # nvshmem_ptr has no address
            continue
        raise AssertionError(f"PE {pe}'s memory is mapped here, at {theirs.data_ptr():#x}")


def main() -> None:
    rounds, per_domain, silent = int(sys.argv[1]), int(sys.argv[2]), "silent" in sys.argv
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("gloo", rank=rank, world_size=size)
    kept: dict[str, Any] = {"ranks_per_domain": per_domain, "explicitly_destroy": True}
    buffer = Buffer(
        dist.group.WORLD, backend="cuda", symmetric_bytes=512 << 20, timeout=20.0 if silent else 120.0, **kept
    )
    if silent:
        try:
            for seed in range(rounds):
                calls(buffer, "cuda", seed)
        except deepep.PeerTimeoutError as error:
            print("timed out:", error, flush=True)
        else:
            raise AssertionError("no rank was missed")
        assert torch.zeros(1, device="cuda").item() == 0
        os._exit(0)  # NVSHMEM's end would wait for those whose NIC is silent
    reference = Buffer(dist.group.WORLD, backend="reference", device="cpu", timeout=120.0, **kept)
    for seed in range(rounds):
        got, want = calls(buffer, "cuda", seed), calls(reference, "cpu", seed)
        for number, (ours, theirs) in enumerate(zip(got, want, strict=True)):
            if not torch.equal(bits(ours), bits(theirs)):
                raise AssertionError(f"round {seed}, output {number}: {ours.shape} {theirs.shape}")
    check_that_domains_share_no_memory(buffer, rank, per_domain)
    buffer.destroy()
    reference.destroy()
    print("equal", flush=True)


main()
