"""`info` says what is there; `check` says so when something does not hold. That it holds between processes
shows tests/test_container.py, in a wheel.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import deepep
from deepep.backends.cuda.memory import nvshmem4py
from deepep.cli import check as check_command
from deepep.cli import info, selftest
from deepep.runtime.backends import Backend


def deepep_command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deepep", *args], capture_output=True, text=True, timeout=120, check=False
    )


def in_this_process(command: Any, *args: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, args)


def test_info_names_everything_it_should() -> None:
    done = deepep_command("info", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["software"]["deepep"] == deepep.__version__
    assert shown["software"]["torch"] == torch.__version__
    assert "gloo" in shown["software"]["torch.distributed"]
    assert shown["extensions"]["deepep._core"].startswith("built, loads")
    assert set(shown["extensions"]) == {"deepep._core", "deepep._emulator", "deepep._cuda"}
    assert shown["backends"]["reference"].startswith("yes")
    assert all(
        value.startswith(("yes: ", "no: ")) for name, value in shown["backends"].items() if name.islower()
    )
    assert {"cuda", "emulator", "reference"} <= set(shown["backends"])
    assert shown["nvshmem"]["usable"].startswith(("yes: ", "no: not installed: ", "no: built without "))
    has_gpu = torch.cuda.is_available()
    assert ("GPU 0" in shown["cuda"]) == has_gpu


def test_what_is_missing_of_nvshmem_is_named_and_what_is_set_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions = {"nvidia-nvshmem-cu13": "3.4.5", "nvshmem4py-cu12": "0.4.1"}
    for module in (nvshmem4py, info):
        monkeypatch.setattr(module, "installed", lambda package: versions.get(package, ""))
    for name in [name for name in os.environ if name.startswith("NVSHMEM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NVSHMEM_IB_SL", "3")
    monkeypatch.setenv("NVSHMEM_IB_SLL", "3")
    shown = info.nvshmem()
    assert shown.pop("usable").startswith("no: not installed: nvshmem4py-cu13==0.4.1")
    assert shown == {
        **versions,
        "NVSHMEM_IB_SL": "3 (default 0)",
        "NVSHMEM_IB_SLL": "3 (not in docs/operations.md)",
    }
    versions.update({"nvshmem4py-cu13": "0.4.1", "nvidia-nvshmem-cu13": "3.6.5"})
    monkeypatch.setattr(nvshmem4py, "_has_module", lambda name: True)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepep._nvshmem" else found(name)
    )
    assert info.nvshmem()["usable"].startswith("no: built without NVSHMEM")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == "deepep._nvshmem" else found(name)
    )
    shown = info.nvshmem()
    assert shown["usable"] == "yes: nothing is missing"
    assert shown["nvidia-nvshmem-cu13"] == "3.6.5 (tested: 3.4.5)"


def test_info_for_people() -> None:
    done = in_this_process(info.command)
    assert done.exit_code == 0
    for word in ("software", "extensions", "cuda", "nvshmem", "backends", "reference"):
        assert word in done.output


def test_a_module_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("undefined symbol: x")

    with monkeypatch.context() as patched:
        patched.setattr("importlib.import_module", broken)
        assert info._extension("_core") == "built, does not load: undefined symbol: x"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert info._extension("_core") == "not built"


def test_check_holds_on_one_rank(world_of: Any) -> None:
    for name in selftest.CHECKS:
        world_of(1).run(selftest.run_check, name, "reference")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--backend", "nonsense"], "backend: got 'nonsense'"),
        (["--device", "tpu"], "device: got tpu"),
        (["--device", "cpu", "--backend", "cuda"], "backend cuda: "),
        pytest.param(
            ["--device", "cuda"],
            "sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_check_refuses_what_cannot_be(arguments: list[str], complaint: str) -> None:
    done = in_this_process(check_command.command, *arguments)
    assert done.exit_code == 2
    assert complaint in done.output


def a_backend(name: str, devices: tuple[str, ...], able: bool = True) -> Backend:
    def never(*_: Any) -> Any:
        raise AssertionError("nothing is made")

    return Backend(name, lambda: (able, "a reason"), never, never, device_types=devices)


KNOWN = [
    a_backend("cuda", ("cuda",)),
    a_backend("emulator", ("cpu",), able=False),
    a_backend("reference", ("cuda", "cpu")),
]


@pytest.mark.parametrize(
    ("has_gpu", "backend", "device", "tested", "absent"),
    [
        (True, None, None, ["cuda cuda", "reference cuda", "reference cpu"], ["emulator cpu"]),
        (False, None, None, ["reference cpu"], ["emulator cpu"]),
        (True, "reference", None, ["reference cuda", "reference cpu"], []),
        (True, None, "cuda", ["cuda cuda", "reference cuda"], []),
        (True, None, "cpu", ["reference cpu"], ["emulator cpu"]),
        (True, "cuda", "cuda", ["cuda cuda"], []),
    ],
)
def test_check_tests_gpus_first_and_every_backend_that_runs_here(
    has_gpu: bool, backend: str | None, device: str | None, tested: list[str], absent: list[str]
) -> None:
    tests, others = check_command.planned(KNOWN, has_gpu, backend, device)
    assert [f"{test.backend} {test.device}" for test in tests] == tested
    assert [f"{test.backend} {test.device}" for test, _ in others] == absent
    assert {why for _, why in others} <= {"a reason"}


def test_a_check_that_fails_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """One check that raises on one rank, one that its backend has not got."""

    def fails(site: selftest.Site) -> str:
        if site.rank == 1:
            raise selftest.CheckFailed("recv_x: 3 of 64 bytes differ")
        return "fine here"

    def absent(site: selftest.Site) -> str:
        raise NotImplementedError

    def run_one(context: Any, name: str, backend: str | None) -> tuple[str, float]:
        site = selftest.Site(type("B", (), {"rank": context.rank})(), context.device, [], [], [], [])
        return {"fails": fails, "absent": absent, "holds": lambda site: "well"}[name](site), 0.0

    monkeypatch.setattr(selftest, "CHECKS", {"fails": fails, "absent": absent, "holds": fails})
    monkeypatch.setattr(selftest, "run_check", run_one)
    only = ("--backend", "reference", "--device", "cpu", "--no-facts")
    result = in_this_process(check_command.command, "--ranks", "2", *only)
    assert result.exit_code == 1
    assert "rank 1 raised CheckFailed: recv_x: 3 of 64 bytes differ" in result.output
    assert "1 of 3 hold, 1 missing" in result.output


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("dispatch: BF16 rows, indices and weights, in order", "x"),
        ("combine: sum over ranks, biases, weights sent home", "combined"),
        ("low latency: FP8 dispatch with a hook, weighted combine", "low latency"),
        ("layers: gradients of dispatch and combine", "gradients"),
    ],
)
def test_every_check_has_teeth(world_of: Any, name: str, spoil: str) -> None:
    """With one bit changed in what the library returns, the check fails."""

    def body(context: Any) -> None:
        import deepep.nn.exchange as exchange
        from deepep import Buffer

        def flipped(real: Any) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                first, *rest = real(*args, **kwargs)
                if spoil == "low latency":
                    rest[0] = rest[0] + 1  # the counts
                elif isinstance(first, torch.Tensor) and first.numel():
                    first = first.clone()
                    first.view(torch.int16)[0, 0] ^= 1
                return (first, *rest)

            return wrapped

        target, attribute = {
            "x": (Buffer, "dispatch"),
            "combined": (Buffer, "combine"),
            "low latency": (Buffer, "low_latency_dispatch"),
            "gradients": (exchange, "_dispatch_backward"),
        }[spoil]
        real = getattr(target, attribute)
        setattr(target, attribute, flipped(real))
        try:
            with pytest.raises(selftest.CheckFailed):
                selftest.run_check(context, name, None)
        finally:
            setattr(target, attribute, real)

    world_of(1).run(body)
