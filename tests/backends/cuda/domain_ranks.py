"""One rank of several domains on GPUs, as tests/backends/cuda/test_domains.py starts it: a Buffer's calls.

Every rank compares its bits with those of the reference backend, on the CPU. Arguments: the number of rounds,
the ranks of a domain, and what is tried besides:
    silent   a NIC falls silent: PeerTimeoutError has to come, and the context to live
    groups   a gate keeps one domain of each token; says how many bytes are to cross to each rank, at least
             and at most: "crossed: " and a list, by rank
    many     so many operations in a row, without a wait of the host, all with the same bits
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist

import deepep
from deepep import Buffer, gate
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


def bytes_by_groups(buffer: Buffer, per_domain: int, rounds: int) -> list[tuple[int, int]]:
    """By rank, the least and the most bytes of dispatches whose gate keeps one domain, and of their combines.

    A token crosses once where the kept domain is another than its own, and one sum comes back.
    """
    rank, size, tokens = dist.get_rank(), dist.get_world_size(), 600
    domains = size // per_domain
    crossing = torch.zeros(size, domains, dtype=torch.int64)  # by source and domain
    for seed in range(rounds):
        chosen = []
        for source in range(size):
            generator = torch.Generator().manual_seed(1000 * seed + source)
            logits = torch.randn(tokens, EXPERTS, generator=generator)
            chosen.append(
                gate.group_limited_topk(logits, TOPK, num_groups=domains, num_kept_groups=1).topk_idx
            )
            kept = chosen[-1] // (EXPERTS // domains)
            assert bool((kept == kept[:, :1]).all())
            crossing[source] += kept[:, 0].bincount(minlength=domains)
        idx = chosen[rank].cuda()
        x = torch.randn(tokens, HIDDEN, device="cuda").to(torch.bfloat16)
        rows, *_, handle, _ = buffer.dispatch(x, topk_idx=idx, topk_weights=idx.float(), num_experts=EXPERTS)
        buffer.combine(rows, handle)
    row, own = 2 * HIDDEN, rank // per_domain
    record = row + 4 + 4 * per_domain + 12 * TOPK + 16
    bounds = []
    for peer in range(size):
        is_rail = peer % per_domain == rank % per_domain and peer != rank
        out, back = int(crossing[rank, peer // per_domain]), int(crossing[peer, own])
        posted = 16384 * rounds  # counts, headers of chunks, and which of its ranks have a row of each token
        most = out * record + back * row + posted
        bounds.append((row * (out + back), most) if is_rail else (0, 0))
    return bounds


def many(buffer: Buffer, count: int) -> None:
    """Cached dispatches and combines of two routes by turns, compared on the device."""
    routes = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
        x = torch.randn((37, 0, 300, 90)[(dist.get_rank() + seed) % 4], HIDDEN, generator=generator)
        idx = torch.rand(len(x), EXPERTS, generator=generator).topk(TOPK).indices
        x, idx = x.to(torch.bfloat16).cuda(), idx.cuda()
        rows, *_, handle, _ = buffer.dispatch(x, topk_idx=idx, topk_weights=idx.float(), num_experts=EXPERTS)
        routes.append((x, handle, rows.clone(), buffer.combine(rows, handle)[0]))
    wrong = torch.zeros(2, dtype=torch.int64, device="cuda")
    for number in range(count // 2):
        x, handle, wanted, summed = routes[number % 2]
        rows = buffer.dispatch(x, handle=handle)[0]
        wrong[0] += (rows != wanted).any()
        wrong[1] += (buffer.combine(rows, handle)[0] != summed).any()
    assert wrong.tolist() == [0, 0]


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
    rounds, per_domain, tried = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if sys.argv[3:] else ""
    silent = tried == "silent"
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
    if tried == "groups":
        print("crossed:", [list(bound) for bound in bytes_by_groups(buffer, per_domain, rounds)], flush=True)
    if tried == "many":
        many(buffer, rounds)
    if tried:
        buffer.destroy()
        print("equal", flush=True)
        return
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


if __name__ == "__main__":
    main()
