"""deepep: expert-parallel communication for Mixture-of-Experts models."""

from deepep.version import __version__

__all__ = ["__version__"]
