"""Conventions of all commands: text of the user's is never markup, misuse is one line, outputs are checked
before the work, Ctrl-C ends a command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepep.cli import COMMANDS, main

NAMES = ["run[lr=0.1]/x.json", "seed[/3].json", "[red]x[/red].json", "[/x]", ":smile:.json"]


def misuse(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a misused command prints."""
    with pytest.raises(SystemExit) as left:
        main(list(words))
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "words",
    [
        ("fuzz", "--backend", "oracle", "--trace"),
        ("fuzz", "--backend", "oracle", "--replay"),
        ("fuzz", "--backend"),
        ("check", "--backend"),
        ("check", "--device"),
        ("bench", "--device", "cpu", "--trace"),
        ("bench", "--device"),
        ("bench", "--plot"),
    ],
    ids=" ".join,
)
def test_brackets_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], name: str
) -> None:
    assert name in misuse(capsys, *words, name)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("--match", ("--match", "x")),
        ("--op", ("--mutations", "--op", "combine")),
        ("--seed", ("--replay", "x", "--seed", "3")),
    ],
)
def test_explore_refuses_what_it_would_not_use(
    capsys: pytest.CaptureFixture[str], named: str, words: tuple[str, ...]
) -> None:
    pytest.importorskip("deepep._emulator")
    assert misuse(capsys, "explore", *words).startswith(f"{named}: ")


@pytest.mark.parametrize("name", NAMES)
def test_explore_prints_brackets_as_they_are(capsys: pytest.CaptureFixture[str], name: str) -> None:
    pytest.importorskip("deepep._emulator")
    assert name in misuse(capsys, "explore", "--replay", name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize(
    "words",
    [
        ("fuzz", "--backend", "oracle", "--replay"),
        ("fuzz", "--backend", "oracle", "--trace"),
        ("bench", "--device", "cpu", "--trace"),
        ("bench", "--device", "cpu", "--json"),
    ],
    ids=" ".join,
)
def test_fifos_and_folders_are_no_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Opened, a FIFO is waited for: with a measurement behind it, or before it, for good."""
    os.mkfifo(tmp_path / "fifo.json")
    assert "is not a regular file" in misuse(capsys, *words, str(tmp_path / "fifo.json"))
    (tmp_path / "folder.json").mkdir()
    said = misuse(capsys, *words, str(tmp_path / "folder.json"))
    assert "is not a regular file" in said or "is a folder" in said


def test_brackets_in_the_folder_of_an_output(tmp_path: Path) -> None:
    """The demo used to train first, and to fail at the name of its pictures."""
    out = tmp_path / "run[/b]"
    words = ["demo", "--ranks", "1", "--steps", "2", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "deepep", *words], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"Pictures: {out}/loss.png, expert_load.png, traffic.png"
    assert (out / "loss.png").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("demo", "--out", "{file}"), "--out"),
        (("demo", "--out", "{file}/below"), "--out"),
        (("fuzz", "--backend", "oracle", "--out", "{file}"), "--out"),
        (("bench", "--device", "cpu", "--json", "{folder}"), "--json"),
        (("bench", "--device", "cpu", "--json", "{folder}/none/x.json"), "--json"),
        (("bench", "--device", "cpu", "--plot", "{folder}/x.gif"), "--plot"),
        (("timeline", "--device", "cpu", "--out", "{file}"), "--out"),
        (("timeline", "--device", "cpu", "--out", "/proc/none"), "--out"),
        (("predict", "--plot", "{folder}/x.gif"), "--plot"),
        (("predict", "--plot", "/proc/x.png"), "--plot"),
        (("predict", "--plot", "{folder}/x.png", "--published"), "--plot"),
    ],
)
def test_outputs_are_checked_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...], named: str
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    given = [word.format(file=file, folder=tmp_path) for word in words]
    assert misuse(capsys, *given).startswith(named)


@pytest.mark.parametrize(
    "words",
    [
        ("demo", "--ranks", "many"),
        ("fuzz", "--rank", "4"),
        ("check", "--ranks", "0"),
        ("dmeo",),
        ("bench", "--device", "cpu", "--seed", "-1"),
        ("placement", "x.safetensors", "--draw", "--seed", "-1"),
        ("timeline", "--tokens", "-3"),
        ("timeline", "--experts", "0"),
        ("dp", "bits", "--cases", "0"),
        ("dp", "bytes", "--ranks", "1"),
        ("dp", "convergence", "--ranks", "100"),
        ("dp", "convergence", "--steps", "1"),
        ("dp", "kill", "--ranks", "1"),
        ("dp", "kill", "--times", "0"),
        ("wire", "--deadline", "nan", "--", "true"),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    assert misuse(capsys, *words)


@pytest.mark.parametrize("words", [("--topk", "100"), ("--backend", "nope")], ids=" ".join)
def test_what_the_ranks_of_a_timeline_refuse_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["timeline", "--device", "cpu", "--ranks", "1", "--out", str(tmp_path / "out"), *words])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "allowed" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("wire", "--ranks", "0", "--", "true"), "--ranks:"),
        (("wire", "--ranks-per-domain", "0", "--", "true"), "--ranks-per-domain:"),
        (("wire", "--delay-us", "-1", "--", "true"), "--delay-us:"),
        (("wire", "--silent", "9:1", "--", "true"), "--silent:"),
        (("wire", "--deadline", "-1", "--", "true"), "--deadline:"),
        (("timeline", "--device", "tpu"), "--device:"),
        (("warps", "--device", "tpu"), "--device:"),
        (("warps", "--device", "cpu", "--late", "1"), "--late:"),
    ],
    ids=" ".join,
)
def test_a_wrong_value_names_its_option(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], option: str
) -> None:
    assert misuse(capsys, *words).startswith(option)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"deepep {version('deepep')}\n"


MISUSES = [
    ("--cluster", "links --cluster none"),
    ("--ranks", "links --ranks 0"),
    ("PROGRAM", "links --check -- ls"),
    ("--ranks", "predict --ranks 0"),
    ("--link", "predict --link -1"),
    ("--nic", "predict --nic nan"),
    ("--start", "predict --start -1"),
    ("--ranks-per-domain", "predict --ranks-per-domain 0"),
    ("--tokens", "predict --tokens -1"),
    ("--hidden, --topk", "predict --hidden 0"),
    ("--experts, --topk, --groups, --kept", "predict --groups 3"),
    ("--trace", "predict --trace /none"),
    ("--tokens", "predict --trace /tmp --tokens 8"),
    ("--ranks", "predict --published --ranks 2"),
    ("WHAT", "dp none"),
    ("--ranks", "dp kill --ranks 1"),
    ("--ranks", "dp bits --ranks 4"),
    ("--steps", "dp bench --steps 4"),
    ("--sizes", "dp bench --sizes 1Q"),
    ("--phases", "dp kill --phases none"),
    ("--clusters", "dp topologies --clusters none"),
    ("--kill", "dp efficiency --kill 0"),
    ("--kill", "dp efficiency --simulate 4 --kill 4"),
    ("--costs", "dp efficiency --simulate 4 --costs /none"),
    ("TRACE", "placement none"),
    ("--seed", "placement none --seed 3"),
    ("--plot", "placement none --plot x.gif"),
    ("--seed", "fuzz --replay x --seed 3"),
    ("--trace", "fuzz --faults --trace x"),
    ("--width", "bench --device cpu --width 64"),
    ("--layer", "bench --device cpu --layer 1"),
    ("--device", "doctor --device x"),
    ("--device", "bench --device x"),
    ("--device", "timeline --device x"),
    ("--device", "warps --device x"),
]


@pytest.mark.parametrize(("named", "words"), MISUSES)
def test_misuse_begins_with_what_was_typed(
    capsys: pytest.CaptureFixture[str], named: str, words: str
) -> None:
    assert misuse(capsys, *words.split()).startswith(f"{named}: ")


def test_ctrl_c_while_a_command_is_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as left:
        main(["predict"])
    assert isinstance(left.value, SystemExit)
    assert left.value.code == 130
    assert capsys.readouterr().err == ""


def test_ctrl_c_while_the_package_is_imported(tmp_path: Path) -> None:
    """In a torch that takes long to import; as a library deepep leaves the signal to the program."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise OSError"
    )
    for words, status in ((("-m", "deepep", "info"), -signal.SIGINT), (("-c", "import deepep"), None)):
        done = subprocess.run(
            [sys.executable, *words],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            capture_output=True,
            text=True,
            timeout=60,
        )
        if status is None:
            assert "KeyboardInterrupt" in done.stderr
        else:
            assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_terminal_that_knows_ascii_alone() -> None:
    """Its table is too wide for 40 columns: what is cut off ends in a character of its own."""
    command = [sys.executable, "-m", "deepep", "links"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "COLUMNS": "40"}
    done = subprocess.run(command, capture_output=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert rb"\u2026" in done.stdout


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize("kind", ["folder", "fifo", "large", "no text", "deep", "number"])
@pytest.mark.parametrize("command", ["fuzz", "explore"])
def test_what_is_no_file_to_replay_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, kind: str
) -> None:
    if command == "explore":
        pytest.importorskip("deepep._emulator")
    path = tmp_path / "x.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "large":
        path.touch()
        os.truncate(path, 1 << 40)
    elif kind == "no text":
        path.write_bytes(b"\xff\xfe{")
    elif kind == "deep":
        path.write_text("[" * 200_000)
    else:
        path.write_text("9" * 5000)
    assert misuse(capsys, command, "--replay", str(path)).startswith("--replay: ")


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--minutes", "5"), ("--minutes", "5", "--mutations")])
def test_ctrl_c_ends_an_exploration(tmp_path: Path, words: tuple[str, ...]) -> None:
    pytest.importorskip("deepep._emulator")
    command = [sys.executable, "-m", "deepep", "explore", "--workers", "2", *words]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            deadline = time.monotonic() + 60.0
            while (tmp_path / "out").stat().st_size == 0 and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(1.0)  # somewhere in its work; before its first words it is the interpreter that ends
            os.killpg(process.pid, signal.SIGINT)
            status = process.wait(60.0)  # of the five minutes
        finally:
            process.kill()
    assert status in (130, -signal.SIGINT), (tmp_path / "out").read_text()
