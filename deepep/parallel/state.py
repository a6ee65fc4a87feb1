"""State: what `state_dict`s hold, as tensors and a text, so that a rank can take it over from others.

Nothing is pickled: a text that came over the network makes numbers, strings and containers, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepep.errors import ArgumentError, ArgumentTypeError

_CONTAINERS = {"list": list, "tuple": tuple, "dict": dict, "counter": Counter}
_WORDS = 4  # of a digest, int64


@dataclass(frozen=True)
class PackedState:
    """Nested dicts, lists and tuples of numbers, strings and tensors. text: all but the tensors, which are
    contiguous; names: of those, as "model.0.weight".
    """

    text: str
    names: list[str]
    tensors: list[Tensor]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> PackedState:
        """Packs a state. Raises ArgumentTypeError for what is nothing of the above."""
        names: list[str] = []
        tensors: list[Tensor] = []

        def encode(value: Any, name: str) -> Any:
            if value is None or isinstance(value, bool | int | float | str):
                return value
            if isinstance(value, Tensor):
                if not value.is_cpu or value.layout != torch.strided or value.is_quantized:
                    raise ArgumentTypeError("state", f"{name}: {value.type()}", "dense tensors on the CPU")
                names.append(name)
                tensors.append(value.detach().contiguous())
                dtype = str(value.dtype).removeprefix("torch.")
                return ["tensor", dtype, list(value.shape)]
            if isinstance(value, dict):
                pairs = [[key, encode(each, f"{name}.{key}".lstrip("."))] for key, each in value.items()]
                if all(isinstance(key, str | int) for key in value):
                    return ["counter" if isinstance(value, Counter) else "dict", pairs]
            if isinstance(value, list | tuple):
                kind = "tuple" if isinstance(value, tuple) else "list"
                return [kind, [encode(each, f"{name}.{place}") for place, each in enumerate(value)]]
            allowed = "numbers, strings, tensors, and dicts, lists and tuples of them"
            raise ArgumentTypeError("state", f"{name}: {type(value).__name__}", allowed)

        text = json.dumps(encode(dict(state), ""))
        return cls(text, names, tensors)

    @classmethod
    def room_for(cls, text: str) -> PackedState:
        """One of the same text, whose tensors have any values."""

        def make(dtype: str, shape: list[int]) -> Tensor:
            return torch.empty(shape, dtype=_dtype_of(dtype), device="cpu")

        with torch.inference_mode(False):  # of the communication thread: an optimizer could not change them
            return cls.of(cls._decode(json.loads(text), make))

    def unpack(self) -> dict[str, Any]:
        """The state."""
        tensors = iter(self.tensors)
        state: dict[str, Any] = self._decode(json.loads(self.text), lambda dtype, shape: next(tensors))
        return state

    @classmethod
    def _decode(cls, value: Any, tensor: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, *rest = value
        if kind == "tensor":
            return tensor(*rest)
        if kind in ("dict", "counter"):
            pairs = [(key, cls._decode(each, tensor)) for key, each in rest[0]]
            return _CONTAINERS[kind](dict(pairs))
        return _CONTAINERS[kind](cls._decode(each, tensor) for each in rest[0])

    def digests(self) -> Tensor:
        """SHA-256 of each tensor's bytes, [tensors, 4] int64, on the CPU."""

        def digest(tensor: Tensor) -> bytes:
            return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).digest()

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            raw = b"".join(pool.map(digest, self.tensors))
        found = torch.empty(len(self.tensors), _WORDS, dtype=torch.int64, device="cpu")
        if raw:
            found.view(-1).copy_(torch.frombuffer(bytearray(raw), dtype=torch.int64))
        return found


def check_objects(objects: Mapping[str, Any]) -> None:
    """Raises ArgumentTypeError for what has no state that can be taken over."""
    if not isinstance(objects, Mapping):
        raise ArgumentTypeError("state", type(objects).__name__, "a dict of objects by name")
    for name, each in objects.items():
        fits = isinstance(each, torch.Generator) or (
            callable(getattr(each, "state_dict", None)) and callable(getattr(each, "load_state_dict", None))
        )
        if not isinstance(name, str) or not fits:
            allowed = "objects with state_dict and load_state_dict, or torch.Generators, by name"
            raise ArgumentTypeError("state", f"{name}: {type(each).__name__}", allowed)


def optimizers_in(objects: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    """The optimizers among objects."""
    return [each for each in objects.values() if isinstance(each, torch.optim.Optimizer)]


def states_of(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The objects' states. Raises ArgumentError where one does not give its own."""
    found = {}
    for name, each in objects.items():
        try:
            found[name] = each.get_state() if isinstance(each, torch.Generator) else each.state_dict()
        except Exception as error:  # an object of the user's
            raise ArgumentError("state", f"{name}: {error}"[:300], "objects that have a state") from error
    return found


def load_states(objects: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Gives the objects these states, of as many objects of the same names."""
    for name, each in objects.items():
        if isinstance(each, torch.Generator):
            each.set_state(states[name])
        else:
            each.load_state_dict(states[name])


def differing(digests: Sequence[Tensor]) -> list[int]:
    """The tensors that are not the same everywhere, by several ranks' `digests`."""
    first = digests[0]
    different = torch.zeros(len(first), dtype=torch.bool, device="cpu")
    for other in digests[1:]:
        different |= (other != first).any(dim=1)
    found: list[int] = different.nonzero().flatten().tolist()
    return found


def _dtype_of(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ArgumentTypeError("state", repr(name)[:100], "a dtype of torch's")
    return found
