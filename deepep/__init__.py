"""deepep: expert-parallel communication for Mixture-of-Experts models."""

import deepep.interrupt  # noqa: F401  before torch is imported

# isort: split

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from deepep.parallel import (
        DistributedDataParallel,
        ElasticSampler,
        ParallelConfig,
        clip_grad_norm_,
        configured,
        get_config,
        set_config,
    )
    from deepep.parallel.optimize import optimize

_PARALLEL = frozenset(
    {
        "DistributedDataParallel",
        "ElasticSampler",
        "ParallelConfig",
        "clip_grad_norm_",
        "configured",
        "get_config",
        "optimize",
        "set_config",
    }
)
"""Names of deepep.parallel, which is imported when one of them is first asked for."""


def __getattr__(name: str) -> Any:
    if name in _PARALLEL:
        from deepep import parallel

        return getattr(parallel, name)
    raise AttributeError(f"module 'deepep' has no attribute {name!r}")


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
    "DistributedDataParallel",
    "EPHandle",
    "ElasticBuffer",
    "ElasticSampler",
    "EventError",
    "EventHandle",
    "EventOverlap",
    "FaultRecord",
    "HandleError",
    "HookPendingError",
    "LayoutError",
    "MismatchError",
    "ModeError",
    "ParallelConfig",
    "PeerTimeoutError",
    "RangeError",
    "ShapeError",
    "__version__",
    "clip_grad_norm_",
    "configured",
    "get_config",
    "install_as_deep_ep",
    "optimize",
    "set_config",
    "topk_idx_t",
]
