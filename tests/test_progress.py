"""Lines of a log where there is no terminal, by a clock that the test moves."""

import io
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from ddpm.run import progress
from ddpm.run.progress import Progress


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    assert not progress._open
    yield
    assert not progress._open


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_comes_every_thirty_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of 7 s for 100 s: lines at 35, 70 and 105 s, each with what is right then."""
    clock, found = Clock(), []
    with Progress[None](total=100, desc="training", unit="step", clock=clock) as bar:
        bar.set_postfix_str("loss 0.0312, 5% waiting for data")
        for i in range(1, 16):
            clock.now += 7
            bar.update()
            found += [(i, line) for line in lines(capsys)]
    assert [i for i, _ in found] == [5, 10, 15]
    for i, line in found:
        shown = rf"training: {i} of 100 steps \({i}%\), 0.143 steps/s, [\d.]+ minutes left, "
        assert re.fullmatch(shown + r"loss 0.0312, 5% waiting for data, [\d.]+ [MG]iB of memory", line)
    assert lines(capsys) == []


def test_a_short_program_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress[None](total=3, clock=clock) as bar:
        for _ in range(3):
            clock.now += 9.9
            bar.update()
    assert lines(capsys) == []


def test_a_program_that_printed_says_that_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress[None](total=2, unit="batch", clock=clock) as bar:
        for _ in range(2):
            clock.now += 20
            bar.update()
        assert len(lines(capsys)) == 1
        bar.close()
        assert lines(capsys) == []  # the line at 40 s said it, and is repeated only if more was done since


def test_what_an_earlier_process_did_does_not_count_as_speed(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress[None](total=1000, initial=900, unit="image", desc="sampling", clock=clock) as bar:
        clock.now += 50
        bar.update(50)
        [line] = lines(capsys)
    assert line.startswith("sampling: 950 of 1,000 images (95%), 1 images/s, 50 seconds left, ")


def test_the_outermost_tells_of_what_is_within(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for both, also if only the inner one moves."""
    clock = Clock()
    with Progress[None](total=10, unit="image", desc="samples", clock=clock) as outer:
        outer.update(4)
        inner = Progress(iter("abcdef"), total=6, desc="sampling", clock=clock)
        seen = []
        for letter in inner:
            seen.append(letter)
            clock.now += 10
        assert "".join(seen) == "abcdef"
    found = lines(capsys)
    assert len(found) == 2
    assert re.match(r"samples: 4 of 10 images \(40%\), .*; sampling: 3 of 6 steps \(50%\), ", found[0])


def test_only_what_is_shown_prints(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress[None](total=10, show=False, clock=clock) as bar:
        clock.now += 100
        bar.update(3)
    assert bar.n == 3
    assert lines(capsys) == []


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen, clock = Terminal(), Clock()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress[None](total=4, desc="counting", clock=clock) as bar:
        clock.now += 100
        bar.update(4)
        bar.set_postfix_str("all")
    assert "counting: 100%" in screen.getvalue()
    assert "4/4" in screen.getvalue()
    assert "of memory" not in screen.getvalue()


def test_lines_come_during_a_long_step_and_not_after_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thread prints them while nothing is counted, and none after `close`."""
    monkeypatch.setattr(progress, "EVERY", 0.01)
    bar, found = Progress[None](total=5, desc="waiting"), list[str]()
    end = time.monotonic() + 60
    while len(found) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
        found += lines(capsys)
    assert all(line.startswith("waiting: 0 of 5 steps (0%), ") for line in found)
    bar.close()
    lines(capsys)
    time.sleep(0.3)
    assert lines(capsys) == []


PROGRAM = """
import sys
from ddpm.cli import main
from ddpm.run import progress, sample
from ddpm.errors import Stopped
progress.EVERY = 0.01
class Held: pass
def generate(*_, **__):
    Held.bar = progress.Progress(total=3, desc="within")
    import time; time.sleep(0.5)
    raise Stopped("the reason")
sample.generate = generate
code = main(["sample", "digits", "-n", "2", "--out", sys.argv[1]])
import time; time.sleep(0.5)
sys.exit(code)
"""


def test_the_error_stays_the_last_line(tmp_path: object) -> None:
    """Although a bar was left open, and its thread prints very often."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, f"{tmp_path}/a.npy"], capture_output=True, text=True)
    assert done.returncode == 1
    *before, last = done.stderr.splitlines()
    assert last == "ddpm: the reason"
    assert before
    assert all(line.startswith("sampling: 0 of 2 images (0%)") for line in before)
