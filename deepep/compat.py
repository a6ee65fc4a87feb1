"""install_as_deep_ep: existing clients of DeepEP run on this library unchanged."""

from __future__ import annotations

import sys
from types import ModuleType


def install_as_deep_ep() -> None:
    """Make `import deep_ep`, `deep_ep.utils`, `deep_ep.buffer` and `deep_ep_cpp` give this library.

    Call it before the client is imported. Raises RuntimeError if another `deep_ep` has been imported already.
    """
    import deepep
    from deepep import utils
    from deepep.api import buffer

    loaded = sys.modules.get("deep_ep")
    if loaded is not None and loaded is not deepep:
        where = getattr(loaded, "__file__", None) or "elsewhere"
        raise RuntimeError(f"deep_ep has been imported from {where}: install this library first")
    cpp = ModuleType("deep_ep_cpp", "DeepEP's extension module, as far as clients import from it.")
    for name in ("Config", "EventHandle", "topk_idx_t"):
        setattr(cpp, name, getattr(deepep, name))
    cpp.__dict__["is_sm90_compiled"] = deepep.Buffer.is_sm90_compiled
    cpp.__dict__["get_low_latency_rdma_size_hint"] = deepep.Buffer.get_low_latency_rdma_size_hint
    vars(deepep)["buffer"] = buffer  # `import deep_ep.buffer` finds the module and sets nothing on its parent
    sys.modules.update(
        {"deep_ep": deepep, "deep_ep.buffer": buffer, "deep_ep.utils": utils, "deep_ep_cpp": cpp}
    )
