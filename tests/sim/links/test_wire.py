"""The wire without a NIC: what it promises on verbs, what it withholds on demand, and clean ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepep.sim.links import loopverbs
from deepep.sim.links.hosts import WireOptions, run_on_wire

pytestmark = pytest.mark.skipif(loopverbs.why_not() != "", reason=loopverbs.why_not() or "it can be built")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probe") / "verbs_probe"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", f"-I{loopverbs.SOURCES.parent}"]
    command += [str(HERE / "verbs_probe.cpp"), str(loopverbs.library()), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def rounds(probe: Path, folder: Path, wire: WireOptions, number: int, size: int, signal: str):
    folder.mkdir()
    lines: list[tuple[int, str]] = []
    command = [str(probe), str(folder), str(number), str(size), signal]
    result = run_on_wire(wire, command, lambda rank, line: lines.append((rank, line)))
    return result, lines


PAIR = WireOptions(ranks=2, ranks_per_domain=1, deadline=60.0)


@pytest.mark.parametrize("size", [8, 4096, 3 << 20])
def test_what_is_signalled_is_there_and_counted(probe: Path, tmp_path: Path, size: int) -> None:
    result, lines = rounds(probe, tmp_path / "told", PAIR, 20, size, "add")
    assert result.statuses == [0, 0], lines
    assert lines == [(1, "wrong 0")]
    sent = result.traffic[0, 1]
    assert sent.bytes == 20 * size
    assert sent.atomics == 20
    assert sent.requests == 40
    assert result.traffic[1, 0].bytes == 0
    assert result.traffic[1, 0].atomics == 20


def test_a_set_signal_does_not_carry_its_data_in_weak_order_and_an_add_does(
    probe: Path, tmp_path: Path
) -> None:
    weak = WireOptions(ranks=2, ranks_per_domain=1, weak=True, delay_us=3000, deadline=60.0)
    wrong = {}
    for signal in ("add", "set"):
        result, lines = rounds(probe, tmp_path / signal, weak, 40, 1024, signal)
        assert result.statuses == [0, 0], lines
        assert result.traffic[0, 1].late > 0
        wrong[signal] = int(lines[0][1].removeprefix("wrong "))
    assert wrong["add"] == 0
    assert wrong["set"] > 0


def test_a_nic_that_falls_silent_leaves_the_other_waiting_and_alive(
    probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERBS_PROBE_SECONDS", "3")
    dying = WireOptions(ranks=2, ranks_per_domain=1, silent={1: 5}, deadline=60.0)
    result, lines = rounds(probe, tmp_path / "told", dying, 20, 64, "add")
    assert result.statuses == [3, 3], lines  # each ended by its own deadline
    assert result.traffic[1, 0].requests == 5


WHERE = """
import os, socket
names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "WORLD_SIZE")
print(socket.gethostname(), *(os.environ[name] for name in names))
"""


def test_ranks_are_on_hosts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[int, str] = {}
    result = run_on_wire(
        WireOptions(ranks=3, ranks_per_domain=2, deadline=60.0),
        [sys.executable, "-c", WHERE],
        said.__setitem__,
    )
    assert result.succeeded
    assert said == {0: "domain-0 0 0 2 0 3", 1: "domain-0 1 1 2 0 3", 2: "domain-1 2 0 1 1 3"}
    assert socket.gethostname() != "domain-0"


SLEEPS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
if os.environ["RANK"] == "1":
    sys.exit(7)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("deadline", [60.0, 15.0])
def test_nothing_is_left_of_ranks_that_do_not_end(deadline: float) -> None:
    before = set(Path("/dev/shm").glob("loopverbs.*"))
    pids: list[int] = []
    wire = WireOptions(ranks=2, ranks_per_domain=1, deadline=deadline, grace=0.2)
    result = run_on_wire(wire, [sys.executable, "-c", SLEEPS], lambda rank, line: pids.append(int(line)))
    assert result.statuses == [None, 7]
    assert not result.succeeded
    assert len(pids) == 2
    end = time.monotonic() + 10.0
    while not all(map(gone, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert all(map(gone, pids))
    assert set(Path("/dev/shm").glob("loopverbs.*")) <= before


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"ranks": 0}, "ranks: got 0"),
        ({"ranks": 17}, "ranks: got 17"),
        ({"ranks_per_domain": 0}, "ranks_per_domain: got 0"),
        ({"silent": {2: 1}}, "silent: got 2:1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run_on_wire(WireOptions(**{"ranks": 2, "ranks_per_domain": 1, **wrong}), ["true"])


@pytest.mark.parametrize("exists", [False, True])
def test_a_command_that_cannot_be_executed_is_misuse(tmp_path: Path, exists: bool) -> None:
    program = tmp_path / "program"
    if exists:
        program.write_text("not for execution")
    command = [sys.executable, "-m", "deepep", "wire", "--ranks", "2", "--", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"COMMAND: {program}: got no program; allowed: one that may be executed"
    ]


def test_the_command() -> None:
    command = [sys.executable, "-m", "deepep", "wire", "--ranks", "2", "--ranks-per-domain", "1", "--"]
    done = subprocess.run([*command, "sh", "-c", "echo here; exit $RANK"], capture_output=True, text=True)
    assert sorted(done.stdout.splitlines()) == ["[0] here", "[1] here", "rank 1: status 1"]
    assert done.returncode == 1
