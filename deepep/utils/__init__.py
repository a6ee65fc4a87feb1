"""Names that clients import from `deep_ep.utils`."""

from __future__ import annotations

from deepep.events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap", "check_nvlink_connections"]


def check_nvlink_connections(group: object) -> None:
    """V1's check of PCIe boards for NVLink bridges.

    Here the engine asks the driver; there is nothing to check.
    """
