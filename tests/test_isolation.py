"""An object in a child process: every way to fail costs one call, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autotune.isolation import Child, last_words
from autotune.objective import StageFailure, Unavailable, run_stages
from hardware.files import UserError
from tests.faulty import Lost, Service, slow_start


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with Child(Service(), seconds=30) as made:
        yield made


def gone(process: int) -> bool:
    """Whether a process has ended, waiting a little for it."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def failure(child: Child, method: str, *args: object, seconds: float | None = None) -> tuple[str, str]:
    with pytest.raises(StageFailure) as found:
        child.call(method, *args, seconds=seconds)
    return found.value.outcome, found.value.reason


def test_it_lives_on_between_calls_and_failures(child: Child) -> None:
    """What a method raises is told apart, and the object keeps its state."""
    assert child.call("echo", {"a": (1, 2.5)}) == {"a": (1, 2.5)}
    process = child.call("process")
    assert process != os.getpid()
    before = child.call("count")
    assert failure(child, "stage") == ("incorrect", "the sum is wrong")
    with pytest.raises(UserError, match="rule, then value"):
        child.call("user")
    assert failure(child, "fails", "KeyError", "x") == ("runtime", "KeyError: 'x'")
    assert failure(child, "closure")[0] == "runtime"  # an answer that cannot be sent
    assert (child.call("process"), child.call("count")) == (process, before + 1)


@pytest.mark.parametrize(
    ("method", "args", "outcome", "parts"),
    [
        ("segfault", ("LLVM ERROR: no such type",), "runtime", ("SIGSEGV", "LLVM ERROR: no such type", "in segfault")),
        ("leave", (3,), "runtime", ("exit code 3",)),
        ("sleep", (60.0,), "timeout", ("sleep took longer than 0.5 s",)),
        ("fails", ("MemoryError", ""), "runtime", ("MemoryError",)),
        ("fails", ("RuntimeError", "CUDA error: an illegal memory access"), "runtime", ("illegal memory access",)),
    ],
)
def test_what_spoils_the_process_costs_one_call(
    method: str, args: tuple[object, ...], outcome: str, parts: tuple[str, ...], child: Child
) -> None:
    before, starts = child.call("process"), child.starts
    found, reason = failure(child, method, *args, seconds=0.5 if method == "sleep" else None)
    assert found == outcome and all(part in reason for part in parts), reason
    assert gone(before)
    assert child.call("count") == 1 and child.starts == starts + 1


def test_what_the_child_started_ends_with_it() -> None:
    with Child(Service(), seconds=30) as child:
        helper = child.call("helper")
        assert not Path(f"/proc/{helper}/stat").read_text().endswith("Z")
        assert failure(child, "sleep", 60.0, seconds=0.2)[0] == "timeout"
    assert gone(helper)


def test_it_is_started_late_and_a_refusal_is_one_of_the_user(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = Child(Service(str(log), "the checkpoint must be there"), seconds=30)
    assert not log.exists()
    with pytest.raises(UserError, match="the checkpoint must be there"):
        child.call("count")
    child.close()
    late = Child(slow_start, seconds=30, grace_seconds=0.3)
    with pytest.raises(Unavailable, match=r"starting took longer than 0\.3 s"):
        late.call("count")


def test_what_no_longer_starts_is_no_setting_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that went away: the search ends with one line, and the setting is measured when it is back."""
    monkeypatch.setattr("autotune.isolation._START_AGAIN_SECONDS", 0.0)
    log = tmp_path / "log"
    with Child(Lost(str(log)), seconds=30) as child:
        assert failure(child, "segfault", "")[0] == "runtime"
        with pytest.raises(Unavailable, match="RuntimeError: no device"):
            child.call("count")
        assert child.starts == 3
        log.unlink()
        assert child.call("count") == 1
    stages = {"decode": lambda: child.call("count")}
    log.write_text("made\n")
    with pytest.raises(Unavailable):
        run_stages(stages, lambda *_: pytest.fail("a result was stored"))


def test_no_orphan_is_left_and_ctrl_c_is_the_parents() -> None:
    """The parent is killed in the middle of a call; before, an interrupt of the terminal did not reach the child."""
    program = (
        "from autotune.isolation import Child; from tests.faulty import Service\n"
        "child = Child(Service(), 60)\n"
        "print(child.call('process'), child.call('helper'), flush=True)\n"
        "child.call('sleep', 60.0)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as parent:
        assert parent.stdout
        served, helper = map(int, parent.stdout.readline().split())
        os.kill(served, signal.SIGINT)
        assert os.getpgid(served) == served != os.getpgid(parent.pid)
        time.sleep(0.1)
        assert not gone_now(served)
        parent.send_signal(signal.SIGKILL)
    assert gone(served) and gone(helper)


def gone_now(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_last_words_of_a_process() -> None:
    assert last_words("") == ""
    assert last_words("a\nb\n\n") == "b"
    report = (
        'LLVM ERROR: x\nFatal Python error: Aborted\n\nCurrent thread 0x1:\n  File "k.py", line 3 in f\n  File "m"\n'
    )
    assert last_words(report) == 'LLVM ERROR: x; at File "k.py", line 3 in f'
