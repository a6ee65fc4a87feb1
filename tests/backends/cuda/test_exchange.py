"""The bare exchange on virtual ranks of one GPU: bytes, sums of what was read, ranks that do not come."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu

WARPS = 32


class Exchanges:
    """Ranks of one device, each with its stream; all kernels are resident together."""

    def __init__(self, sizes: list[list[int]], timeout: float = 5.0) -> None:
        from deepep import _cuda

        self.sizes = sizes
        ranks, most = len(sizes), max(map(max, sizes))
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.blocks = torch.cuda.get_device_properties(self.device).multi_processor_count // ranks
        self.heaps = [self._zeros(_cuda.exchange_bytes(ranks, most), torch.uint8) for _ in sizes]
        self.states = [self._zeros(_cuda.EXCHANGE_STATE_WORDS, torch.int32) for _ in sizes]
        self.sums = [self._zeros(self.blocks * WARPS, torch.int32) for _ in sizes]
        self.streams = [torch.cuda.Stream(self.device) for _ in sizes]
        self.exchanges = [
            _cuda.Exchange(
                rank=r,
                heaps=[heap.data_ptr() for heap in self.heaps],
                pair_bytes=most,
                state=self.states[r].data_ptr(),
                timeout_seconds=timeout,
            )
            for r in range(ranks)
        ]
        pair = self.exchanges[0].pair_bytes
        self.sources = [
            torch.randint(0, 256, (ranks, pair), dtype=torch.uint8, device=self.device) for _ in sizes
        ]
        self.missing_word = _cuda.EXCHANGE_MISSING
        torch.cuda.synchronize()

    def _zeros(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype, device=self.device)

    def run(self, *, reads: bool, skip: int = -1) -> None:
        for rank, exchange in enumerate(self.exchanges):
            if rank == skip:
                continue
            exchange.launch(
                source=self.sources[rank].data_ptr(),
                sent=self.sizes[rank],
                received=[row[rank] for row in self.sizes],
                sums=self.sums[rank].data_ptr() if reads else 0,
                num_blocks=self.blocks,
                stream=self.streams[rank].cuda_stream,
            )
        torch.cuda.synchronize()

    def missing(self, rank: int) -> int:
        return int(self.states[rank][self.missing_word])

    def received(self, rank: int, source: int, epoch: int) -> torch.Tensor:
        """The bytes that lie where `source` pushes in this epoch."""
        pair, ranks = self.exchanges[0].pair_bytes, len(self.sizes)
        begin = len(self.heaps[rank]) - (2 * ranks - (epoch % 2) * ranks - source) * pair
        return self.heaps[rank][begin : begin + self.sizes[source][rank]]

    def sent(self, source: int, rank: int) -> torch.Tensor:
        return self.sources[source][rank][: self.sizes[source][rank]]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("num_bytes", [0, 16, 7392, 128 * 14336])
def test_what_was_sent_lies_there_and_was_read(ranks: int, num_bytes: int) -> None:
    world = Exchanges([[num_bytes + 16 * (s + 2 * d) for d in range(ranks)] for s in range(ranks)])
    for epoch in range(1, 8):
        reads = epoch % 3 != 0
        for source in world.sources:
            source.random_(0, 256)
        torch.cuda.synchronize()  # the exchanges run on streams of their own
        world.run(reads=reads)
        for rank in range(ranks):
            assert world.missing(rank) == 0
            total = 0
            for source in set(range(ranks)) - {rank}:
                assert torch.equal(world.received(rank, source, epoch), world.sent(source, rank))
                total += int(world.sent(source, rank).view(torch.int32).sum(dtype=torch.int64))
            if reads:
                assert (int(world.sums[rank].sum(dtype=torch.int64)) - total) % 2**32 == 0


def test_a_graph_of_exchanges_replays() -> None:
    world = Exchanges([[0, 4096], [4096, 0]])
    world.run(reads=True)
    graphs = []
    for rank, exchange in enumerate(world.exchanges):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=world.streams[rank]):
            for sums in (0, world.sums[rank].data_ptr(), 0):
                exchange.launch(
                    source=world.sources[rank].data_ptr(),
                    sent=world.sizes[rank],
                    received=[row[rank] for row in world.sizes],
                    sums=sums,
                    num_blocks=world.blocks,
                    stream=torch.cuda.current_stream().cuda_stream,
                )
        graphs.append(graph)
    for _ in range(100):
        for graph, stream in zip(graphs, world.streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert [world.missing(rank) for rank in range(2)] == [0, 0]
    assert {int(state[0]) for state in world.states} == {301}


def test_a_rank_that_does_not_come_is_noted() -> None:
    world = Exchanges([[0, 64, 64], [64, 0, 64], [64, 64, 0]], timeout=0.2)
    world.run(reads=True, skip=1)
    assert [world.missing(rank) for rank in range(3)] == [2, 0, 2]
