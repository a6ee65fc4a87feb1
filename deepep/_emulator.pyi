"""deepep._emulator as Python sees it (csrc/bindings/emulator.cpp and domain.cpp)."""

from typing import Any

def __getattr__(name: str) -> Any: ...
