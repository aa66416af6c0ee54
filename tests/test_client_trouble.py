"""The client in trouble: servers that die, stand still or hang up, and files that are not there.

The echo is the receipt: status 0 means that everybody could see every line.
"""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from bare import BareServer, MakeBare, body_of, close, read_all, read_line, write
from conftest import (
    CONNECTED,
    NO_SERVER,
    Peer,
    Script,
    Start,
    free_port,
    port_options,
    wait_for,
)
from network import Network

import client

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="takes a POSIX shell or signal")

StartServer = Callable[..., Script]


def bodies(*numbers: int) -> list[bytes]:
    """Return the bodies of lines that are only numbers."""
    return [body_of("k", str(number)) for number in numbers]


def typed(*numbers: int) -> bytes:
    """Return such lines as they are typed with --user k."""
    return b"".join(b"%d\n" % number for number in numbers)


def numbers_in(output: bytes) -> list[int]:
    """Return the numbers among the lines that a client printed."""
    return [int(number) for number in re.findall(rb"^k> (\d+)$", output, re.MULTILINE)]


@pytest.fixture
def ken(start: Start) -> Callable[..., Script]:
    """Give a function that starts a client, which speaks as k, at a server's ports."""

    def start_it(ports: tuple[int, int], *options: str, **how: object) -> Script:
        how.setdefault("stdin", subprocess.PIPE)
        return start("client.py", *port_options(ports), "--user", "k", *options, **how)

    return start_it


Ken = Callable[..., Script]


@pytest.fixture
def talking(bare: BareServer, ken: Ken) -> Script:
    """Give a client of the bare server that has had the echo of its first line, 0."""
    script = ken(bare.ports)
    write(script, typed(0))
    bare.answer(1)
    assert read_line(script) == b"k> 0\n"
    return script


class Pipe:
    """A client whose stdin is a file of numbers, and whose stdout is a file, too."""

    def __init__(
        self, ken: Ken, path: Path, ports: tuple[int, int], count: int, *options: str, **how: object
    ) -> None:
        self.count, self.path = count, path / f"out{ports[0]}-{count}"
        lines = path / f"in{ports[0]}-{count}"
        lines.write_bytes(typed(*range(count)))
        with lines.open("rb") as stdin, self.path.open("wb") as stdout:
            self.script = ken(ports, *options, stdin=stdin.fileno(), stdout=stdout.fileno(), **how)

    def numbers(self) -> list[int]:
        """Return the numbers that it printed."""
        return numbers_in(self.path.read_bytes())

    def wait_numbers(self, count: int) -> None:
        """Wait until it printed so many lines."""
        wait_for(lambda: len(self.numbers()) >= count, lambda: (self.numbers()[-3:], self.said()))

    def said(self) -> str:
        """Return what it said on stderr."""
        return self.script.said

    def wait_all_delivered(self) -> int:
        """Wait for its end: every line was to be seen, in order. Return how many came twice."""
        assert self.script.process.wait(120) == 0, self.said()
        self.script.wait()
        numbers = self.numbers()
        assert list(dict.fromkeys(numbers)) == list(range(self.count))
        return len(numbers) - self.count

    def wait_undelivered(self) -> int:
        """Wait for its end; return how many lines it does not know to be delivered."""
        assert self.script.process.wait(120) == 1, self.said()
        self.script.wait()
        (told,) = re.findall(r"lines not known to be delivered: ([\d,]+)", self.said())
        return int(told.replace(",", ""))


# The echo is the receipt: what is pushed when, and when again.


def test_the_first_line_goes_alone_until_its_echo(bare: BareServer, ken: Ken) -> None:
    script = ken(bare.ports)
    close(script, typed(*range(10)))
    assert bare.take() == bodies(0)[0]
    assert bare.take_all() == []
    bare.echo(bodies(0)[0])
    assert bare.answer(9) == bodies(*range(1, 10))
    assert script.wait() == 0


def test_a_thousand_lines_are_out_at_most(bare: BareServer, ken: Ken, tmp_path: Path) -> None:
    pipe = Pipe(ken, tmp_path, bare.ports, 5_000)
    bare.answer(1)
    assert bare.take_all() == bodies(*range(1, client.WINDOW + 1))
    for body in bodies(*range(1, client.WINDOW + 1)):
        bare.echo(body)
    bare.answer(5_000 - client.WINDOW - 1)
    assert pipe.wait_all_delivered() == 0


def test_an_echo_settles_the_lines_before_it(bare: BareServer, ken: Ken) -> None:
    script = ken(bare.ports)
    close(script, typed(*range(10)))
    bare.answer(1)
    assert [bare.take() for _ in range(9)] == bodies(*range(1, 10))
    bare.echo(bodies(9)[0])
    assert script.wait() == 0


def test_only_an_echo_is_movement(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    screen = client.Screen(typing=False, color=False)
    link = client.Link(context.socket(zmq.PUSH), context.socket(zmq.SUB), "here", screen)
    outbox = client.Outbox("k", link, screen)
    outbox.take(b"0")
    outbox.out, outbox.stood_still = 1, 29
    outbox.settle([("ann> 0", "ann> 0")])
    assert outbox.stood_still == 29
    outbox.settle([("k> 0", "k> 0")])
    assert outbox.stood_still == 0


@pytest.mark.parametrize("also_sub", [False, True])
def test_what_was_out_is_pushed_again_over_the_next_push_connection(
    bare: BareServer, ken: Ken, also_sub: bool
) -> None:
    script = ken(bare.ports)
    close(script, typed(*range(10)))
    bare.answer(4)
    assert [read_line(script) for _ in range(4)] == [b"k> %d\n" % n for n in range(4)]
    assert [bare.take() for _ in range(6)] == bodies(*range(4, 10))
    bare.pull.close(linger=0)
    if also_sub:
        bare.pub.close(linger=0)
    script.wait_said(NO_SERVER)
    bare.open_pull()
    if also_sub:
        bare.open_pub()
    assert bare.take() == bodies(4)[0]
    assert bare.take_all() == []  # It goes alone.
    bare.echo(bodies(4)[0])
    assert bare.answer(5) == bodies(*range(5, 10))
    assert script.wait() == 0
    assert not bare.take_all(100)
    assert script.said == NO_SERVER + CONNECTED


def test_nothing_is_pushed_again_if_only_sub_was_away(bare: BareServer, ken: Ken) -> None:
    script = ken(bare.ports)
    write(script, typed(*range(10)))
    bare.answer(4)
    assert [bare.take() for _ in range(6)] == bodies(*range(4, 10))
    bare.pub.close(linger=0)
    script.wait_said(NO_SERVER)
    bare.open_pub()
    script.wait_said(CONNECTED)
    assert bare.take_all(500) == []
    close(script, typed(10, 11))
    assert bare.take() == bodies(10)[0]
    assert bare.take_all() == []  # It goes alone.
    bare.echo(bodies(10)[0])  # and stands for the six before it.
    assert bare.answer(1) == bodies(11)
    assert script.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 998, 999, 1_000])
def test_lines_whose_echoes_were_lost_with_sub_are_asked_for_by_the_last_of_them(
    bare: BareServer, talking: Script, count: int
) -> None:
    numbers = range(1, count + 1)
    close(talking, typed(*numbers))
    assert [bare.take() for _ in numbers] == bodies(*numbers)
    bare.pub.close(linger=0)
    talking.wait_said(NO_SERVER)
    bare.open_pub()
    assert bare.take() == bodies(numbers[-1])[0]
    bare.echo(bodies(numbers[-1])[0])
    assert talking.wait() == 0
    assert not bare.take_all(100)


@pytest.mark.slow
def test_an_echo_that_was_left_out_is_asked_for_when_the_input_ends(
    bare: BareServer, talking: Script
) -> None:
    """However long it stays open, the last line is pushed again, once."""
    write(talking, typed(1))
    assert bare.take_all(6_000) == bodies(1)
    close(talking)
    assert bare.take_all(6_000) == bodies(1)
    bare.echo(bodies(1)[0])
    assert talking.wait() == 0


@pytest.mark.slow
def test_lines_whose_echoes_were_left_out_are_asked_for_by_the_last_of_them(
    bare: BareServer, talking: Script
) -> None:
    """As a server does it while nobody reads the client's stdout."""
    close(talking, typed(*range(1, 1_500)))
    assert [bare.take() for _ in range(1_000)] == bodies(*range(1, 1_001))
    assert bare.answer(1) == bodies(1_000)
    assert bare.answer(499) == bodies(*range(1_001, 1_500))
    assert talking.wait() == 0


@pytest.mark.parametrize("colors", [("", ""), ("\x1b[0;36;49m", "\x1b[0m"), ("", "\x1b[1;31m")])
def test_another_servers_colours_change_nothing(
    bare: BareServer, ken: Ken, colors: tuple[str, str]
) -> None:
    bare.colors = colors
    script = ken(bare.ports)
    close(script, typed(*range(10)))
    assert bare.answer(10) == bodies(*range(10))
    assert script.wait() == 0
    assert numbers_in(read_all(script)) == list(range(10))


def test_a_line_said_again_after_it_was_pushed_again_is_told_by_its_own_echo(
    bare: BareServer, ken: Ken
) -> None:
    """The server that went away had not published it, so it has no second echo."""
    script = ken(bare.ports)
    write(script, typed(1))
    assert bare.take() == bodies(1)[0]
    bare.pull.close(linger=0)
    script.wait_said(NO_SERVER)
    bare.open_pull()
    assert bare.answer(1) == bodies(1)
    assert read_line(script) == b"k> 1\n"
    close(script, typed(1))
    assert bare.answer(1) == bodies(1)
    assert script.process.wait(4) == 0  # sooner than it would be pushed again
    assert not bare.take_all(100)


@pytest.mark.slow
def test_it_ends_at_once_though_the_server_dies_after_the_last_echo(
    start_server: StartServer, ken: Ken, join: Callable[..., Peer]
) -> None:
    """It takes a few to have one die in the very moment."""
    for _ in range(8):
        server = start_server()
        script = ken(server.ports)
        write(script, typed(0))
        assert read_line(script) == b"k> 0\n"
        peer = join(server.ports)  # behind the client
        close(script, typed(1))
        while peer.receive() != b"k> \x1b[36m1\x1b[0m":
            pass
        server.process.kill()
        began = time.monotonic()
        assert script.wait() == 0
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("also_sub", [False, True])
def test_a_line_at_which_a_server_hangs_up_is_given_up_and_its_neighbours_arrive(
    make_bare: MakeBare, ken: Ken, also_sub: bool
) -> None:
    """This server takes lines of 1,000 bytes."""
    bare = make_bare(1_000)
    script = ken(bare.ports)
    close(script, b"".join([typed(*range(5)), b"x" * 2_000 + b"\n", typed(*range(5, 10))]))
    published: list[bytes] = []
    breaks = 0
    while script.process.poll() is None:
        if bare.pull.poll(10):
            published += bare.answer(1)
        if also_sub and script.said.count(NO_SERVER) > breaks:
            breaks += 1
            bare.pub.close(linger=0)
            bare.open_pub()
    assert script.wait() == 1
    assert list(dict.fromkeys(published)) == bodies(*range(10))
    told = script.said.splitlines()
    assert sum("given up after 3 times without an echo: k> xxxxx" in line for line in told) == 1
    assert told[-1] == "client.py: lines not known to be delivered: 1"
    if not also_sub:
        assert script.said.count(NO_SERVER) == 3


def test_no_line_is_given_up_as_long_as_there_are_echoes(bare: BareServer, ken: Ken) -> None:
    script = ken(bare.ports)
    close(script, typed(*range(10)))
    for number in range(5):
        assert bare.answer(1) == bodies(number)
        assert read_line(script) == b"k> %d\n" % number
        assert bare.take() == bodies(number + 1)[0]
        bare.pull.close(linger=0)
        script.wait_said(f"({NO_SERVER}(?:{CONNECTED})?){{{number + 1}}}")
        bare.open_pull()
    assert bare.answer(5) == bodies(*range(5, 10))
    assert script.wait() == 0


# Servers that die and come back.


def restart_amid(
    pipe: Pipe, first: Script, start_server: StartServer, at: int, pause: float = 0
) -> Script:
    """Kill a server when a pipe printed so many lines, and start another one after a pause."""
    pipe.wait_numbers(at)
    first.process.kill()
    first.wait()
    time.sleep(pause)
    return start_server(*first.ports)


@pytest.mark.parametrize("restarts", [1, 3])
def test_a_server_killed_amid_a_pipe_and_started_again_costs_nothing(
    server: Script, start_server: StartServer, ken: Ken, tmp_path: Path, restarts: int
) -> None:
    pipe = Pipe(ken, tmp_path, server.ports, 40_000)
    now = server
    for _ in range(restarts):
        at = len(pipe.numbers()) + 2_000  # More than were out: it has reconnected by then.
        now = restart_amid(pipe, now, start_server, at)
    doubled = pipe.wait_all_delivered()
    print(f"{restarts} restarts: {doubled} doubled")
    assert doubled <= client.WINDOW * restarts
    assert pipe.said() == (NO_SERVER + CONNECTED) * restarts


@pytest.mark.slow
def test_a_server_killed_amid_a_pipe_may_come_back_5_seconds_later(
    server: Script, start_server: StartServer, ken: Ken, tmp_path: Path
) -> None:
    pipe = Pipe(ken, tmp_path, server.ports, 40_000)
    restart_amid(pipe, server, start_server, 4_000, pause=5)
    assert pipe.wait_all_delivered() <= client.WINDOW


def test_outages_are_told_each_time(server: Script, start_server: StartServer, ken: Ken) -> None:
    script = ken(server.ports)
    now = server
    for number in range(3):
        write(script, typed(number))
        assert read_line(script) == b"k> %d\n" % number
        assert script.said == (NO_SERVER + CONNECTED) * number
        now.process.kill()
        script.wait_said(f"^({NO_SERVER}{CONNECTED}){{{number}}}{NO_SERVER}$")
        now = start_server(*server.ports)
        script.wait_said(f"^({NO_SERVER}{CONNECTED}){{{number + 1}}}$")
    close(script)
    assert script.wait() == 0


def test_a_reader_of_stdout_that_sleeps_while_the_server_restarts(
    server: Script, start_server: StartServer, ken: Ken, join: Callable[..., Peer]
) -> None:
    sleep_through_restarts(server, start_server, ken, join, 0.5, 0.5)


def unread(script: Script) -> int:
    """Return how many bytes are in the pipe from a script's stdout. It takes 65,536 mostly."""
    import fcntl
    import termios

    assert script.process.stdout
    answer = fcntl.ioctl(script.process.stdout, termios.FIONREAD, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


@POSIX
def test_ctrl_c_ends_it_while_nobody_reads_stdout(
    server: Script, ken: Ken, join: Callable[..., Peer]
) -> None:
    script = ken(server.ports)
    write(script, typed(0))
    assert read_line(script) == b"k> 0\n"
    peer = join(server.ports)
    for _ in range(1_000):
        peer.push.send_json({"user": "ann", "message": "x" * 1_000})
    assert peer.receive()
    wait_for(lambda: unread(script) > 40_000, lambda: unread(script))
    script.process.send_signal(signal.SIGINT)
    assert script.wait() == 130


@pytest.mark.slow
def test_a_reader_of_stdout_that_sleeps_for_half_a_minute(
    server: Script, start_server: StartServer, ken: Ken, join: Callable[..., Peer]
) -> None:
    sleep_through_restarts(server, start_server, ken, join, 25, 1)


def sleep_through_restarts(
    server: Script,
    start_server: StartServer,
    ken: Ken,
    join: Callable[..., Peer],
    *seconds: float,
) -> None:
    """Let a client's stdout fill and restart the server after a while, each time, then read it."""
    script = ken(server.ports)
    write(script, typed(0))
    assert read_line(script) == b"k> 0\n"
    now = server
    for pause in seconds:
        peer = join(now.ports)
        for _ in range(3_000):
            peer.push.send_json({"user": "ann", "message": "x" * 1_000})
        time.sleep(pause)
        now.process.kill()
        now.wait()
        now = start_server(*server.ports)
    printed: list[bytes] = []
    reader = threading.Thread(target=lambda: printed.append(read_all(script)))
    reader.start()
    close(script, typed(1))
    assert script.wait() == 0
    reader.join()
    assert numbers_in(printed[0])[-1:] == [1]


# Servers that do not come back, or stand still.


@pytest.mark.slow
def test_lines_that_no_server_takes_are_told_within_15_seconds(
    server: Script, start_server: StartServer, start: Start, ken: Ken, tmp_path: Path
) -> None:
    """All at once. The last, a server that stands still from the start, has TCP answer for it."""
    still = start_server()
    still.process.send_signal(signal.SIGSTOP)
    cases = {
        "no server": (free_port(), free_port()),
        "no PUB": (server.ports[0], free_port()),
        "no PULL": (free_port(), server.ports[1]),
        "stands still": still.ports,
    }
    pipes = {name: Pipe(ken, tmp_path, ports, 5) for name, ports in cases.items()}
    astray = start(
        "client.py", "no-such-host.invalid", *port_options(server.ports), "--user", "k",
        stdin=subprocess.PIPE,
    )  # fmt: skip
    close(astray, typed(1))
    began = time.monotonic()
    for name, pipe in pipes.items():
        assert pipe.wait_undelivered() == 5, name
        assert NO_SERVER in pipe.said(), name
        assert "not read" not in pipe.said(), name
    assert astray.wait() == 1
    assert NO_SERVER.replace("localhost", "no-such-host.invalid") in astray.said
    assert "client.py: lines not known to be delivered: 1\n" in astray.said
    assert 6 < time.monotonic() - began < 15


@LINUX
@pytest.mark.slow
def test_endless_input_without_a_server_takes_no_memory_and_ends(ken: Ken) -> None:
    ports = (free_port(), free_port())
    lines = ("hello", "x" * 15_000, "👋" + "x" * 15_000)
    sources = [subprocess.Popen(["yes", line], stdout=subprocess.PIPE) for line in lines]
    began = time.monotonic()
    scripts = [ken(ports, stdin=source.stdout) for source in sources]
    most = dict.fromkeys(range(len(scripts)), 0)
    while any(script.process.poll() is None for script in scripts):
        assert time.monotonic() < began + 15, most
        for number, script in enumerate(scripts):
            with contextlib.suppress(IndexError, OSError):  # It has ended.
                most[number] = max(most[number], script.stat("VmHWM"))
        time.sleep(0.1)
    assert 8 <= time.monotonic() - began < 15
    for source, script in zip(sources, scripts, strict=True):
        assert source.stdout
        source.stdout.close()
        source.kill()
        source.wait()
        assert script.wait() == 1
        assert re.search(
            r"delivered: \d+,\d{3}; the rest of the input was not read\n$", script.said
        )
    assert max(most.values()) < 60_000, most


@LINUX
def test_a_line_that_never_ends_takes_no_memory(server: Script, ken: Ken) -> None:
    with Path("/dev/zero").open("rb") as zero:
        script = ken(server.ports, stdin=zero.fileno())
        wait_for(lambda: script.cpu_seconds() > 1, script.cpu_seconds)
        assert script.stat("VmHWM") < 60_000


@pytest.mark.slow
def test_lines_that_a_server_does_not_show_any_more_are_told_within_45_seconds(
    start_server: StartServer, make_bare: MakeBare, ken: Ken, tmp_path: Path
) -> None:
    """All at once: servers that are killed, stand still, or never echo, in mid-pipe and idle."""
    servers = {how: start_server() for how in ("killed", "stopped", "killed idle", "stopped idle")}
    pipes = {
        how: Pipe(ken, tmp_path, server.ports, 100_000)
        for how, server in servers.items()
        if "idle" not in how
    }
    idle = {how: ken(server.ports) for how, server in servers.items() if "idle" in how}
    bare, half = make_bare(), make_bare()
    silent = ken(bare.ports)  # Its server takes lines and never echoes.
    close(silent, typed(0, 1))
    partly = Pipe(ken, tmp_path, half.ports, 1_500)  # Its server echoes no more after 600.
    half.answer(600)
    for script in idle.values():
        write(script, typed(0))
        assert read_line(script) == b"k> 0\n"
    for how, pipe in pipes.items():
        pipe.wait_numbers(4_000)
        signum = signal.SIGKILL if "killed" in how else signal.SIGSTOP
        servers[how].process.send_signal(signum)
    for how, script in idle.items():
        signum = signal.SIGKILL if "killed" in how else signal.SIGSTOP
        servers[how].process.send_signal(signum)
        close(script, typed(1, 2, 3))
    began = time.monotonic()
    for script in idle.values():
        assert script.process.wait(60) == 1
        script.wait()
        assert "client.py: lines not known to be delivered: 3\n" in script.said
    for how, pipe in pipes.items():
        told = pipe.wait_undelivered()
        assert pipe.said().endswith("; the rest of the input was not read\n"), how
        echoed = pipe.numbers()
        assert echoed == list(range(len(echoed))), how
        assert told > client.WINDOW, how
    assert partly.wait_undelivered() == 900
    assert "not read" not in partly.said()
    assert silent.process.wait(60) == 1
    silent.wait()
    assert 29 <= time.monotonic() - began < 45
    assert "given up after 3 times without an echo: k> 0\n" in silent.said
    assert "client.py: lines not known to be delivered: 2\n" in silent.said
    assert bare.take_all()[:4] == bodies(0, 0, 0, 1)


@POSIX
@pytest.mark.slow
def test_a_client_that_was_asleep_does_not_take_its_own_sleep_for_the_servers(
    bare: BareServer, ken: Ken
) -> None:
    script = ken(bare.ports)
    close(script, typed(0, 1))
    bare.answer(1)
    body = bare.take()
    script.process.send_signal(signal.SIGSTOP)
    time.sleep(client.NOT_MOVING + 1)
    script.process.send_signal(signal.SIGCONT)
    time.sleep(1)
    bare.echo(body)
    assert script.wait() == 0


# What a process is started with.


@POSIX
@pytest.mark.parametrize("closed", [
    closed for count in (1, 2, 3) for closed in itertools.combinations((0, 1, 2), count)
])  # fmt: skip
def test_streams_that_are_closed_from_the_start(
    server: Script, start: Start, join: Callable[..., Peer], closed: tuple[int, ...]
) -> None:
    peer = join(server.ports)
    command = 'exec "$@" ' + " ".join(f"{file}{'<' if file == 0 else '>'}&-" for file in closed)
    script = start(
        "client.py", *port_options(server.ports), "--user", "k", stdin=subprocess.PIPE,
        before=["sh", "-c", command, "sh"],
    )  # fmt: skip
    close(script, b"hello\n")
    assert script.wait() == 0
    assert script.said == ""
    if 0 not in closed:
        assert peer.receive() == b"k> \x1b[36mhello\x1b[0m"
    if closed == (2,):
        assert read_all(script) == b"k> hello\n"


@POSIX
def test_a_stdin_that_cannot_be_read_is_told(server: Script, ken: Ken, tmp_path: Path) -> None:
    with (tmp_path / "for writing").open("wb") as stdin:
        script = ken(server.ports, stdin=stdin.fileno())
    assert script.wait() == 1
    assert script.said.endswith(" 0; the rest of the input was not read\n")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "1>&- 2>&-"])
def test_what_cannot_be_told_is_in_the_status(
    server: Script, start: Start, redirection: str
) -> None:
    script = start(
        "client.py", *port_options(server.ports), stdin=subprocess.PIPE,
        before=["sh", "-c", f'exec "$@" {redirection}', "sh"],
    )  # fmt: skip
    close(script, b"no JSON\n")
    assert script.wait() == 1
    assert script.said == ""


def test_a_reader_of_stderr_that_has_gone(server: Script, ken: Ken) -> None:
    script = ken(server.ports)
    write(script, typed(0))
    assert read_line(script) == b"k> 0\n"
    ends = os.pipe()
    os.close(ends[0])
    deaf = ken(server.ports, stderr=ends[1])
    os.close(ends[1])
    close(deaf, b"x" * 20_000 + b"\n" + typed(1))
    assert deaf.wait() == 1
    assert read_line(script) == b"k> 1\n"


@pytest.mark.parametrize("host", [b"caf\xe9", "café".encode(), b"a..b", b"x" * 300])
def test_any_bytes_may_be_a_host_name(start: Start, host: bytes) -> None:
    ports = port_options((free_port(), free_port()))
    script = start("client.py", os.fsdecode(host), *ports, stdin=subprocess.PIPE)
    script.wait_said("client.py: (no server at|not a host name) .*\n")
    close(script)
    assert script.wait() in (0, 2)
    assert "Traceback" not in script.said
    assert script.said.count("\n") == 1
    assert script.said.startswith(("client.py: no server at ", "client.py: not a host name "))


@LINUX
@pytest.mark.parametrize("files", [8, 10, 20, 34])
def test_too_few_open_files_are_one_line_and_status_1(
    server: Script, start: Start, files: int
) -> None:
    script = start(
        "client.py", *port_options(server.ports), stdin=subprocess.PIPE,
        before=["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh"],
    )  # fmt: skip
    close(script, body_of("k", "1"))
    status = script.wait()
    assert (status, script.said.count("\n")) == (1, 1), (status, script.said)
    assert "Too many open files" in script.said
    assert "host name" not in script.said


@LINUX
def test_a_hostile_server_does_not_make_it_grow(bare: BareServer, talking: Script) -> None:
    before = talking.stat("VmHWM")
    for number in range(1, 4):
        bare.pub.send(b"x" * 100_000_000)
        talking.wait_said(f"({NO_SERVER}{CONNECTED}){{{number}}}")
        time.sleep(client.SETTLING)  # until its subscription is in effect
    assert talking.stat("VmHWM") < before + 10_000
    bare.pub.send(b"y" * 65_536)
    assert read_line(talking) == b"y" * 65_536 + b"\n"
    close(talking, typed(1))
    bare.answer(1)
    assert talking.wait() == 0


# Between two hosts.

NetworkPipe = Callable[..., Pipe]


@pytest.fixture
def network_pipe(
    network: Network, start_server: StartServer, ken: Ken, tmp_path: Path
) -> NetworkPipe:
    """Give a function that starts a Pipe on one host, whose server is on the other."""
    ports = start_server(before=network.server_host.command()).ports
    client_host = network.client_host.command()

    def start_pipe(count: int) -> Pipe:
        address = network.server_host.address
        return Pipe(ken, tmp_path, ports, count, address, before=client_host)

    return start_pipe


@pytest.mark.slow
def test_over_64_kilobits_a_second_every_line_arrives(
    network: Network, network_pipe: NetworkPipe
) -> None:
    network.rate, network.delay = 64_000, 0.05
    began = time.monotonic()
    doubled = network_pipe(1_500).wait_all_delivered()
    print(f"64 kbit/s: {time.monotonic() - began:.1f} s, {doubled} doubled")
    assert doubled <= client.WINDOW


@pytest.mark.slow
def test_where_a_tenth_is_lost_every_line_arrives(
    network: Network, network_pipe: NetworkPipe
) -> None:
    network.loss, network.delay = 0.1, 0.1  # 200 ms there and back
    began = time.monotonic()
    doubled = network_pipe(3_000).wait_all_delivered()
    print(f"10 % loss: {time.monotonic() - began:.1f} s, {doubled} doubled")
    assert doubled <= client.WINDOW


@pytest.fixture
def cut_off(
    network: Network, start_server: StartServer, ken: Ken, tmp_path: Path
) -> tuple[Pipe, Script]:
    """Give two clients whose link went down: amid a long pipe, and as the last line is typed."""
    server_host, client_host = network.server_host, network.client_host
    ports = start_server(before=server_host.command()).ports
    last = ken(ports, server_host.address, before=client_host.command())
    write(last, typed(100_000))
    assert read_line(last) == b"k> 100000\n"
    pipe = Pipe(ken, tmp_path, ports, 20_000, server_host.address, before=client_host.command())
    pipe.wait_numbers(3_000)
    network.up = False
    assert len(pipe.numbers()) < 15_000
    close(last, typed(100_001))
    return pipe, last


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3, 12, 24])
def test_a_link_that_is_down_for_a_while_costs_nothing(
    network: Network, cut_off: tuple[Pipe, Script], seconds: int
) -> None:
    pipe, last = cut_off
    time.sleep(seconds)
    network.up = True
    began = time.monotonic()
    printed = read_all(last)
    assert last.wait() == 0
    assert b"k> 100001\n" in printed
    assert pipe.script.process.wait(120) == 0, pipe.said()
    numbers = [number for number in pipe.numbers() if number < 100_000]
    doubled = len(numbers) - 20_000
    print(f"down for {seconds} s: {time.monotonic() - began:.1f} s more, {doubled} doubled")
    assert list(dict.fromkeys(numbers)) == list(range(20_000))
    assert doubled <= client.WINDOW


@pytest.mark.slow
def test_a_link_that_is_down_for_good_is_told_within_45_seconds(
    cut_off: tuple[Pipe, Script],
) -> None:
    pipe, last = cut_off
    began = time.monotonic()
    assert pipe.wait_undelivered() > client.WINDOW
    assert pipe.said().endswith("; the rest of the input was not read\n")
    assert last.process.wait(60) == 1
    last.wait()
    assert last.said.endswith("client.py: lines not known to be delivered: 1\n")
    assert 29 < time.monotonic() - began < 45
    numbers = [number for number in pipe.numbers() if number < 100_000]
    assert numbers == list(range(len(numbers)))


@pytest.fixture
def astray(network: Network) -> Iterator[list[str]]:
    """Give the command that runs another on a host whose name service does not answer."""
    host = network.client_host
    settings = Path("/etc/netns") / host.name / "resolv.conf"  # ip shows it to what runs there.
    settings.parent.mkdir(parents=True)
    settings.write_text(f"nameserver {network.server_host.address}\n")
    network.up = False
    yield host.command()
    settings.unlink()
    settings.parent.rmdir()
    with contextlib.suppress(OSError):  # There are others.
        settings.parent.parent.rmdir()


NO_ANSWER = NO_SERVER.replace("localhost", "chat.example.org")


def test_ctrl_c_ends_it_though_the_name_service_does_not_answer(
    astray: list[str], start: Start
) -> None:
    began = time.monotonic()
    script = start("client.py", "chat.example.org", stdin=subprocess.PIPE, before=astray)
    script.wait_said(NO_ANSWER)
    script.process.send_signal(signal.SIGINT)
    assert script.wait() == 130
    assert "Traceback" not in script.said
    assert 1 < time.monotonic() - began < 5


@pytest.mark.slow
def test_a_name_service_that_does_not_answer_holds_up_nothing(
    astray: list[str], start: Start
) -> None:
    began = time.monotonic()
    script = start(
        "client.py", "chat.example.org", "--user", "k", stdin=subprocess.PIPE, before=astray
    )
    close(script, typed(1))
    assert script.process.wait(60) == 1
    assert 8 < time.monotonic() - began < 15
    script.wait()
    assert script.said == NO_ANSWER + "client.py: lines not known to be delivered: 1\n"
