"""ElasticBuffer's calls beside the MoE: all-gathers in sessions, sends around a ring, Engram storage.

V2's names and defaults; the work is that of an engine's `gather_sessions`, `ring` and `engram`. Calls that
are refused say so on every rank, but for those that only this rank makes: pp_send, pp_recv, engram_fetch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from deepep.api import elastic_sizes as sizes
from deepep.api.elastic_arguments import BufferLimits
from deepep.runtime import gather_sessions as sessions
from deepep.runtime import ring
from deepep.runtime.ambient import plainly
from deepep.runtime.checks import MOST, check_flag, check_int
from deepep.runtime.engine import Engine
from deepep.runtime.labels import with_label

Shapes = Sequence[int] | Sequence[Sequence[int]]
Fetched = tuple[torch.Tensor, torch.Tensor | None]


class SidePrimitiveCalls:
    """Calls of whoever has an engine, limits and a life. R: ranks."""

    _engine: Engine
    _limits: BufferLimits
    _check_alive: Callable[[], None]

    # sizes

    @staticmethod
    def get_engram_storage_size_hint(
        num_entries: int, hidden: int, num_max_tokens_per_rank: int, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[int, int]:
        """(bytes of what a fetch of so many tokens' entries receives, num_cpu_bytes for a rank's entries),
        multiples of 2 MiB. num_entries: of one rank. Raises ArgumentTypeError and RangeError.
        """
        entry = check_int("hidden", hidden, 1, MOST) * sessions.check_dtype(dtype).itemsize
        received = entry * check_int("num_max_tokens_per_rank", num_max_tokens_per_rank, 1, MOST)
        kept = entry * check_int("num_entries", num_entries, 1, MOST)
        return sizes.aligned(received), sizes.aligned(kept)

    @staticmethod
    def get_pp_buffer_size_hint(num_max_tensor_bytes: int, num_max_inflight_tensors: int) -> int:
        """Bytes of the tensors on their way to and from both neighbours, a multiple of 2 MiB. Raises
        ArgumentTypeError and RangeError.
        """
        size, count = ring.Ring.checked_config(num_max_tensor_bytes, num_max_inflight_tensors)
        return sizes.aligned(-(-size // ring.ALIGNMENT) * ring.ALIGNMENT * count * 4)

    @staticmethod
    def get_agrs_num_max_session_bytes(group: dist.ProcessGroup, shapes: Shapes, dtype: torch.dtype) -> int:
        """Bytes of a session that gathers a tensor of each shape from every rank; shapes: one, or several.
        Raises ArgumentTypeError and RangeError.
        """
        found, _ = sessions.checked_shapes(shapes)
        kind = sessions.check_dtype(dtype)
        total = sum(sessions.gathered_bytes(group.size(), shape, kind) for shape in found)
        return sessions.check_session_bytes(total)

    @staticmethod
    def get_agrs_buffer_size_hint(group: dist.ProcessGroup, num_max_session_bytes: int) -> int:
        """Bytes of memory for sessions of this size, a multiple of 2 MiB: a buffer's sessions take turns in
        it. Raises ArgumentTypeError and RangeError.
        """
        return sizes.aligned(check_int("num_max_session_bytes", num_max_session_bytes, 1, sessions.LARGEST))

    # all-gathers in sessions

    def agrs_set_config(self, num_max_session_bytes: int, num_max_all_gathers_per_session: int) -> None:
        """Sizes of the sessions to come: bytes of all gathered tensors of one (its
        `get_agrs_num_max_session_bytes`), and calls of `all_gather`. Collective, a barrier, not in a session.

        Raises, on every rank: ArgumentTypeError, RangeError, ModeError, MismatchError, PeerTimeoutError.
        """
        self._check_alive()
        gathers = self._engine.gather_sessions()
        gathers.set_config(num_max_session_bytes, num_max_all_gathers_per_session)

    @with_label
    def create_agrs_session(self) -> None:
        """Begin a session. Collective; waits for all ranks, and what the session before gathered is good
        until then. Raises, on every rank: ModeError in a session or without `agrs_set_config`, MismatchError,
        PeerTimeoutError.
        """
        if torch.is_inference_mode_enabled():
            plainly(SidePrimitiveCalls.create_agrs_session, locals())
            return
        self._check_alive()
        self._engine.gather_sessions().begin()

    @with_label
    def destroy_agrs_session(self) -> None:
        """End the session, once its gathers have ended on all ranks. Collective. Raises, on every rank:
        ModeError outside of one, MismatchError, PeerTimeoutError.
        """
        self._check_alive()
        self._engine.gather_sessions().end()

    @contextlib.contextmanager
    def agrs_new_session(self, enabled: bool = True) -> Iterator[None]:
        """A session for a `with` statement; enabled False: nothing.

        If the body raises, the session ends on this rank alone, and that is what is raised: other ranks may
        be anywhere, and are not waited for.
        """
        if not check_flag("enabled", enabled):
            yield
            return
        self.create_agrs_session()
        try:
            yield
        except BaseException:
            self._engine.gather_sessions().drop()
            raise
        self.destroy_agrs_session()

    def agrs_get_inplace_tensor(self, shapes: Shapes, dtype: torch.dtype) -> Any:
        """This rank's parts of tensors that a later `all_gather` of this session is given, which then copies
        nothing on this rank: one tensor for one shape, a tuple for a sequence of shapes.

        Not collective, but all ranks reserve the same, and in the same place among their calls: what differs
        is found in the next gather. Raises, on this rank: ModeError outside of a session, CapacityError,
        ArgumentTypeError, RangeError.
        """
        if torch.is_inference_mode_enabled():
            return plainly(SidePrimitiveCalls.agrs_get_inplace_tensor, locals())
        self._check_alive()
        found, several = sessions.checked_shapes(shapes)
        made = self._engine.gather_sessions().reserve(found, sessions.check_dtype(dtype))
        return tuple(made) if several else made[0]

    @with_label
    def all_gather(self, t: torch.Tensor | Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Begin to gather a tensor, or several, of every rank. Collective, in a session.

        t: contiguous, of any dtype; dtypes and shapes are the same on all ranks. It may be what
            `agrs_get_inplace_tensor` gave, once. Not to be written before the end.

        Returns (gathered, handle), or (*gathered, handle) of several: [R, ...] in the order of ranks, in the
        session's memory, and a function that waits for them. Several gathers may be under way; they end in
        the order of the calls.

        Raises, on every rank, here or in handle(): ModeError outside of a session, CapacityError for more
        bytes or calls than configured, the ArgumentError that fits, MismatchError, PeerTimeoutError. After a
        refusal the ranks' places in the session differ: go on in another one.
        """
        if torch.is_inference_mode_enabled():
            return plainly(SidePrimitiveCalls.all_gather, locals())
        self._check_alive()
        tensors = [t] if isinstance(t, torch.Tensor) else list(t) if isinstance(t, Sequence) else []
        gathered, completion = self._engine.gather_sessions().gather(tensors)
        return (*gathered, completion.current_stream_wait)

    # sends around a ring

    @with_label
    def pp_set_config(self, num_max_tensor_bytes: int, num_max_inflight_tensors: int) -> None:
        """Sizes of the sends to come: bytes of a tensor, and tensors that may be under way from one rank to a
        neighbour, sent and not received. Collective, and a barrier; what is under way is lost.

        Raises, on every rank: ArgumentTypeError, RangeError, MismatchError, PeerTimeoutError.
        """
        self._check_alive()
        self._engine.ring().set_config(num_max_tensor_bytes, num_max_inflight_tensors)

    @with_label
    def pp_send(self, t: torch.Tensor, dst_rank_idx: int, num_sms: int = 0) -> None:
        """Send a tensor to a neighbour: the rank before or behind this one, around the ring.

        t: contiguous, at most num_max_tensor_bytes. It may be written again on return. num_sms: checked; no
            SM is used. Waits while as many tensors as may be are under way there.

        Raises, on this rank: the ArgumentError that fits, ModeError before `pp_set_config`, PeerTimeoutError
        with the neighbour's name if it does not receive; then nothing passes between the two any more until
        all ranks call `pp_set_config`. On CUDA all of it goes on in the order of the current stream, and the
        next call raises what was found there.
        """
        self._check_alive()
        check_int("num_sms", num_sms, 0, MOST)
        self._engine.ring().send(t, dst_rank_idx)

    @with_label
    def pp_recv(self, t: torch.Tensor, src_rank_idx: int, num_sms: int = 0) -> None:
        """Receive the tensor that a neighbour sent first of those not received yet.

        t: contiguous, of the sent one's dtype and number of bytes; is written. num_sms: as for `pp_send`.

        Raises, on this rank: as `pp_send`; MismatchError for another dtype or size than was sent, and that
        tensor is lost.
        """
        self._check_alive()
        check_int("num_sms", num_sms, 0, MOST)
        self._engine.ring().recv(t, src_rank_idx)

    # Engram storage

    @with_label
    def engram_write(self, storage: torch.Tensor, sf: torch.Tensor | None = None) -> None:
        """Write this rank's entries; those of all ranks are one table, entry i on rank i // n. Collective,
        and a barrier before and after: fetches begun before read what was there before.

        storage: [n, H] bf16, fp16, float32 or float8_e4m3fn, contiguous, rows of a multiple of 16 bytes;
            n and H are the same on all ranks; at most num_cpu_bytes, as constructed.
        sf: [R * n, P] float32 or int32, with FP8 and with nothing else: scales of all entries, the same on
            all ranks.

        Raises, on every rank: ModeError without num_cpu_bytes, CapacityError, the ArgumentError that fits,
        MismatchError, PeerTimeoutError.
        """
        if torch.is_inference_mode_enabled():
            plainly(SidePrimitiveCalls.engram_write, locals())
            return
        self._check_alive()
        self._engine.engram().write(storage, sf, self._limits.num_cpu_bytes)

    @with_label
    def engram_fetch(
        self, indices: torch.Tensor, num_qps: int = 0, use_tma_aligned_col_major_sf: bool = False
    ) -> Callable[[], Fetched]:
        """Begin to read entries, which asks no other rank to take part.

        indices: [T, n] int32, entries of the whole table, in any order, with any repeats.
        num_qps: at most num_allocated_qps; without effect.
        use_tma_aligned_col_major_sf: scales with strides (1, T rounded up to 4), not (n * P, 1).

        Returns a function that waits and gives (data [T * n, H], sf [T, n * P] or None).

        Raises, on this rank: ModeError before `engram_write`, the ArgumentError that fits; that function
        raises RangeError for an index that names no entry.
        """
        if torch.is_inference_mode_enabled():
            return plainly(SidePrimitiveCalls.engram_fetch, locals())
        self._check_alive()
        check_int("num_qps", num_qps, 0, self._limits.num_qps)
        turned = check_flag("use_tma_aligned_col_major_sf", use_tma_aligned_col_major_sf)
        data, scales, completion = self._engine.engram().fetch(indices, turned)

        def hook() -> Fetched:
            completion.current_stream_wait()
            return data, scales

        return hook
