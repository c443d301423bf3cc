"""How a launcher ends: the exit codes that the documents promise."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import ekd_ray
from ekd_ray.cli.interrupts import continue_with
from ekd_ray.cli.main import run
from ekd_ray.cli.request import resumed_command
from ekd_ray.errors import Interrupted, UserError


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A launcher's handlers are its process's; here they are pytest's again afterwards."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    shown = warnings.showwarning
    yield
    warnings.showwarning = shown
    for number, handler in kept.items():
        signal.signal(number, handler)


def ended(main, capsys) -> tuple[int | str | None, str]:
    with pytest.raises(SystemExit) as left:
        run(main)
    return left.value.code, capsys.readouterr().err


def mistaken() -> int:
    raise UserError("epochs must be >= 1, got 0.")


def interrupted() -> int:
    raise KeyboardInterrupt


def terminated() -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    return 0


def unfinished() -> int:
    raise Interrupted


CODES = {0: lambda: 0, 1: lambda: 1, 2: mistaken, 130: interrupted}


@pytest.mark.parametrize("code", CODES)
def test_a_launcher_ends_with_the_documented_code(code, capsys) -> None:
    found, err = ended(CODES[code], capsys)
    assert found == code
    assert err.count("\n") == (code in (2, 130))


def test_a_warning_of_ours_is_one_line_and_one_of_others_is_pythons(capsys) -> None:
    def main() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn_explicit("a\nb \x1b[2J", UserWarning, run.__code__.co_filename, 1)
            warnings.warn_explicit("theirs", UserWarning, "other.py", 1)
        return 0

    _, err = ended(main, capsys)
    assert err == "warning: a b \\x1b[2J\n", "pytest hears the other"


def test_an_interrupt_names_the_command_that_goes_on_once_there_is_one(capsys) -> None:
    def begun() -> int:
        continue_with(resumed_command(("ekd-ray", "distill", "--set", "lr=log:1:2"), False, "a b"))
        raise KeyboardInterrupt

    _, err = ended(begun, capsys)
    assert err.endswith("ekd-ray distill --set lr=log:1:2 --resume --out 'a b'\n")
    _, err = ended(interrupted, capsys)
    assert "resume" not in err, "of the command before"


def test_what_stopped_before_its_end_is_an_interrupt(capsys) -> None:
    assert ended(unfinished, capsys) == ended(interrupted, capsys)


@pytest.mark.parametrize("sigint", [signal.default_int_handler, signal.SIG_IGN])
def test_a_polite_kill_ends_as_an_interrupt_does(sigint, capsys) -> None:
    """Also where the shell has interrupts ignored, as for jobs in the background."""
    signal.signal(signal.SIGINT, sigint)
    assert ended(terminated, capsys) == ended(interrupted, capsys)


def test_a_polite_kill_is_left_to_who_handles_interrupts(capsys) -> None:
    """Tune ends its trials in order."""
    seen = []

    def main() -> int:
        signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
        return terminated()

    assert ended(main, capsys) == (0, "")
    assert seen == [signal.SIGINT]


def test_a_polite_kill_while_ray_starts_is_an_interrupt(monkeypatch, capsys) -> None:
    """Ray has a handler of its own by then, which leaves with the signal's number."""
    import ray

    from ekd_ray.scale.cluster import connected

    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)

    def main() -> int:
        with connected():
            return 0

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    assert ended(main, capsys) == ended(interrupted, capsys)


# A shell has interrupts ignored for a test-suite that runs in its background.
HEED = "signal.signal(signal.SIGINT, signal.default_int_handler)"
# After the first Ctrl-C: cleaning up that takes long; a handler of somebody else that does nothing,
# as Ray Train's; compiled code, in which Python handles no signal.
STAGES = {
    "cleaning up": "try: begin()\n    finally: time.sleep(100)",
    "a handler of its own": "signal.signal(signal.SIGINT, lambda *_: None); begin()",
    "compiled code": "threading.Timer(0.2, begin).start()\n"
    "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_a_command_at_once(stage, first) -> None:
    code = (
        "import hashlib, os, signal, sys, threading, time\n"
        f"{HEED}\n"
        "from ekd_ray.cli import main\n"
        "def begin(): print('ready', flush=True); time.sleep(100)\n"
        f"def command(*_):\n    {STAGES[stage]}\n"
        "main.run_command = command; main.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(first)
        time.sleep(0.3)  # two that come before it looks are one
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and said.count("\n") == 1, said


@pytest.mark.parametrize("name", ["run_command", "run"])
def test_a_first_interrupt_needs_no_second(name) -> None:
    """Also inside of an `exec`, which CPython under `-m` would leave by the signal."""
    code = f"""
import atexit, os, signal, sys
{HEED}
from ekd_ray.cli import main
def interrupted(*_):
    os.kill(os.getpid(), signal.SIGINT)
    exec("while True: pass")
main.run_command = interrupted
atexit.register(lambda: os.write(1, b"left in order"))
main.{"main()" if name == "run_command" else "run(interrupted)"}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "left in order")
    assert done.stderr.count("\n") == 1, done.stderr


# Where Python prints what is raised and goes on.
SWALLOWED = {
    "a destructor": "class Held:\n    __del__ = press\nHeld()",
    "a hook of a fork": "import subprocess\nos.register_at_fork(after_in_parent=press)\n"
    "subprocess.Popen(['true'], preexec_fn=lambda: None)",
}


@pytest.mark.parametrize("where", SWALLOWED)
def test_an_interrupt_that_is_swallowed_is_raised_again(where) -> None:
    code = f"""
import os, signal, time
{HEED}
from ekd_ray.cli import main
pressed = []
def press(*_):
    if not pressed:
        pressed.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
def interrupted(*_):
    exec({SWALLOWED[where]!r}, globals())
    print("went on")
    time.sleep(100)
main.run(interrupted)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "went on\n")
    assert done.stderr == "interrupted.\n"


def test_a_reader_that_leaves_early_ends_the_command_quietly() -> None:
    """As `| head` does."""
    code = (
        "from ekd_ray.cli.main import run; run(lambda: [print('row') for _ in range(10**5)] and 0)"
    )
    pipeline = f'set -o pipefail; {sys.executable} -c "{code}" | head -1'
    done = subprocess.run(["bash", "-c", pipeline], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "row\n", "")


def test_a_pipe_that_breaks_elsewhere_keeps_its_traceback() -> None:
    with pytest.raises(BrokenPipeError):
        run(lambda: os.write(_pipe_without_reader(), b"x"))


def _pipe_without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_the_documents_name_every_code() -> None:
    page = Path(ekd_ray.__file__).parents[1] / "docs" / "reference" / "commands.md"
    text = page.read_text(encoding="utf-8")
    table = text[text.index("## Exit codes") :]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == list(CODES)
