"""deepep._emulator as Python sees it (csrc/emulator/bindings.cpp and domain.cpp)."""

from typing import Any

def __getattr__(name: str) -> Any: ...
