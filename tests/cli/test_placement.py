"""`deepep placement`: a trace drawn and replayed, its picture, and misuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepep.cli import main
from deepep.trace import RoutingTrace

DRAWN = ("--draw", "--steps", "6", "--layers", "1", "--experts", "16", "--topk", "2", "--tokens", "32")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["placement", *words])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_a_trace_is_drawn_replayed_and_pictured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, picture = tmp_path / "drawn.safetensors", tmp_path / "placement.png"
    shape = ("--ranks", "4", "--redundant", "4", "--window", "2")
    printed = run(capsys, str(trace), *DRAWN, *shape, "--plot", str(picture))
    assert RoutingTrace.load(trace).num_experts == 16
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["0-1", "2-3", "4-5"]
    assert [len(row) for row in rows] == [4, 6, 6]
    again = run(capsys, str(trace), *shape)  # the file alone, without --draw
    assert again.splitlines()[1:] == printed.splitlines()[1:-1]
    grouped = run(capsys, str(trace), *shape, "--groups", "4", "--domains", "2")
    assert grouped.splitlines()[2:] != again.splitlines()[2:]


@pytest.mark.parametrize(
    "words",
    [
        ("--ranks", "3"),
        ("--redundant", "1"),
        ("--window", "6"),
        ("--window", "7"),
        ("--groups", "3"),
        ("--plot", "placement.txt"),
        ("--skew", "-1", "--draw"),
    ],
    ids=" ".join,
)
def test_misuse_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    trace = tmp_path / "drawn.safetensors"
    run(capsys, str(trace), *DRAWN, "--ranks", "4", "--window", "3")
    with pytest.raises(SystemExit) as left:
        main(["placement", str(trace), "--ranks", "4", *words])
    printed = capsys.readouterr()
    assert (left.value.code, printed.out, len(printed.err.splitlines())) == (2, "", 1)


def test_a_file_that_is_no_trace_is_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nothing.safetensors", "text.safetensors"):
        path = tmp_path / name
        if name.startswith("text"):
            path.write_text("no trace")
        with pytest.raises(SystemExit) as left:
            main(["placement", str(path)])
        assert left.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
