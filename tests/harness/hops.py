"""Hops: the functions of this library that are entered between a public method and its binding call.

Run as a program, it counts them on stubs (harness.stub_cuda) and prints them as JSON:
{operation: [[module, function, lines of code], ...]}.

What counts: every distinct function that is written in deepep/, reference/ or sim/ and entered between the
call of the public method and the launch: methods, properties, closures and lambdas included. Not
comprehensions, whose frames Python 3.12 does without, nor constructors that dataclasses generate. Each call
is counted when it has been made before, with tensors of the same shapes and nothing to wait for.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from harness import stub_cuda

TOKENS, HIDDEN, EXPERTS, TOPK = 128, 256, 4, 2
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


class Stopped(Exception):
    """The call has come to its launch."""


def entered(call: Callable[[], object], stops_at: set[str], roots: tuple[str, ...]) -> list[CodeType]:
    """The library's functions that `call` enters before a function of the stubs, or one of the library,
    whose name is in `stops_at`.
    """
    found: dict[CodeType, None] = {}
    launched = False

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal launched
        code = frame.f_code
        if event != "call" or launched:
            return
        if code.co_qualname in stops_at:
            launched = True
        elif code.co_filename.startswith(roots) and not code.co_name.startswith(
            ("<listcomp", "<genexpr", "<dict")
        ):
            found[code] = None

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert launched, f"nothing of {sorted(stops_at)} was reached"
    return list(found)


def code_lines(code: CodeType) -> int:
    """Lines of a function without its docstring, comments and blank lines; its signature counts."""
    lines, _ = inspect.getsourcelines(code)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    node = next(
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    )
    skipped: set[int] = set()
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        docstring = node.body[0]
        skipped = set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    end = node.end_lineno or len(lines)
    numbered = list(enumerate(lines, start=1))[:end]
    return sum(
        1 for number, line in numbered if number not in skipped and line.strip() and line.strip()[0] != "#"
    )


def count() -> dict[str, list[tuple[str, str, int]]]:
    """By operation: module, function and lines of all that is entered."""
    stub_cuda.install(TOKENS)
    import deepep

    package = Path(deepep.__file__).resolve().parent
    roots = tuple(str(package.parent / name) + os.sep for name in ("deepep", "reference", "sim"))
    with stub_cuda.stub_buffer(reduction="expert_rank") as buffer:
        x = torch.zeros((TOKENS, HIDDEN), dtype=torch.bfloat16)
        topk_idx = torch.zeros((TOKENS, TOPK), dtype=torch.int64)
        weights = torch.ones((TOKENS, TOPK))

        def dispatch() -> Any:
            return buffer.dispatch(
                x,
                num_tokens_per_rank=layout[0],
                is_token_in_rank=layout[3],
                num_tokens_per_expert=layout[2],
                topk_idx=topk_idx,
                topk_weights=weights,
            )

        def dispatch_topk() -> Any:
            return buffer.dispatch(x, topk_idx=topk_idx, topk_weights=weights, num_experts=EXPERTS)

        layout = buffer.get_dispatch_layout(topk_idx, EXPERTS)
        calls: dict[str, tuple[Callable[[], object], str]] = {}
        for _ in range(3):  # memory is made, what is kept from call to call settles
            rows, *_, handle, _ = dispatch()
            dispatch_topk()
            buffer.dispatch(x, handle=handle)
            buffer.combine(rows, handle)
            slots, _, decoded, _, _ = buffer.low_latency_dispatch(x, topk_idx, TOKENS, EXPERTS, use_fp8=False)
            buffer.low_latency_combine(slots, topk_idx, weights, decoded)
        for _ in range(4):  # along one handle
            buffer.dispatch(x, handle=handle)
        calls["dispatch"] = dispatch, "Domain.dispatch"
        calls["dispatch by top-k"] = dispatch_topk, "Domain.dispatch_topk"
        calls["cached dispatch"] = lambda: buffer.dispatch(x, handle=handle), "Domain.dispatch_cached"
        calls["combine"] = lambda: buffer.combine(rows, handle), "Domain.combine"
        calls["low-latency dispatch"] = (
            lambda: buffer.low_latency_dispatch(x, topk_idx, TOKENS, EXPERTS, use_fp8=False),
            "LowLatencyDomain.dispatch",
        )
        calls["low-latency combine"] = (
            lambda: buffer.low_latency_combine(slots, topk_idx, weights, decoded),
            "LowLatencyDomain.combine",
        )
        counted = {}
        for name, (call, stop) in calls.items():
            codes = entered(call, {stop}, roots)
            counted[name] = [
                (str(Path(code.co_filename).relative_to(package.parent)), code.co_qualname, code_lines(code))
                for code in codes
                if code.co_filename != __file__
            ]
        return counted


if __name__ == "__main__":
    print(json.dumps(count()))
