"""DeepEP itself, where it is installed: what it needs to be measured by the same calls."""

from __future__ import annotations

import importlib
from typing import Any

import deepep
from deepep.backends.cuda.memory.ipc import gather_over

#: rank counts that its calls inside one node are built for
NODE_RANKS = (2, 4, 8)


def open_deep_ep(group: Any, hidden: int, most_sms: int) -> tuple[Any, str]:
    """(its Buffer for rows of `hidden` bf16 values, or None; why not). Collective, alike on all ranks."""
    kind, why = _agreed_type(group)
    if why:
        return None, why
    kind.set_num_sms(most_sms // 2 * 2)
    ranks = group.size()
    configs = (kind.get_dispatch_config(ranks), kind.get_combine_config(ranks))
    size = max(config.get_nvl_buffer_size_hint(hidden * 2, ranks) for config in configs)
    return kind(group, size, 0), ""


def open_low_latency_deep_ep(group: Any, tokens: int, hidden: int, experts: int) -> tuple[Any, str]:
    """The same for its low-latency calls, of up to so many tokens a rank."""
    kind, why = _agreed_type(group)
    if why:
        return None, why
    ranks = group.size()
    size = kind.get_low_latency_rdma_size_hint(tokens, hidden, ranks, experts)
    return kind(group, 0, size, low_latency_mode=True, num_qps_per_rank=max(1, experts // ranks)), ""


def open_elastic_deep_ep(group: Any, sizes: dict[str, int]) -> tuple[Any, str]:
    """The same of V2: its ElasticBuffer for calls of `sizes`, by the names of its constructor's arguments."""
    kind, why = _agreed_type(group, "ElasticBuffer")
    return (None, why) if why else (kind(group, **sizes), "")


def _agreed_type(group: Any, name: str = "Buffer") -> tuple[Any, str]:
    """Its class of this name where every rank has it, or why not. Collective."""
    kind, why = _buffer_type(group.size(), name)
    reasons = [reason.decode() for reason in gather_over(group)(why.encode()) if reason]
    return (None, reasons[0]) if kind is None or reasons else (kind, "")


def _buffer_type(ranks: int, name: str) -> tuple[Any, str]:
    try:
        deep_ep = importlib.import_module("deep_ep")
    except ModuleNotFoundError as error:
        return None, f"deep_ep: {error.name} is not installed"
    except ImportError as error:
        return None, f"deep_ep cannot be imported: {error}"
    if deep_ep is deepep:
        return None, "deep_ep is this library here (install_as_deep_ep)"
    if not hasattr(deep_ep, name):
        return None, f"deep_ep: this version has no {name}"
    if ranks not in NODE_RANKS:
        return None, f"deep_ep: not for {ranks} ranks"
    return getattr(deep_ep, name), ""
