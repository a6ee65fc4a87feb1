"""docs/moving_from_deepep.md: its code runs, on two ranks, and it names every argument of both interfaces."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepep import Buffer, ElasticBuffer
from deepep.sim import World

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "moving_from_deepep.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_its_code_runs(fresh_world: Callable[[int], World]) -> None:
    def body(ctx: Any, source: str) -> None:
        exec(compile(source, "moving_from_deepep.md", "exec"), {})

    assert len(BLOCKS) >= 5
    fresh_world(2).run(body, "".join(BLOCKS))


@pytest.mark.parametrize(
    "method",
    [ElasticBuffer, ElasticBuffer.dispatch, Buffer.dispatch, Buffer.combine, Buffer],
    ids=lambda method: method.__qualname__,
)
def test_it_names_every_argument(method: Any) -> None:
    own = {"self", "x", "group", "backend", "device", "use_fabric", "timeout", "config"}
    takes = inspect.signature(Buffer.dispatch).parameters
    layout = {name for name in takes if name.startswith("num_tokens_per")}
    asked = [name for name in inspect.signature(method).parameters if name not in own | layout]
    assert [name for name in asked if not re.search(rf"\b{name}\b", PAGE)] == []
