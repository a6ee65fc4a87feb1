"""Ranks that join a Buffer at work, and ranks that go: who is there, what they compute, who raises what."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from harness.joining import TIMEOUT, buffer_for, hand_over, newcomer, rounds

import deepep
from deepep.errors import ArgumentError, DestroyedError, ModeError, PeerTimeoutError, RangeError

pytestmark = [pytest.mark.alone, pytest.mark.own_backend]


@pytest.mark.parametrize("backend", ["reference", "emulator"])
def test_a_process_takes_the_place_of_one_that_died(fresh_world: Any, backend: str, tmp_path: Path) -> None:
    def body(ctx: Any, path: str) -> str:
        import os
        import signal

        buffer = buffer_for(ctx, backend)
        rounds(buffer, ())
        if ctx.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        buffer.low_latency_update_mask_buffer(1, True)
        rounds(buffer, (1,))
        buffer.admit(hand_over(ctx, buffer, (1,), path))
        rounds(buffer, ())
        buffer.low_latency_clean_mask_buffer()  # nobody is masked: nothing happens
        rounds(buffer, ())
        buffer.destroy()
        return "done"

    def then(buffer: Any) -> str:
        rounds(buffer, ())
        buffer.low_latency_clean_mask_buffer()
        rounds(buffer, ())
        buffer.destroy()
        return "joined"

    if backend == "emulator":
        pytest.importorskip("deepep._emulator")
    path = str(tmp_path / "invitation")
    fresh = fresh_world(1).submit(newcomer, path, 1, then)
    outcomes = fresh_world(3).try_run(body, path)
    assert [o.value for o in outcomes if o.rank != 1] == ["done", "done"], [o.describe() for o in outcomes]
    assert fresh.results() == ["joined"]


def test_a_group_grows_and_shrinks(fresh_world: Any, tmp_path: Path) -> None:
    def body(ctx: Any, path: str) -> None:
        buffer = buffer_for(ctx, "reference", max_num_ranks=4)
        assert repr(buffer).startswith(f"<deepep.Buffer: rank {ctx.rank} of 4")
        rounds(buffer, (2, 3))
        buffer.low_latency_clean_mask_buffer()  # no process has them: they stay masked
        rounds(buffer, (2, 3))
        buffer.admit(hand_over(ctx, buffer, (3,), f"{path}3"))
        rounds(buffer, (2,))
        buffer.admit(hand_over(ctx, buffer, (2,), f"{path}2"))
        rounds(buffer, ())
        check_waits(buffer)
        buffer.dismiss([0, 3])
        if ctx.rank == 0:
            with pytest.raises(DestroyedError):
                buffer.invite([3])
            return
        rounds(buffer, (0, 3))
        buffer.destroy()

    def check_waits(buffer: Any) -> None:
        """All ranks' waits, theirs among them who have joined: those who measure have sums."""
        buffer.measure_waits(buffer.rank > 1)
        rounds(buffer, ())
        for _ in range(2):
            waits = buffer.gather_wait_statistics()
            assert {operation for operation, _ in waits.nanoseconds} >= {"dispatch", "combine"}
            assert "gather" not in {operation for operation, _ in waits.nanoseconds}
        rows = waits.of("rows").sum(1)
        assert [int(row) > 0 for row in rows] == [False, False, True, True]

    def third(buffer: Any) -> None:
        rounds(buffer, (2,))
        buffer.admit(buffer.invite([2]))  # a rank that has joined is like any other
        rounds(buffer, ())
        check_waits(buffer)
        buffer.dismiss([0, 3])
        with pytest.raises(DestroyedError):
            buffer.invite([3])

    def second(buffer: Any) -> None:
        rounds(buffer, ())
        check_waits(buffer)
        buffer.dismiss([0, 3])
        rounds(buffer, (0, 3))
        buffer.destroy()

    path = str(tmp_path / "invitation")
    others = [
        fresh_world(1).submit(newcomer, f"{path}{rank}", rank, then)
        for rank, then in ((3, third), (2, second))
    ]
    fresh_world(2).run(body, path)
    for other in others:
        other.results()


def test_who_does_not_come_costs_a_time_out_and_nothing_else(fresh_world: Any, tmp_path: Path) -> None:
    def body(ctx: Any, path: str) -> str:
        buffer = buffer_for(ctx, "reference", max_num_ranks=3, timeout=3.0)
        with pytest.raises(PeerTimeoutError) as caught:
            buffer.admit(buffer.invite([2]))
        assert caught.value.record.waited_on == (2,)
        rounds(buffer, (2,))
        # One that dies on its way is missed at once, or at the deadline if it had not come at all.
        with pytest.raises(PeerTimeoutError) as other:
            buffer.admit(hand_over(ctx, buffer, (2,), f"{path}-first"))
        assert other.value.record.waited_on == (2,)
        rounds(buffer, (2,))
        buffer.destroy()
        return str(caught.value).partition("waited")[0]

    def dies(ctx: Any, path: str) -> None:
        import os
        import signal

        from deepep.runtime.control import issue

        def die(plane: Any, operation: str) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        issue.ControlPlane.meet = die
        newcomer(ctx, path, 2, lambda buffer: None)

    path = str(tmp_path / "invitation")
    fresh = fresh_world(1).submit(dies, f"{path}-first")
    said = fresh_world(2).run(body, path)
    assert said == ["rank 0: admit: meet: ", "rank 1: admit: meet: "]
    assert [outcome.status.name for outcome in fresh.outcomes()] == ["DIED"]


def test_a_rank_that_was_replaced_finds_out_and_disturbs_nobody(fresh_world: Any, tmp_path: Path) -> None:
    def body(ctx: Any, path: str) -> str:
        import time

        buffer = buffer_for(ctx, "reference", timeout=4.0)
        rounds(buffer, ())
        if ctx.rank == 1:  # alive, and given up by the others
            while not Path(f"{path}-admitted").exists():
                time.sleep(0.01)
            with pytest.raises(PeerTimeoutError) as caught:
                rounds(buffer, ())
            buffer.destroy()
            return str(caught.value.record.waited_on)
        buffer.low_latency_update_mask_buffer(1, True)
        buffer.admit(hand_over(ctx, buffer, (1,), path))
        if ctx.rank == 0:
            Path(f"{path}-admitted").touch()
        for _ in range(30):
            rounds(buffer, ())
        buffer.destroy()
        return "went on"

    def then(buffer: Any) -> str:
        for _ in range(30):
            rounds(buffer, ())
        buffer.destroy()
        return "went on"

    path = str(tmp_path / "invitation")
    fresh = fresh_world(1).submit(newcomer, path, 1, then)
    assert fresh_world(3).run(body, path) == ["went on", "(1,)", "went on"]
    assert fresh.results() == ["went on"]


def test_what_is_refused(fresh_world: Any) -> None:
    def body(ctx: Any) -> None:
        from deepep.runtime.control.invitation import Invitation

        with buffer_for(ctx, "reference", enable_shrink=False) as plain, pytest.raises(ModeError):
            plain.invite([0])
        with pytest.raises(ModeError, match="max_num_ranks"):
            buffer_for(ctx, "reference", enable_shrink=False, max_num_ranks=3)
        with pytest.raises(RangeError, match="max_num_ranks"):
            buffer_for(ctx, "reference", max_num_ranks=1)
        buffer = buffer_for(ctx, "reference", max_num_ranks=4)
        for ranks, why in (
            ([0], "masked"),
            ([], "at least one"),
            ([2, 2], "each once"),
            ([4], "ranks"),
            ("2", "str"),
        ):
            with pytest.raises(ArgumentError, match=why):
                buffer.invite(ranks)
        with pytest.raises(RangeError, match="not masked"):
            buffer.dismiss([2])
        with pytest.raises(RangeError, match="not all"):
            buffer.dismiss([0, 1])
        for text in ("", "[]", '["deepep-invitation-1", {}]', '["another", {}]', "{}"):
            with pytest.raises(RangeError, match="invitation"):
                buffer.admit(text)
            with pytest.raises(RangeError, match="invitation"):
                deepep.Buffer.join(text, 2)
        # One rank's bad argument, or another invitation than the others', is everybody's error.
        with pytest.raises(RangeError, match="rank 1: ranks"):
            buffer.invite([2] if ctx.rank == 0 else [0])
        with pytest.raises(deepep.MismatchError):
            buffer.invite([2 + ctx.rank])
        first, second = buffer.invite([2]), buffer.invite([2])
        assert first != second
        with pytest.raises(deepep.MismatchError):
            buffer.admit((first, second)[ctx.rank])
        invited = Invitation.decode(first)
        assert (invited.ranks, invited.members, invited.num_ranks) == ((2,), (0, 1), 4)
        with pytest.raises(RangeError, match="invited: 2"):
            deepep.Buffer.join(first, 3)
        rounds(buffer, (2, 3))
        buffer.destroy()

    fresh_world(2).run(body)


def test_a_newcomer_that_constructs_something_else_is_refused(fresh_world: Any, tmp_path: Path) -> None:
    def body(ctx: Any, path: str) -> None:
        buffer = buffer_for(ctx, "reference", max_num_ranks=3)
        with pytest.raises(deepep.MismatchError, match="reduction"):
            buffer.admit(hand_over(ctx, buffer, (2,), path))
        rounds(buffer, (2,))
        buffer.destroy()

    def other(ctx: Any, path: str) -> None:
        import time

        while not Path(path).exists():
            time.sleep(0.01)
        text = Path(path).read_text()
        assert text.count('"expert_rank"') == 1
        with pytest.raises(deepep.MismatchError, match="reduction"):
            deepep.Buffer.join(text.replace('"expert_rank"', '"exact"'), 2, timeout=TIMEOUT)

    path = str(tmp_path / "invitation")
    fresh = fresh_world(1).submit(other, path)
    fresh_world(2).run(body, path)
    fresh.results()


def test_an_invitation_by_other_members_is_refused(fresh_world: Any) -> None:
    def body(ctx: Any) -> None:
        buffer = buffer_for(ctx, "reference", max_num_ranks=4)
        invitation = buffer.invite([3])
        buffer.dismiss([2])
        if ctx.rank != 2:
            with pytest.raises(RangeError, match="a new one, by ranks"):
                buffer.admit(invitation)
            rounds(buffer, (2, 3))
            buffer.destroy()

    fresh_world(3).run(body)


def test_a_store_is_found_by_its_place() -> None:
    from torch.distributed import HashStore, PrefixStore, TCPStore

    from deepep.runtime.control.stores import base_of, open_store, place_of

    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    prefixed = PrefixStore("a", PrefixStore("b", server))
    assert base_of(prefixed) is not prefixed
    place = place_of(prefixed)
    assert place == f"tcp:localhost:{server.port}"
    open_store(place, 5.0).set("key", "value")
    assert server.get("key") == b"value"
    assert place_of(PrefixStore("a", HashStore())) == ""
    with pytest.raises(RangeError, match="store"):
        open_store("", 5.0)
    with socket.socket() as silent:  # bound, and nobody listens
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(RangeError, match="one that answers"):
            open_store(f"tcp:127.0.0.1:{silent.getsockname()[1]}", 0.5)


def test_a_store_in_a_file_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import FileStore

    from deepep.runtime.control.admission import _MOST_BYTES, _proposal
    from deepep.runtime.control.stores import open_store, place_of

    monkeypatch.chdir(tmp_path)
    FileStore("store", -1).set("key", "value")
    place = place_of(FileStore("store", -1))
    assert place == f"file:{tmp_path}/store"
    monkeypatch.chdir("/")
    assert open_store(place, 5.0).get("key") == b"value"
    with pytest.raises(RangeError, match="one that is there"):
        open_store(f"file:{tmp_path}/other", 5.0)
    assert not (tmp_path / "other").exists()
    assert _proposal(place).decode().partition(" ")[2] == place
    assert len(_proposal("x" * 990)) <= _MOST_BYTES
    assert _proposal("x" * 991 + "é").decode().partition(" ")[2] == ""
