"""Names that clients import from `deep_ep.utils.event`."""

from deepep.events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
