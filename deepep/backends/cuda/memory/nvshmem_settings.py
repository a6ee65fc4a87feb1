"""Variables of NVSHMEM 3.4.5 that matter to ranks on several hosts: docs/operations.md says what each is for.

Names and defaults are those of its own table of variables; tests look the names up in its libraries.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

#: libraries of the wheel, by the names used below
LIBRARIES = {
    "host": "libnvshmem_host.so.3",
    "uid": "nvshmem_bootstrap_uid.so.3",
    **{name: f"nvshmem_transport_{name}.so.3" for name in ("ibrc", "ibdevx", "ibgda", "libfabric")},
}
_IB = ("ibrc", "ibdevx", "ibgda")
_PROXY = ("ibrc", "ibdevx")


@dataclass(frozen=True)
class Setting:
    """default: as text. libraries: those that read it."""

    default: str
    libraries: tuple[str, ...]


SETTINGS: Mapping[str, Setting] = {
    "NVSHMEM_REMOTE_TRANSPORT": Setting("ibrc", ("host",)),
    "NVSHMEM_IB_SL": Setting("0", _IB),
    "NVSHMEM_IB_TRAFFIC_CLASS": Setting("0", _IB),
    "NVSHMEM_IB_GID_INDEX": Setting("-1", _IB),
    "NVSHMEM_IB_ROCE_VERSION_NUM": Setting("2", _IB),
    "NVSHMEM_IB_ADDR_FAMILY": Setting("AF_INET", _IB),
    "NVSHMEM_IB_ADDR_RANGE": Setting("::/0", _IB),
    "NVSHMEM_IB_ENABLE_RELAXED_ORDERING": Setting("true", _IB),
    "NVSHMEM_IB_NUM_RC_PER_DEVICE": Setting("1", _PROXY),
    "NVSHMEM_QP_DEPTH": Setting("1024", _IB),
    "NVSHMEM_SRQ_DEPTH": Setting("16384", _IB),
    "NVSHMEM_HCA_LIST": Setting("", _IB),
    "NVSHMEM_HCA_PE_MAPPING": Setting("", _IB),
    "NVSHMEM_HCA_PREFIX": Setting("mlx5", _IB),
    "NVSHMEM_ENABLE_NIC_PE_MAPPING": Setting("false", ("host",)),
    "NVSHMEM_IB_DISABLE_DMABUF": Setting("false", _IB),
    "NVSHMEM_DISABLE_DATA_DIRECT": Setting("false", _IB),
    "NVSHMEM_DISABLE_GDRCOPY": Setting("false", _IB),
    "NVSHMEM_IB_ENABLE_IBGDA": Setting("false", ("host",)),
    "NVSHMEM_IBGDA_NIC_HANDLER": Setting("auto", ("ibgda",)),
    "NVSHMEM_IBGDA_NUM_RC_PER_PE": Setting("2", ("ibgda",)),
    "NVSHMEM_IBGDA_RC_MAP_BY": Setting("cta", ("ibgda",)),
    "NVSHMEM_IBGDA_NUM_REQUESTS_IN_BATCH": Setting("32", ("ibgda",)),
    "NVSHMEM_IBGDA_ENABLE_MULTI_PORT": Setting("false", ("ibgda",)),
    "NVSHMEM_IBGDA_FORCE_NIC_BUF_MEMTYPE": Setting("gpumem", ("ibgda",)),
    "NVSHMEM_LIBFABRIC_PROVIDER": Setting("cxi", ("libfabric",)),
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": Setting("", ("uid",)),
    "NVSHMEM_SYMMETRIC_SIZE": Setting("1073741824", ("host",)),
    "NVSHMEM_DISABLE_P2P": Setting("false", ("host",)),
    "NVSHMEM_DISABLE_MNNVL": Setting("false", ("host",)),
    "NVSHMEM_DISABLE_NVLS": Setting("false", ("host",)),
    "NVSHMEM_DISABLE_CUDA_VMM": Setting("false", ("host",)),
    "NVSHMEM_DEBUG": Setting("", ("host",)),
}


def in_force() -> dict[str, str]:
    """Variables of NVSHMEM that are set, with their defaults."""
    found = {}
    for name, value in sorted(os.environ.items()):
        if name.startswith("NVSHMEM_"):
            known = SETTINGS.get(name)
            about = f"default {known.default or 'none'}" if known else "not in docs/operations.md"
            found[name] = f"{value} ({about})"
    return found
