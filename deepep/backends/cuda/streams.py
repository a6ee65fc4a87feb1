"""Where an operation of the CUDA backend runs."""

from __future__ import annotations

import torch

from deepep.backends.cuda.launch import Endpoint
from deepep.runtime import streams
from deepep.runtime.completion import Completion


class CallersStream:
    """The operation runs where the caller is. Entering gives that stream's address."""

    __slots__ = ("_index",)

    def __init__(self, index: int) -> None:
        self._index = index

    def __enter__(self) -> int:
        return streams.current_address(self._index)

    def __exit__(self, *error: object) -> None:
        pass


class CommStream:
    """The operation runs on the communication stream, after `after` or what the caller's stream holds now.

    Inside, that is the current stream. Entering gives its address.
    """

    __slots__ = ("_after", "_endpoint", "_stream", "_switch")

    def __init__(self, stream: torch.cuda.Stream, endpoint: Endpoint, after: Completion | None) -> None:
        self._stream, self._endpoint, self._after = stream, endpoint, after
        self._switch = streams.switched(stream)

    def __enter__(self) -> int:
        address = self._stream.cuda_stream
        if self._after is None:
            self._endpoint.follow(streams.current_address(self._stream.device_index), address)
        self._switch.__enter__()
        if self._after is not None:
            self._after.current_stream_wait()
        return address

    def __exit__(self, *error: object) -> None:
        self._switch.__exit__()
