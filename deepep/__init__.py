"""deepep: expert-parallel communication for Mixture-of-Experts models."""

import torch

from deepep.api.buffer import Buffer
from deepep.api.elastic import ElasticBuffer
from deepep.api.ep_handle import EPHandle
from deepep.compat import install_as_deep_ep
from deepep.config import Config
from deepep.errors import (
    ArgumentError,
    ArgumentTypeError,
    CapacityError,
    DeepEPError,
    DestroyedError,
    DeviceError,
    EventError,
    FaultRecord,
    HandleError,
    HookPendingError,
    LayoutError,
    MismatchError,
    ModeError,
    PeerTimeoutError,
    RangeError,
    ShapeError,
)
from deepep.events import EventHandle, EventOverlap
from deepep.version import __version__

topk_idx_t = torch.int64
"""The dtype clients should give top-k indices; int32 is taken just as well."""

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Buffer",
    "CapacityError",
    "Config",
    "DeepEPError",
    "DestroyedError",
    "DeviceError",
    "EPHandle",
    "ElasticBuffer",
    "EventError",
    "EventHandle",
    "EventOverlap",
    "FaultRecord",
    "HandleError",
    "HookPendingError",
    "LayoutError",
    "MismatchError",
    "ModeError",
    "PeerTimeoutError",
    "RangeError",
    "ShapeError",
    "__version__",
    "install_as_deep_ep",
    "topk_idx_t",
]
