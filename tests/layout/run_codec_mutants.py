"""Builds the gradient codec once for each defect below and compares it with the oracle until it is caught.

    python tests/layout/run_codec_mutants.py

Prints a line a defect; exits with 1 if one is not caught, or the codec as it is does not hold.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from deepep.reference import gradient_codec as oracle
from deepep.sim.cases.gradients import draw_gradient

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FILES = {"gradient_codec.hpp": "layout/gradient_codec.hpp", "gradients.cpp": "layout/rules/gradients.cpp"}
FORMATS = ("fp8", "fp16", "bf16")
CASES = 400
CLONES = '__attribute__((optimize("O3"), target_clones("avx2", "default")))'
C_INTERFACE = """
#include "layout/rules/gradients.hpp"
using namespace deepep::host;
extern "C" {
__attribute__((visibility("default"))) void enc(int f, const float* v, long n, int nearest, unsigned a,
                                                unsigned b, unsigned at, unsigned char* m) {
  encode(GradientFormat(f), v, n, {bool(nearest), a, b, at}, m);
}
__attribute__((visibility("default"))) void dec(int f, const unsigned char* m, long n, int add, float* v) {
  decode(GradientFormat(f), m, n, add, v);
}
__attribute__((visibility("default"))) void fix(const float* v, long n, int h, const unsigned char* all,
                                                unsigned char* e, int* q, float d, float* out) {
  block_exponents(v, n, e);
  encode_fixed(v, n, all, h, q);
  decode_fixed(q, n, all, h, d, out);
}
}
"""

#: name, file, text that occurs once, what replaces it
MUTANTS = [
    (
        "no scale of a last, smaller block",
        "gradients.cpp",
        "first < count;",
        "first + kGradientBlock <= count;",
    ),
    ("scale too small by half", "gradient_codec.hpp", "is_above, 1)", "1 - is_above, 1)"),
    ("448 taken for too large", "gradient_codec.hpp", "> Format::kTopMantissa", ">= Format::kTopMantissa"),
    ("infinity scaled", "gradient_codec.hpp", "largest >= kFloatInfinity", "largest > kFloatInfinity"),
    ("ties away from zero", "gradient_codec.hpp", " + (magnitude >> kCut & 1)) >> kCut)", " + 1) >> kCut)"),
    ("cut instead of rounded", "gradient_codec.hpp", "((1u << (kCut - 1)) - 1)", "0"),
    ("sign lost", "gradient_codec.hpp", "return sign | select(", "return select("),
    (
        "small values flushed",
        "gradient_codec.hpp",
        "select(magnitude < kMinNormal, small,",
        "select(magnitude < kMinNormal, 0,",
    ),
    (
        "small values restored as normal ones",
        "gradient_codec.hpp",
        "magnitude < 1u << Format::kMantissa",
        "magnitude < 1u",
    ),
    ("bf16 NaN rounded like a number", "gradient_codec.hpp", "select(is_nan,", "select(false,"),
    ("to nearest where dice are asked for", "gradients.cpp", "if (rounding.is_nearest)", "if (true)"),
    (
        "dice by the place in the message",
        "gradients.cpp",
        "rounding.first_index + uint32_t(first)",
        "uint32_t(first)",
    ),
    (
        "dice by the place in the block",
        "gradients.cpp",
        "rounding.first_index + uint32_t(first)",
        "rounding.first_index",
    ),
    ("one word of the key unused", "gradient_codec.hpp", "0x85EBCA6Bu ^ second", "0x85EBCA6Bu"),
    (
        "added where it is to be written",
        "gradients.cpp",
        "kIsAdded ? into[i] + value : value",
        "into[i] + value",
    ),
    (
        "NaN blocks read as zero",
        "gradients.cpp",
        "scale == kNotFinite ? float_of(kFloatNan)",
        "scale == kNotFinite ? 0.0f",
    ),
    (
        "last element of a block left out",
        "gradients.cpp",
        "for (int64_t i = first; i < first + length; ++i) integers[i] =",
        "for (int64_t i = first; i + 1 < first + length; ++i) integers[i] =",
    ),
    ("no headroom", "gradient_codec.hpp", "156 - headroom - int(exponent)", "156 - int(exponent)"),
    (
        "scale in one factor",
        "gradient_codec.hpp",
        "return power_of_two(shift() - (shift() >> 1));",
        "return power_of_two(0);",
    ),
    (
        "fixed point cut instead of rounded",
        "gradient_codec.hpp",
        "const float rounded = (magnitude + kUnit) - kUnit;",
        "const float rounded = float(int32_t(magnitude));",
    ),
    ("not divided", "gradients.cpp", "* once * again / divisor", "* once * again"),
    (
        "fixed point of a NaN block restored",
        "gradients.cpp",
        "is_finite ? fixed.half_unit() : float_of(kFloatNan)",
        "is_finite ? fixed.half_unit() : 0.0f",
    ),
]


def build(folder: Path, file: str = "", old: str = "", new: str = "") -> Path:
    """A shared library of the codec with `old` replaced in one file."""
    for name, path in FILES.items():
        text = (CSRC / path).read_text()
        if name == file:
            if text.count(old) != 1:
                raise SystemExit(f"{old!r} occurs {text.count(old)} times in {name}")
            text = text.replace(old, new)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text.replace(CLONES, ""))  # which take long to compile
    (folder / "c.cpp").write_text(C_INTERFACE)
    library = folder / "codec.so"
    flags = ["-std=c++20", "-O0", "-fPIC", "-w", "-shared", f"-I{folder}", f"-I{CSRC}"]
    sources = [str(folder / FILES["gradients.cpp"]), str(folder / "c.cpp")]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, *sources, "-o", str(library)], check=True)
    return library


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    nan = got.isnan()
    return torch.equal(nan, want.isnan()) and torch.equal(
        got[~nan].view(torch.int32), want[~nan].view(torch.int32)
    )


def first_difference(library: Path) -> int | None:
    """The number of the first case in which the library and the oracle differ; None: in none."""
    codec = ctypes.CDLL(str(library))
    for case in range(CASES):
        rng = np.random.default_rng([7, case])
        count, first = int(rng.integers(0, 400)), int(rng.integers(0, 1000))
        values, others = draw_gradient(rng, count), draw_gradient(rng, count)
        for number, form in enumerate(FORMATS):
            for key in (None, oracle.rounding_key(case)):
                want = oracle.encode(form, values, key, first)
                got = torch.full_like(want, 0xAA)
                a, b = key or (0, 0)
                codec.enc(
                    number, address(values), ctypes.c_long(count), key is None, a, b, first, address(got)
                )
                restored = torch.full_like(values, 3.0)
                codec.dec(number, address(want), ctypes.c_long(count), 0, address(restored))
                added = torch.full_like(values, 3.0)
                codec.dec(number, address(want), ctypes.c_long(count), 1, address(added))
                expected = oracle.decode(form, want, count)
                if not (torch.equal(got, want) and same(restored, expected) and same(added, expected + 3.0)):
                    return case
        exponents = torch.maximum(oracle.block_exponents(values), oracle.block_exponents(others))
        own, integers = torch.empty_like(exponents), torch.full((count,), 77, dtype=torch.int32)
        out, headroom = torch.empty(count), case % 9
        codec.fix(
            *(address(values), ctypes.c_long(count), headroom, address(exponents), address(own)),
            *(address(integers), ctypes.c_float(3.0), address(out)),
        )
        want = oracle.encode_fixed(values, exponents, headroom)
        restored = oracle.decode_fixed(want, exponents, headroom, 3.0)
        fits = torch.equal(own, oracle.block_exponents(values)) and torch.equal(integers, want)
        if not (fits and same(out, restored)):
            return case
    return None


def main() -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [("as it is", "", "", ""), *MUTANTS]
        folders = [Path(folder) / str(number) for number in range(len(jobs))]
        libraries = pool.map(lambda job: build(job[0], *job[1][1:]), zip(folders, jobs, strict=True))
        for (name, *_), library in zip(jobs, libraries, strict=True):
            found = first_difference(library)
            missed += (found is None) != (name == "as it is")
            print(f"{name:45} {'holds' if found is None else f'caught in case {found}'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
