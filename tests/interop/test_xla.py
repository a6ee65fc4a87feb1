"""XLA's foreign functions: layout rules and the codec inside a jit, built by a compiler and jax's headers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepep import _core

jax = pytest.importorskip("jax", reason="jax is not installed")
ROOT = Path(__file__).parents[2]
CALLS = ("dispatch_layout", "encode_gradients", "decode_gradients")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Registers the calls of csrc/ffi/xla.cpp."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    made = tmp_path_factory.mktemp("xla") / "libdeepep_xla.so"
    rules = [ROOT / "csrc" / "layout" / "rules" / f"{name}.cpp" for name in ("gradients", "layout")]
    include = [f"-I{ROOT / 'csrc'}", f"-I{jax.ffi.include_dir()}"]
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared"]
    sources = [ROOT / "csrc" / "ffi" / "xla.cpp", *rules]
    subprocess.run([compiler, *flags, *include, *sources, "-o", made], check=True)
    symbols = ctypes.cdll.LoadLibrary(str(made))
    for name in CALLS:
        handler = jax.ffi.pycapsule(getattr(symbols, f"deepep_{name}"))
        jax.ffi.register_ffi_target(f"deepep_{name}", handler, platform="cpu")
    return made


def result(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_layouts_inside_a_jit(library: Path) -> None:
    topk_idx = np.array([[0, 5], [-1, 3], [3, 3]], dtype=np.int32)
    shapes = [result((2,), np.int32), result((6,), np.int32), result((3, 2), np.bool_)]
    call = jax.jit(lambda entries: jax.ffi.ffi_call("deepep_dispatch_layout", shapes)(entries))
    ranks, experts, marks = (np.asarray(array) for array in call(topk_idx))
    wanted = np.zeros(2, np.int32), np.zeros(6, np.int32), np.zeros((3, 2), bool)
    _core.dispatch_layout(topk_idx, 6, 2, 2, wanted[0], np.zeros(1, np.int32), wanted[1], wanted[2])
    assert [ranks.tolist(), experts.tolist(), marks.tolist()] == [array.tolist() for array in wanted]
    with pytest.raises(Exception, match="topk_idx"):
        jax.block_until_ready(call(np.full((3, 2), 6, np.int32)))


def test_codec_inside_a_jit(library: Path) -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(0)).numpy()
    size = _core.gradient_message_bytes("fp8", 300)

    def both(given: Any) -> Any:
        encode = jax.ffi.ffi_call("deepep_encode_gradients", result((size,), np.uint8))
        decode = jax.ffi.ffi_call("deepep_decode_gradients", result((300,), np.float32))
        message = encode(given, format="fp8")
        return message, decode(message, format="fp8")

    message, decoded = (np.asarray(array) for array in jax.jit(both)(values))
    wanted, back = np.zeros(size, np.uint8), np.zeros(300, np.float32)
    _core.encode_gradients("fp8", values, wanted, True, (0, 0), 0)
    _core.decode_gradients("fp8", wanted, back, False)
    assert np.array_equal(message, wanted)
    assert np.array_equal(decoded, back)
    encode = jax.ffi.ffi_call("deepep_encode_gradients", result((size,), np.uint8))
    with pytest.raises(Exception, match="303 bytes; allowed: 600"):
        jax.block_until_ready(encode(values, format="bf16"))
