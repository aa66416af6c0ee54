"""README, "Limits": what the server reports on stderr, and that the chat never waits for it."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from peers import Join
from processes import LINUX, POSIX, Script, Start, free_port, server_options, wait_for

slow = pytest.mark.slow
UNREAD: dict[str, Callable[[], tuple[int, int]]] = {"pipe": os.pipe}
if os.name == "posix":
    UNREAD["terminal"] = os.openpty


def reported(server: Script) -> int:
    """Return how many dropped lines the server has reported."""
    counts = re.findall(
        r"^server\.py: dropped a line(?: \(([0-9,]+) times\))?: ", server.stderr, re.M
    )
    return sum(int(count.replace(",", "") or 1) for count in counts)


# A dropped line is reported within half a second. Those of a flood are counted, and reported in a
# few lines a second, the last ones at the end.


def test_a_dropped_line_is_reported_within_half_a_second(server: Script, join: Join) -> None:
    peer = join(server.ports)
    began = time.monotonic()
    peer.push.send(b"bad")
    server.wait_stderr(
        r'server\.py: dropped a line: not a JSON object with "user" and "message", '
        r"in UTF-8: b'bad'\n"
    )
    assert time.monotonic() - began < 0.5


def test_dropped_lines_are_reported_in_a_few_lines_a_second(server: Script, join: Join) -> None:
    peer = join(server.ports)
    began = time.monotonic()
    count = 0
    while time.monotonic() - began < 2:
        peer.push.send(b"bad %d" % count)
        count += 1
        time.sleep(0.001)
    wait_for(lambda: reported(server) == count, lambda: server.stderr)
    assert 2 <= server.stderr.count("dropped a line") <= 2 * 5 + 2
    assert f"b'bad {count - 1}'\n" in server.stderr


def test_what_is_not_reported_yet_is_reported_at_the_end(server: Script, join: Join) -> None:
    peer = join(server.ports)
    for number in range(2_000):
        peer.push.send(b"bad %d" % number)
    peer.chat("next")
    assert server.terminate() == 0
    assert reported(server) == 2_000
    assert server.stderr.endswith("in UTF-8: b'bad 1999'\n")


@pytest.mark.parametrize("count", [30_000, pytest.param(300_000, marks=slow)])
def test_a_flood_of_garbage_leaves_a_few_lines(server: Script, join: Join, count: int) -> None:
    peer = join(server.ports)
    with peer.pushing([b"\x1b]0;title\x07 %d %s" % (n, b"\xff" * 80) for n in range(count)]):
        wait_for(lambda: reported(server) == count, lambda: server.stderr[-1_000:])
    peer.chat("next")
    assert len(server.stderr) < 10_000
    assert server.stderr.replace("\n", "").isprintable()


# The chat does not wait for stderr, and stderr, stdin and stdout may be closed.

FILLER = b"x" * 50 + b"\n"  # shorter than any report


def fill(make: Callable[[], tuple[int, int]], count: int | None) -> tuple[tuple[int, int], int]:
    """Make a pipe or a terminal, and write FILLER to it until it is full, or `count` times.

    Return its two ends, and how many times it took FILLER whole.
    """
    ends = make()
    os.set_blocking(ends[1], False)
    written = 0
    with contextlib.suppress(BlockingIOError):
        while written != count and os.write(ends[1], FILLER) == len(FILLER):
            written += 1
    os.set_blocking(ends[1], True)
    return ends, written


@contextlib.contextmanager
def full(make: Callable[[], tuple[int, int]]) -> Iterator[int]:
    """Give a file that has no room for a report, and that nobody reads.

    A little room is left: then select calls a terminal writable, and a write blocks all the same.
    """
    first, count = fill(make, None)
    second, _ = fill(make, count)
    yield second[1]
    for end in (*first, *second):
        os.close(end)


@POSIX
@pytest.mark.parametrize("make", UNREAD.values(), ids=UNREAD)
def test_the_chat_does_not_wait_for_stderr_that_nobody_reads(
    start: Start, join: Join, make: Callable[[], tuple[int, int]]
) -> None:
    ports = free_port(), free_port()
    with full(make) as stderr:
        script = start("server.py", *server_options(ports), stderr=stderr)
        peer = join(ports)
        until = time.monotonic() + 0.7
        while time.monotonic() < until:
            peer.push.send(b"bad")
            assert peer.round_trip() < 1
        assert script.terminate() == 0


@LINUX
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(start: Start, join: Join, closed: str) -> None:
    ports = free_port(), free_port()
    before = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    script = start("server.py", *server_options(ports), before=before)
    peer = join(ports)
    peer.push.send(b"bad")
    peer.chat("next")
    for number in range(3):  # None is a socket, which would get what is printed.
        file = Path(f"/proc/{script.process.pid}/fd/{number}").readlink()
        assert str(file).startswith(("/dev/null", "pipe:"))
    assert script.terminate() == 0
    assert "Traceback" not in script.stderr
    assert ("dropped a line: " in script.stderr) == ("2>" not in closed)
