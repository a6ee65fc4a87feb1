"""The wire without a NIC: what it promises on verbs, what it withholds on demand, and clean ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.wire import build

from deepep.sim.links import loopverbs
from deepep.sim.links.hosts import WireOptions, run_on_wire

pytestmark = pytest.mark.skipif(loopverbs.why_not() != "", reason=loopverbs.why_not() or "it can be built")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probe") / "verbs_probe"
    return build(HERE / "verbs_probe.cpp", out, str(loopverbs.library()))


def rounds(probe: Path, folder: Path, wire: WireOptions, number: int, size: int, signalled: str):
    folder.mkdir()
    lines: list[tuple[int, str]] = []
    command = [str(probe), str(folder), str(number), str(size), signalled]
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
    for kind in ("add", "set"):
        result, lines = rounds(probe, tmp_path / kind, weak, 40, 1024, kind)
        assert result.statuses == [0, 0], lines
        assert result.traffic[0, 1].late > 0
        wrong[kind] = int(lines[0][1].removeprefix("wrong "))
    assert wrong["add"] == 0
    assert wrong["set"] > 0


def test_a_completed_write_of_several_pieces_is_there_in_weak_order(probe: Path, tmp_path: Path) -> None:
    # 100 ms: pieces that were held back land long after the last one has come.
    weak = WireOptions(ranks=2, ranks_per_domain=1, weak=True, delay_us=100_000, deadline=60.0)
    result, lines = rounds(probe, tmp_path / "told", weak, 5, 5 << 20, "completion")
    assert result.statuses == [0, 0], lines
    assert result.traffic[0, 1].late > 0
    assert result.traffic[0, 1].writes == 5 * 5
    assert lines == [(1, "wrong 0")]


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


SHARES = """
import _posixshmem, os, sys, time
rank = int(os.environ["RANK"])
memory = _posixshmem.shm_open("/same", os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(memory, 3)
os.pwrite(memory, b"x", rank)
open(os.path.join(sys.argv[1], str(rank)), "w").close()
while len(os.listdir(sys.argv[1])) < 3:
    time.sleep(0.02)
print(os.pread(memory, 3, 0).replace(b"\\0", b"-").decode())
"""


def test_a_host_has_shared_memory_of_its_own(tmp_path: Path) -> None:
    """NVSHMEM counts in it the ranks of a host that share a GPU: with those of another host it would wait."""
    wire = WireOptions(ranks=3, ranks_per_domain=2, deadline=60.0)
    said: dict[int, str] = {}
    result = run_on_wire(wire, [sys.executable, "-c", SHARES, str(tmp_path)], said.__setitem__)
    assert result.succeeded, said
    assert said == {0: "xx-", 1: "xx-", 2: "--x"}
    assert not list(Path("/dev/shm").glob(f"loopverbs.{os.getpid()}-*.domain-*"))


SLEEPS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
if os.environ["RANK"] == "1":
    while not os.path.exists(sys.argv[1]):  # until rank 0 has said its own
        time.sleep(0.02)
    sys.exit(7)
open(sys.argv[1], "w").close()
time.sleep(600)
"""


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_nothing_is_left_of_ranks_that_do_not_end(tmp_path: Path) -> None:
    mine = f"loopverbs.{os.getpid()}-*"  # other tests have their own wires meanwhile
    before = set(Path("/dev/shm").glob(mine))
    pids: list[int] = []
    wire = WireOptions(ranks=2, ranks_per_domain=1, deadline=60.0, grace=0.2)
    command = [sys.executable, "-c", SLEEPS, str(tmp_path / "said")]
    result = run_on_wire(wire, command, lambda rank, line: pids.append(int(line)))
    assert result.statuses == [None, 7]
    assert not result.succeeded
    assert len(pids) == 2
    end = time.monotonic() + 10.0
    while not all(map(gone, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert all(map(gone, pids))
    assert set(Path("/dev/shm").glob(mine)) <= before


LEAVES = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(os.getpid(), child.pid, os.environ["LOOPVERBS_SESSION"], flush=True)
time.sleep(600)
"""


def test_nothing_is_left_of_ranks_whose_starter_is_killed() -> None:
    command = [sys.executable, "-m", "deepep", "wire", "--ranks", "2", "--ranks-per-domain", "1", "--"]
    starter = subprocess.Popen([*command, sys.executable, "-c", LEAVES], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pids: list[int] = []
    try:
        for _ in range(2):
            *said, session = starter.stdout.readline().split()[1:]
            pids += map(int, said)
        memory = loopverbs.session_file(session)
        memory.touch()  # as a program leaves it that has used the wire
        starter.kill()
        starter.wait()
        end = time.monotonic() + 60.0
        while not (all(map(gone, pids)) and not memory.exists()) and time.monotonic() < end:
            time.sleep(0.05)
        assert len(pids) == 4
        assert all(map(gone, pids))
        assert not memory.exists()
    finally:
        starter.stdout.close()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


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
