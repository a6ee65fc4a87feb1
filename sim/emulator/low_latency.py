"""The low-latency operations on an emulated machine: the ranks' memory, and launches of the kernels on it.

Calls name the rank; they enqueue, and the machine's `run` carries out. Inputs are CPU tensors, copied into
the machine; results are read back as tensors. Every read and write of a host is checked by the machine.

Shapes: R ranks, E experts, L = E / R, K top-k, T tokens of a rank, M most tokens of any, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep import _emulator
from deepep.sim.emulator.calls import KernelFault
from deepep.sim.emulator.lines import LAUNCHES, RankLines

BOTH, SEND, RECEIVE = 0, 1, 2


@dataclass(frozen=True)
class LowLatencySizes:
    """The largest call that the ranks' memory has room for.

    entry_stretches: 0 where sums go back; where each top-k entry has a row that does, for how many sources
    there is room of their own: 1, they share it, or all R.
    """

    num_local_experts: int
    num_max_tokens: int
    num_topk: int
    hidden: int
    entry_stretches: int = 0


@dataclass(frozen=True)
class LowLatencyGpu:
    """The shape of each rank's GPU.

    num_sms: how many blocks are resident together; 0 is all. timeout: seconds a kernel waits. calls_before:
    of each operation, modulo 2^32. shrinks: kernels mask a rank that is missing, and go on. plain_copies:
    ranks whose GPU has no bulk copies, as of compute capability 8.
    """

    num_blocks: int = 2
    num_threads: int = 64
    num_sms: int = 0
    timeout: float = 1.0
    calls_before: int = 0
    shrinks: bool = False
    plain_copies: tuple[int, ...] = ()


@dataclass(frozen=True)
class LowLatencyCall:
    """Arguments that both operations of a rank have: topk_idx [T, K] int32 or int64, topk_weights float32.

    carries_weights: whether they travel with the dispatch. refused: this rank takes no part in this call, and
    only posts that to the others; elsewhere: because it is made by other means. exact: a combine returns the
    row of each top-k entry; logfmt: in LogFMT.
    """

    topk_idx: Tensor
    topk_weights: Tensor
    num_max_tokens: int
    num_local_experts: int
    hidden: int
    carries_weights: bool = False
    refused: bool = False
    elsewhere: bool = False
    exact: bool = False
    logfmt: bool = False


@dataclass(frozen=True)
class RowCast:
    """The format of a dispatch's rows."""

    fp8: bool = False
    round_scale: bool = False
    ue8m0: bool = False


class LowLatencyHandleAt(NamedTuple):
    """Addresses of a rank's handle (csrc/kernels/low_latency/args.hpp)."""

    identity: int
    sent: int
    came: int
    routes: int


@dataclass(frozen=True)
class KeptHandle:
    """A handle's contents, as its rank keeps them from a dispatch to its combines.

    identity [2]; sent [T]: the ranks that a token went to, as bits; came [R, M / 32, rounded up]: tokens of
    each source, as bits; routes [R, M, 2 K], zeros where no token came; relayed [D, M]: of ranks in other
    domains whose gateway this rank was, the ranks of its domain that a token went to, as bits; int32.
    """

    identity: Tensor
    sent: Tensor
    came: Tensor
    routes: Tensor
    relayed: Tensor

    @property
    def num_topk(self) -> int:
        """K of the dispatch."""
        return self.routes.shape[2] // 2


class LowLatencyResultsAt(NamedTuple):
    """Addresses of a dispatch's results."""

    recv_x: int
    recv_scales: int
    recv_count: int
    recv_source: int
    recv_range: int


class EmulatedLowLatency:
    """All ranks' symmetric memory, state and fault records, and a domain for each rank."""

    def __init__(
        self, machine: Any, kernels: Any, gpu: LowLatencyGpu, num_ranks: int, sizes: LowLatencySizes
    ) -> None:
        self.machine = machine
        self.gpu = gpu
        self.num_ranks = num_ranks
        everyone = range(num_ranks)
        num_bytes, control = _emulator.low_latency_bytes(
            num_ranks,
            sizes.num_local_experts,
            sizes.num_max_tokens,
            sizes.num_topk,
            2 * sizes.hidden,
            sizes.entry_stretches,
        )
        heaps = [self._allocate(f"slots@{r}", "symmetric", r, num_bytes) for r in everyone]
        self._domains: list[Any] = []
        self._waits: dict[int, int] = {}
        self._lines: dict[int, tuple[int, int]] = {}
        for rank in everyone:
            # Only what holds words and flags: rows that are read before they are written shall be found out.
            machine.write(rank, heaps[rank], bytes(control))
            state = self._zeros(f"low-latency state@{rank}", "device", rank, _emulator.STATE_BYTES)
            before = gpu.calls_before.to_bytes(4, "little")
            machine.write(rank, state, before * _emulator.LOW_LATENCY_EPOCHS)
            fault = self._zeros(f"low-latency fault@{rank}", "host", rank, _emulator.FAULT_BYTES)
            self._domains.append(self._make_domain(kernels, sizes, rank, heaps, state, fault))
        machine.meet()

    def _make_domain(
        self, kernels: Any, sizes: LowLatencySizes, rank: int, heaps: list[int], state: int, fault: int
    ) -> Any:
        """A rank's domain, with whatever memory of its own that takes."""
        return _emulator.LowLatencyDomain(
            machine=self.machine,
            kernels=kernels,
            num_threads=self.gpu.num_threads,
            rank=rank,
            heaps=heaps,
            max_local_experts=sizes.num_local_experts,
            max_tokens=sizes.num_max_tokens,
            max_topk=sizes.num_topk,
            max_row_bytes=2 * sizes.hidden,
            entry_stretches=sizes.entry_stretches,
            state=state,
            fault=fault,
            timeout_seconds=self.gpu.timeout,
            shrinks=self.gpu.shrinks,
            bulk_copies=rank not in self.gpu.plain_copies,
        )

    def set_live(self, rank: int, live: tuple[int, ...]) -> None:
        """The ranks that take part in this rank's calls to come."""
        self._domains[rank].set_live(sum(1 << r for r in live))

    def masked(self, rank: int) -> tuple[int, ...]:
        """The ranks that this rank's kernels have masked. Its stream has to be idle."""
        bits = self._domains[rank].masked()
        return tuple(r for r in range(self.num_ranks) if bits >> r & 1)

    def record_lines(self, rank: int) -> None:
        """The warps of the rank's next launches write time lines."""
        words = LAUNCHES * self.gpu.num_blocks * (self.gpu.num_threads // 32) * _emulator.LINE_WORDS
        self._lines[rank] = self._zeros(f"lines@{rank}", "device", rank, 8 * words), words
        self._domains[rank].open_lines(*self._lines[rank])

    def read_lines(self, rank: int) -> RankLines:
        """The time lines that they have written. Its stream has to be idle."""
        launches = self._domains[rank].close_lines()
        return RankLines(
            launches, self.read(rank, self._lines[rank][0], torch.int64, (self._lines[rank][1],))
        )

    def measure_waits(self, rank: int) -> None:
        """From now on the rank's calls add up how long it waits for the others."""
        self._waits[rank] = self._zeros(f"waits@{rank}", "device", rank, 8 * self.num_ranks)

    def read_waits(self, rank: int) -> list[int]:
        """Nanoseconds that it has waited for each rank."""
        waits: list[int] = self.read(rank, self._waits[rank], torch.int64, (self.num_ranks,)).tolist()
        return waits

    def new_handle(self, rank: int, call: LowLatencyCall) -> LowLatencyHandleAt:
        """Room for a handle; a dispatch fills it."""
        tokens = call.topk_idx.shape[0]
        relayed = 4 * self._domains_relayed(rank)[0] * call.num_max_tokens
        return LowLatencyHandleAt(
            self._allocate(f"identity@{rank}", "device", rank, 8),
            self._allocate(f"sent@{rank}", "device", rank, 4 * tokens),
            self._allocate(f"came@{rank}", "device", rank, 4 * self.num_ranks * _token_words(call)),
            self._allocate(f"routes@{rank}", "device", rank, self._routes_bytes(call) + relayed),
        )

    def read_handle(self, rank: int, call: LowLatencyCall, at: LowLatencyHandleAt) -> KeptHandle:
        """The contents of a handle that a dispatch has filled."""
        tokens, topk = call.topk_idx.shape
        came = self.read(rank, at.came, torch.int32, (self.num_ranks, _token_words(call)))
        routes = torch.zeros(self.num_ranks, call.num_max_tokens, 2 * topk, dtype=torch.int32, device="cpu")
        with_weights = 2 * topk if call.carries_weights else topk
        for source, token in _tokens_that_came(came):  # no more of it was written
            place = at.routes + 8 * topk * (source * call.num_max_tokens + token)
            routes[source, token, :with_weights] = self.read(rank, place, torch.int32, (with_weights,))
        identity = self.read(rank, at.identity, torch.int32, (2,))
        number, domains = self._domains_relayed(rank)
        relayed = torch.zeros(number, call.num_max_tokens, dtype=torch.int32, device="cpu")
        for domain in domains:
            place = at.routes + self._routes_bytes(call) + 4 * domain * call.num_max_tokens
            relayed[domain] = self.read(rank, place, torch.int32, (call.num_max_tokens,))
        sent = self.read(rank, at.sent, torch.int32, (tokens,))
        return KeptHandle(identity, sent, came, routes, relayed)

    def given_handle(self, rank: int, call: LowLatencyCall, kept: KeptHandle) -> LowLatencyHandleAt:
        """A handle with the contents of one that an earlier dispatch has filled."""
        at = self.new_handle(rank, call)
        self._write(rank, at.identity, kept.identity)
        self._write(rank, at.sent, kept.sent[: call.topk_idx.shape[0]])
        self._write(rank, at.came, kept.came)
        self._write(rank, at.routes, kept.routes)
        self._write(rank, at.routes + self._routes_bytes(call), kept.relayed)
        return at

    def _routes_bytes(self, call: LowLatencyCall) -> int:
        return 8 * self.num_ranks * call.num_max_tokens * call.topk_idx.shape[1]

    def _domains_relayed(self, rank: int) -> tuple[int, list[int]]:
        """The number of domains that a handle has room for, and those this rank is a gateway for."""
        return 0, []

    def dispatch(
        self, rank: int, call: LowLatencyCall, cast: RowCast, x: Tensor, handle: LowLatencyHandleAt
    ) -> tuple[dict[str, Any], LowLatencyResultsAt]:
        """Arguments of `launch_dispatch`, and where the results will be."""
        local, room = call.num_local_experts, self.num_ranks * call.num_max_tokens
        columns = call.hidden // (512 if cast.ue8m0 else 128) if cast.fp8 else 0
        rows = local * room
        at = LowLatencyResultsAt(
            self._allocate(f"recv_x@{rank}", "device", rank, rows * call.hidden * (1 if cast.fp8 else 2)),
            self._allocate(f"recv_scales@{rank}", "device", rank, 4 * rows * columns) if columns else 0,
            self._allocate(f"recv_count@{rank}", "device", rank, 4 * local),
            self._allocate(f"recv_source@{rank}", "device", rank, 4 * rows),
            self._allocate(f"recv_range@{rank}", "device", rank, 8 * local * self.num_ranks),
        )
        args = self._common(rank, call, handle, with_weights=call.carries_weights) | {
            "x": self._put(f"x@{rank}", rank, x),
            "weights_travel": call.carries_weights,
            "casts": cast.fp8,
            "rounds_scales": cast.round_scale,
            "packs_scales": cast.ue8m0,
            **at._asdict(),
        }
        return args, at

    def read_results(
        self, rank: int, call: LowLatencyCall, cast: RowCast, at: LowLatencyResultsAt
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """A dispatch's x, scales or None, count, source and ranges. Rows that did not come are zeros."""
        local, room = call.num_local_experts, self.num_ranks * call.num_max_tokens
        count = self.read(rank, at.recv_count, torch.int32, (local,))
        dtype = torch.float8_e4m3fn if cast.fp8 else torch.bfloat16
        width = call.hidden * dtype.itemsize
        # Only rows that came: the others were never written.
        x = torch.zeros((local, room, call.hidden), dtype=dtype, device="cpu")
        for expert, rows in enumerate(count.tolist()):
            first = at.recv_x + expert * room * width
            x[expert, :rows] = self.read(rank, first, dtype, (rows, call.hidden))
        scales = None
        if cast.fp8:
            columns = call.hidden // (512 if cast.ue8m0 else 128)
            kind = torch.int32 if cast.ue8m0 else torch.float32
            scales = torch.zeros((local, columns, room), dtype=kind, device="cpu").transpose(1, 2)
            for expert, rows in enumerate(count.tolist()):
                for column in range(columns):
                    first = at.recv_scales + 4 * (expert * columns + column) * room
                    scales[expert, :rows, column] = self.read(rank, first, kind, (rows,))
        source = self.read(rank, at.recv_source, torch.int32, (local, room))
        ranges = self.read(rank, at.recv_range, torch.int64, (local, self.num_ranks))
        return x, scales, count, source, ranges

    def launch_dispatch(self, rank: int, args: dict[str, Any], halves: int) -> None:
        """Launches a dispatch, or a half of it."""
        self._domains[rank].dispatch(halves=halves, **args)

    def combine(
        self, rank: int, call: LowLatencyCall, x: Tensor, handle: LowLatencyHandleAt
    ) -> tuple[dict[str, Any], int]:
        """Arguments of `launch_combine`, and where the sums [T, H] will be."""
        out = self._allocate(f"out@{rank}", "device", rank, 2 * call.topk_idx.shape[0] * call.hidden)
        args = self._common(rank, call, handle, with_weights=True) | {
            "x": self._put(f"expert rows@{rank}", rank, x),
            "weights_travelled": call.carries_weights,
            "returned": 2 * call.exact + call.logfmt,
            "out": out,
        }
        return args, out

    def launch_combine(self, rank: int, args: dict[str, Any], halves: int) -> None:
        """Launches a combine, or a half of it."""
        self._domains[rank].combine(halves=halves, **args)

    def _common(
        self, rank: int, call: LowLatencyCall, handle: LowLatencyHandleAt, *, with_weights: bool
    ) -> dict[str, Any]:
        return {
            "num_blocks": self.gpu.num_blocks,
            "refused": call.refused,
            "elsewhere": call.elsewhere,
            "num_tokens": call.topk_idx.shape[0],
            "max_tokens": call.num_max_tokens,
            "num_topk": call.topk_idx.shape[1],
            "num_local_experts": call.num_local_experts,
            "hidden": call.hidden,
            "index_bytes": call.topk_idx.element_size(),
            "topk_idx": self._put(f"topk_idx@{rank}", rank, call.topk_idx),
            "topk_weights": self._put(f"topk_weights@{rank}", rank, call.topk_weights) if with_weights else 0,
            "waits": self._waits.get(rank, 0),
            "stream": 0,
            **handle._asdict(),
        }

    # ---- faults and memory ---------------------------------------------------------------------------------

    def watch_fault(self, rank: int) -> None:
        """The host looks out for a fault record until its stream is idle."""
        patience = int(100e9 * self.gpu.timeout)
        self.machine.watch(rank, self._domains[rank].fault_word, 1, patience, True)

    def take_fault(self, rank: int, *, watched: bool = False) -> KernelFault | None:
        """The rank's fault record, if there is one. watched: while the kernel runs; the record then stays."""
        domain = self._domains[rank]
        found = domain.watched_fault() if watched else domain.take_fault()
        if found is None:
            return None
        waited_on = tuple(r for r in range(self.num_ranks) if found.missing >> r & 1)
        return KernelFault(found.operation, found.phase, waited_on, found.expected, found.seen)

    def read(self, rank: int, address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor as the rank's host reads it."""
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        if size == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        raw = bytearray(self.machine.read(rank, address, size))
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(shape)

    def _allocate(self, name: str, space: str, rank: int, size: int) -> int:
        return int(self.machine.allocate(name, space, rank, size))

    def _zeros(self, name: str, space: str, rank: int, size: int) -> int:
        return int(self.machine.allocate_zeros(name, space, rank, size))

    def _put(self, name: str, rank: int, tensor: Tensor) -> int:
        if tensor.numel() == 0:
            return 0  # as torch's data_ptr
        address = self._allocate(name, "device", rank, tensor.numel() * tensor.element_size())
        self._write(rank, address, tensor)
        return address

    def _write(self, rank: int, address: int, tensor: Tensor) -> None:
        if tensor.numel():
            plain = tensor.detach().contiguous().flatten().view(torch.uint8)
            self.machine.write(rank, address, plain.numpy())


def _token_words(call: LowLatencyCall) -> int:
    """Words of a bit for each of a source's tokens."""
    return -(-call.num_max_tokens // 32)


def _tokens_that_came(came: Tensor) -> list[tuple[int, int]]:
    """(source, token) of each bit."""
    bits = (came.unsqueeze(-1) >> torch.arange(32, device="cpu")) & 1
    return [(source, token) for source, token in bits.flatten(1).nonzero().tolist()]
