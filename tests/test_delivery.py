"""README, "Delivery": lines, their echoes, and what is sent again when."""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from network import Network
from peers import BareServer, Context, Join, MakeBareServer, line_of
from processes import (
    LINUX,
    POSIX,
    TIMEOUT,
    RunClient,
    Script,
    Start,
    StartServer,
    close,
    free_port,
    port_options,
    python,
    read_all,
    read_line,
    two_people_chat,
    wait_for,
    write,
)
from terminal import Open

import client

slow = pytest.mark.slow

BACK = "your lines will be sent when it is back\n"
NO_SERVER = f"client.py: no server at localhost (or its --key differs); {BACK}"
NO_PORT = f"client.py: no answer from port {{}} of localhost; {BACK}"
CONNECTED = "client.py: connected to localhost\n"
NOT_READ = " may not have been delivered; the rest of the input was not read\n"


def lines(*numbers: int) -> list[bytes]:
    """Return lines whose messages are numbers, as the client sends them."""
    return [line_of("k", str(number)) for number in numbers]


def typed(*numbers: int) -> bytes:
    """Return such lines as they are typed with --user k."""
    return b"".join(b"%d\n" % number for number in numbers)


def numbers_in(output: bytes) -> list[int]:
    """Return the numbers among the messages that a client printed."""
    return [int(number) for number in re.findall(rb"^k> (\d+)\r?$", output, re.MULTILINE)]


def undelivered(script: Script) -> int:
    """Wait for a client's end, with status 1; return how many lines it has given up."""
    assert script.process.wait(120) == 1, script.stderr
    script.wait()
    report = re.search(r"client\.py: ([\d,]+) lines? may not have been delivered", script.stderr)
    assert report, script.stderr
    return int(report[1].replace(",", ""))


Ken = Callable[..., Script]


@pytest.fixture
def ken(start: Start) -> Ken:
    """Give a function that starts a client, which speaks as k, at a server's ports."""

    def start_it(ports: tuple[int, int], *options: str, **how: object) -> Script:
        how.setdefault("stdin", subprocess.PIPE)
        return start("client.py", *port_options(ports), "--user", "k", *options, **how)

    return start_it


@pytest.fixture
def talking(ken: Ken) -> Ken:
    """Give a function that starts a client, and waits for the echo of its first line, 0."""

    def start_it(server: Script | BareServer, *options: str, **how: object) -> Script:
        script = ken(server.ports, *options, **how)
        write(script, typed(0))
        if isinstance(server, BareServer):
            server.answer(1)
        assert read_line(script) == b"k> 0\n"
        return script

    return start_it


class Pipe:
    """A client whose stdin is a file of numbers, and whose stdout is a file, too."""

    def __init__(
        self, ken: Ken, path: Path, ports: tuple[int, int], count: int, *options: str, **how: object
    ) -> None:
        self.count, self.path = count, path / f"out{ports}"
        source = path / f"in{ports}"
        source.write_bytes(typed(*range(count)))
        with source.open("rb") as stdin, self.path.open("wb") as stdout:
            self.script = ken(ports, *options, stdin=stdin.fileno(), stdout=stdout.fileno(), **how)

    def numbers(self) -> list[int]:
        """Return the numbers that it printed, but not those of another client."""
        return [number for number in numbers_in(self.path.read_bytes()) if number < self.count]

    def last(self) -> int:
        """Return the number that it printed last, or -1."""
        with self.path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 100))
            return (numbers_in(file.read()) or [-1])[-1]

    def wait_last(self, number: int) -> None:
        """Wait until it has printed a number; it must not have printed the last one."""
        wait_for(lambda: self.last() >= number, lambda: (self.last(), self.script.stderr))
        assert self.last() < self.count - 1

    def wait_all_delivered(self, breaks: int = 0) -> None:
        """Wait for its end: all lines were published, in order, and few came twice."""
        assert self.script.process.wait(120) == 0, self.script.stderr
        self.script.wait()
        numbers = self.numbers()
        assert list(dict.fromkeys(numbers)) == list(range(self.count))
        assert len(numbers) - self.count <= 2 * client.WINDOW * breaks


# README, How it works: The server turns it into a colored message and publishes that on port 1338
# to every client, including the sender.


def test_two_clients_see_each_other(start: Start, server: Script) -> None:
    two_people_chat(start, server.ports)


# README, zmq-talk-chat: a faithful port of the chat service from slides 3 to 14


def test_the_client_talks_to_the_talks_server(start: Start, run_client: RunClient) -> None:
    ports = (free_port(), free_port())
    start("tests/reference.py", "server", *ports)
    done = run_client(ports, b"\n".join(lines(*range(500))))
    assert numbers_in(done.stdout) == list(range(500))
    assert (done.stderr, done.returncode) == (b"", 0)


# README, Delivery in detail: There is no history. A client receives what is published while it is
# connected.


def test_a_client_receives_nothing_from_before(
    server: Script, join: Join, run_client: RunClient
) -> None:
    join(server.ports).chat("before")
    assert run_client(server.ports, typed(1), "--user", "k").stdout == b"k> 1\n"


# README, What it adds to the original: Here, the client gives its subscription time to take effect
# first.
# README, Differences from the original: the client gives its subscription time to take effect


def test_the_first_line_is_published_to_its_sender(server: Script, run_client: RunClient) -> None:
    for number in range(3):
        done = run_client(server.ports, typed(number), "--user", "k")
        assert (done.stdout, done.stderr, done.returncode) == (b"k> %d\n" % number, b"", 0)


def test_lines_wait_until_the_subscription_is_in_effect(
    bare_server: BareServer, context: Context
) -> None:
    push, sub = context.socket(zmq.PUSH), context.socket(zmq.SUB)
    connection = client.Connection(push, sub, "localhost", False)
    for sock, port in zip((push, sub), bare_server.ports, strict=True):
        sock.connect(f"tcp://127.0.0.1:{port}")
    connected_at = 0.0
    while not connection.update():
        if len(connection.connected) < 2:
            connected_at = time.monotonic()
    assert time.monotonic() - connected_at >= 0.1


# README, Delivery: Exit status 0 means that the client received the echo of every line it read, so
# every line was published.
# README, Differences from the original: the client waits for the last echo
# README, Delivery in detail: An echo does not prove that other clients received the message.


def test_many_lines_come_back_in_order(server: Script, ken: Ken, tmp_path: Path) -> None:
    Pipe(ken, tmp_path, server.ports, 15_000).wait_all_delivered()


def test_without_input_and_without_a_server_it_ends_at_once(run_client: RunClient) -> None:
    done = run_client((free_port(), free_port()), b"\n")
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)


def test_it_ends_at_once_though_the_server_leaves_after_the_last_echo(
    bare_server: BareServer, talking: Ken
) -> None:
    script = talking(bare_server)
    close(script, typed(1))
    bare_server.answer(1)
    for sock in (bare_server.pub, bare_server.pull):
        sock.close(linger=1_000)
    assert script.process.wait(4) == 0
    assert read_all(script) == b"k> 1\n"


# README, Delivery in detail: If the echo of a later line comes first, the client has missed the
# echoes of the lines before it, and sends these lines again, once.
# README, Delivery in detail: The client misses echoes if its stdout is blocked for long
# README, Delivery in detail: If the echo of a line is missed twice over one connection, the client
# gives up on the line


ECHOES = {  # the echoes that come, the lines that are sent again after one of them, and the rest
    "once": ([5, 6, 7, 8, 9, 0, 1, 2, 3, 4], {5: [0, 1, 2, 3, 4]}, 0),
    "twice": ([5, 6, 7, 0, 3, 4, 8, 9], {5: [0, 1, 2, 3, 4], 0: [8, 9]}, 2),
}


@pytest.mark.parametrize(("echoes", "again", "rest"), ECHOES.values(), ids=ECHOES)
def test_lines_whose_echoes_were_missed_go_again_once(
    bare_server: BareServer, ken: Ken, echoes: list[int], again: dict[int, list[int]], rest: int
) -> None:
    script = ken(bare_server.ports)
    close(script, typed(*range(10)))
    assert [bare_server.receive() for _ in range(10)] == lines(*range(10))
    for number in echoes:
        bare_server.echo(*lines(number))
        expected = lines(*again.get(number, []))
        assert [bare_server.receive() for _ in expected] == expected
        assert bare_server.receive_all(0.1) == []
    assert script.wait() == int(rest > 0)
    assert not rest or undelivered(script) == rest


# README, Differences from the original: the client sends at most 1,000 lines ahead of their echoes
# README, Delivery in detail: It cannot after the end of the input, nor, from a pipe or a file,
# while 1,000 lines are in flight.
# README, Delivery in detail: The client sends up to 1,000 lines before it waits for an echo.


def test_a_thousand_lines_go_at_once(bare_server: BareServer, ken: Ken, tmp_path: Path) -> None:
    pipe = Pipe(ken, tmp_path, bare_server.ports, 2_500)
    for first, last in ((0, 1_000), (1_000, 2_000), (2_000, 2_500)):
        assert [bare_server.receive() for _ in range(first, last)] == lines(*range(first, last))
        assert bare_server.receive_all() == []
        for line in lines(*range(first, last)):
            bare_server.echo(line)
    assert pipe.script.wait() == 0
    assert bare_server.receive_all(0.1) == []


# README, Delivery in detail: Each echo acknowledges its line.
# README, Delivery in detail: The client recognizes an echo by its text, without colors. An
# identical line from somebody who uses the same name is mistaken for it.


def test_only_an_echo_acknowledges() -> None:
    """Each case is a message, and how many lines are left after it."""
    outbox = client.Outbox("k")
    for number in (9, 0, 1, 1, 2, 3):
        outbox.add(b"%d" % number)
    outbox.in_flight = [outbox.queued.popleft() for _ in range(5)]
    cases: list[tuple[bytes, int]] = [
        (b"ann> 9", 6),  # someone else's
        (b"12:01 k> 9", 6),  # written in another way
        (b"k> 3", 6),  # of a line that is not in flight
        (b"k> \x1b[36m9\x1b[0m", 5),
        (b"\x1b[0;36;49mk> 0\x1b[0m", 4),  # in other colours
        (b"k> 0", 4),  # of a line that is acknowledged
        (b"k> 1", 3),  # of the first of equal lines
        (b"k> \x1b[1;31m1", 2),
        (b"k> 2", 1),
    ]
    for message, left in cases:
        outbox.acknowledge([client.sanitize_message(message)])
        assert len(outbox) == left
        assert outbox.report().startswith(f"{left} line")


def test_equal_lines_need_as_many_echoes(server: Script, run_client: RunClient) -> None:
    done = run_client(server.ports, b"again\n" * 3_000, "--user", "k")
    assert done.stdout == b"k> again\n" * 3_000
    assert done.returncode == 0


# README, Delivery in detail: The client is connected while both of its sockets are. When either
# reconnects, the client sends all lines in flight again.

SOCKETS = {"PULL": ("pull",), "PUB": ("pub",), "both": ("pull", "pub")}


def close_sockets(bare_server: BareServer, names: tuple[str, ...]) -> None:
    """Close sockets of a bare server."""
    for name in names:
        getattr(bare_server, name).close(linger=0)


def open_sockets(bare_server: BareServer, names: tuple[str, ...]) -> None:
    """Open sockets of a bare server again."""
    for name in names:
        getattr(bare_server, f"open_{name}")()


@pytest.mark.parametrize("closed", SOCKETS.values(), ids=SOCKETS)
def test_lines_in_flight_go_again_over_a_new_connection(
    bare_server: BareServer, talking: Ken, closed: tuple[str, ...]
) -> None:
    script = talking(bare_server)
    close(script, typed(*range(1, 5)))
    quick = True
    for first in (1, 2, 3):  # however often it breaks
        assert [bare_server.receive() for _ in range(first, 5)] == lines(*range(first, 5))
        began = time.monotonic()
        close_sockets(bare_server, closed)
        open_sockets(bare_server, closed)
        assert bare_server.answer(1) == lines(first)
        assert read_line(script) == b"k> %d\n" % first
        quick = quick and time.monotonic() - began < 1
        assert not quick or script.stderr == ""
    assert bare_server.receive() == lines(4)[0]
    assert script.process.poll() is None
    bare_server.echo(lines(4)[0])
    assert script.process.wait(4) == 0  # sooner than it would go again
    assert bare_server.receive_all(0.1) == []


# README, Differences from the original: a notice; lines are sent once it is up


def test_a_connection_that_is_down_is_reported(
    make_bare_server: MakeBareServer, talking: Ken
) -> None:
    """Each of two times, with the name of what is missing."""
    chats = []
    for closed in SOCKETS.values():
        bare_server = make_bare_server()
        port = bare_server.ports[closed[0] == "pub"]
        down = NO_SERVER if len(closed) == 2 else NO_PORT.format(port)
        chats.append((bare_server, talking(bare_server), closed, down))
    for number in (1, 2):
        for bare_server, _, closed, _ in chats:
            close_sockets(bare_server, closed)
        for bare_server, script, closed, down in chats:
            script.wait_stderr(f"^{re.escape((down + CONNECTED) * (number - 1) + down)}$")
            write(script, typed(number))
            open_sockets(bare_server, closed)
        for bare_server, script, _, down in chats:
            assert bare_server.answer(1) == lines(number)
            assert read_line(script) == b"k> %d\n" % number
            script.wait_stderr(f"^{re.escape((down + CONNECTED) * number)}$")


def test_a_client_may_be_started_before_its_server(ken: Ken, start_server: StartServer) -> None:
    ports = (free_port(), free_port())
    early = ken(ports)
    write(early, typed(1))
    early.wait_stderr(f"^{re.escape(NO_SERVER)}$")
    close(early, typed(2))
    start_server(ports=ports)
    assert read_all(early) == b"k> 1\nk> 2\n"
    assert early.wait() == 0
    assert early.stderr == NO_SERVER + CONNECTED


# README, Delivery in detail: A broken connection causes at most 2,000 resends: up to 1,000 on
# reconnecting, and up to 1,000 if echoes are then missed.
# README, Differences from the original: lines without an echo are sent again, so some may appear
# more than once


@pytest.mark.parametrize("pauses", [(0,), pytest.param((0, 0, 5), marks=slow)])
def test_a_server_may_restart_in_mid_pipe(
    server: Script, start_server: StartServer, ken: Ken, tmp_path: Path, pauses: tuple[int, ...]
) -> None:
    pipe = Pipe(ken, tmp_path, server.ports, 20_000 * len(pauses))
    for pause in pauses:
        pipe.wait_last(pipe.last() + 4_000)
        server.kill()
        time.sleep(pause)
        server = start_server(ports=server.ports)
    pipe.wait_all_delivered(len(pauses))
    assert re.fullmatch(f"({re.escape(NO_SERVER + CONNECTED)})*", pipe.script.stderr)


@pytest.mark.parametrize("pauses", [(0.5, 0.5), pytest.param((25, 1), marks=slow)])
def test_a_server_may_restart_while_nobody_reads_stdout(
    server: Script, start_server: StartServer, talking: Ken, join: Join, pauses: tuple[float, ...]
) -> None:
    script = talking(server)
    for pause in pauses:
        peer = join(server.ports)
        for _ in range(3_000):
            peer.push.send(line_of("ann", "x" * 1_000))
        time.sleep(pause)
        server.kill()
        server = start_server(ports=server.ports)
    printed: list[bytes] = []
    reader = threading.Thread(target=lambda: printed.append(read_all(script)))
    reader.start()
    close(script, typed(*range(1, 1_501)))
    assert script.wait() == 0
    reader.join()
    assert list(dict.fromkeys(numbers_in(printed[0]))) == list(range(1, 1_501))


# README, Delivery in detail: If no echo comes for five seconds, the client sends its newest line
# again, once.


@slow
def test_the_newest_line_goes_again_if_no_echo_comes(
    make_bare_server: MakeBareServer, talking: Ken
) -> None:
    """One client reads a pipe that stays open: while more may come, none goes again."""
    cases = []
    for count in (1, 999):
        bare_server = make_bare_server()
        cases.append((talking(bare_server), bare_server, lines(*range(1, count + 1))))
    for script, bare_server, sent in cases:
        close(script, typed(*range(1, len(sent) + 1)))
        assert [bare_server.receive() for _ in sent] == sent
    waiting = make_bare_server()
    cases.append((talking(waiting), waiting, lines(1)))
    write(cases[-1][0], typed(1))
    assert waiting.receive_all(6) == lines(1)
    close(cases[-1][0])
    for script, bare_server, sent in cases:
        assert bare_server.receive() == sent[-1]
        assert bare_server.receive_all(0.2) == []
        bare_server.echo(sent[-1])
        if len(sent) > 1:  # The client has missed the echoes before.
            assert [bare_server.receive() for _ in sent] == sent
            for line in sent:
                bare_server.echo(line)
        assert script.wait() == 0


# README, Delivery in detail: The client waits a limited time for the next echo.
# README, Delivery in detail: was never up | 8 seconds | exits with status 1


@slow
@POSIX
def test_lines_are_given_up_after_8_seconds_if_there_never_was_a_connection(
    server: Script, start_server: StartServer, start: Start, ken: Ken
) -> None:
    """The kernel takes the connections of a server that stands still from the start."""
    still = start_server()
    still.process.send_signal(signal.SIGSTOP)
    away, pull_port, pub_port = free_port(), *server.ports
    cases = [
        (ken((away, free_port())), NO_SERVER),
        (ken(still.ports), NO_SERVER),
        (ken((away, pub_port)), NO_PORT.format(away)),
        (ken((pull_port, away)), NO_PORT.format(away)),
        (
            ken((away, away), "no-such-host.invalid"),
            NO_SERVER.replace("localhost", "no-such-host.invalid"),
        ),
        (start("client.py", *port_options((away, away)), stdin=subprocess.PIPE), NO_SERVER),
    ]
    began = time.monotonic()
    for script, _ in cases:
        close(script, typed(*range(5)))
    for script, notice in cases:
        assert undelivered(script) == 5
        assert notice in script.stderr
        assert script.stderr.endswith("client.py: 5 lines may not have been delivered\n")
    assert 6 < time.monotonic() - began < 15


@slow
@LINUX
def test_endless_input_without_a_server_takes_little_memory_and_ends(ken: Ken) -> None:
    texts = ("hello", "x" * 15_000, "👋" + "x" * 15_000)
    sources = [subprocess.Popen(["yes", text], stdout=subprocess.PIPE) for text in texts]
    began = time.monotonic()
    ports = (free_port(), free_port())
    scripts = [ken(ports, stdin=source.stdout) for source in sources]
    most = 0.0
    while any(script.process.poll() is None for script in scripts):
        assert time.monotonic() < began + 15
        for script in scripts:
            with contextlib.suppress(IndexError, OSError):  # It has ended.
                most = max(most, script.memory())
        time.sleep(0.1)
    assert time.monotonic() > began + 8
    for source, script in zip(sources, scripts, strict=True):
        assert source.stdout
        source.stdout.close()
        source.kill()
        source.wait()
        assert undelivered(script) >= client.WINDOW
        assert script.stderr.endswith(NOT_READ)
    assert most < 60


@pytest.fixture
def no_name_service(network: Network) -> Iterator[list[str]]:
    """Give the command that runs another on a host whose name service does not answer."""
    host = network.client_host
    settings = Path("/etc/netns") / host.name / "resolv.conf"  # ip shows it to what runs there.
    settings.parent.mkdir(parents=True)
    settings.write_text(f"nameserver {network.server_host.address}\n")
    network.up = False
    yield host.command()
    settings.unlink()
    settings.parent.rmdir()


@slow
def test_a_name_service_that_does_not_answer_delays_nothing(
    no_name_service: list[str], ken: Ken
) -> None:
    notice = NO_SERVER.replace("localhost", "chat.example.org")
    ports = (free_port(), free_port())
    began = time.monotonic()
    waiting, left = (ken(ports, "chat.example.org", before=no_name_service) for _ in range(2))
    close(waiting, typed(1))
    left.wait_stderr(re.escape(notice))
    left.process.send_signal(signal.SIGINT)
    assert left.wait() == 130
    assert time.monotonic() - began < 5
    assert undelivered(waiting) == 1
    assert waiting.stderr == notice + "client.py: 1 line may not have been delivered\n"
    assert 8 < time.monotonic() - began < 15


# README, Delivery in detail: was up at least once | 30 seconds | exits with status 1
# README, Delivery in detail: is down | any time
# README, Delivery: After the end of the input, if no echo comes for 30 seconds, the client reports
# how many lines may not have been delivered, and exits with status 1.
# README, Differences from the original: nobody knows | the client exits with status 1


@slow
@POSIX
def test_lines_are_given_up_after_30_seconds_without_an_echo(
    start_server: StartServer,
    make_bare_server: MakeBareServer,
    talking: Ken,
    ken: Ken,
    tmp_path: Path,
) -> None:
    """Servers that are killed or stand still, in mid-pipe and idle, or lose a port.

    Two clients give up nothing: one without a server, and one that is stopped meanwhile.
    """
    signals = (signal.SIGKILL, signal.SIGSTOP)
    busy = [start_server() for _ in signals]
    pipes = [Pipe(ken, tmp_path, server.ports, 200_000) for server in busy]
    quiet = [start_server() for _ in signals]
    idle = [talking(server) for server in quiet]
    half, echoing = make_bare_server(), make_bare_server()
    partly = Pipe(ken, tmp_path, half.ports, 1_500)
    half.answer(600)
    close_sockets(half, ("pub",))
    stopped = talking(echoing)
    close(stopped, typed(1))
    assert echoing.receive() == lines(1)[0]
    stopped.process.send_signal(signal.SIGSTOP)
    ports = free_port(), free_port()
    patient = ken(ports)
    write(patient, typed(1))
    for pipe in pipes:
        pipe.wait_last(4_000)
    for signum, *both in zip(signals, busy, quiet, strict=True):
        for server in both:
            server.process.send_signal(signum)
    for script in idle:
        close(script, typed(1, 2, 3))
    began = time.monotonic()
    assert [undelivered(script) for script in idle] == [3, 3]
    for pipe in pipes:
        assert undelivered(pipe.script) >= client.WINDOW
        assert pipe.script.stderr.endswith(NOT_READ)
        assert pipe.numbers() == list(range(len(pipe.numbers())))
    assert undelivered(partly.script) >= 900
    assert "not read" not in partly.script.stderr
    assert NO_PORT.format(half.ports[1]) in partly.script.stderr
    assert 28 <= time.monotonic() - began < 45
    stopped.process.send_signal(signal.SIGCONT)
    time.sleep(1)
    echoing.echo(lines(1)[0])
    assert stopped.wait() == 0
    start_server(ports=ports)
    assert read_line(patient) == b"k> 1\n"


# README, Delivery in detail: gives up on the lines in flight, goes on, and in the end exits with
# status 1
# README, Delivery in detail: Lines that the client has given up on are never sent again.


@slow
@POSIX
def test_another_server_gets_what_is_piped_once(make_bare_server: MakeBareServer, ken: Ken) -> None:
    """One client pipes 300 lines, one pipes 3,000, and the stdin of one stays open."""
    received: dict[BareServer, list[bytes]] = {make_bare_server(): [] for _ in range(3)}
    short, long, typing = (ken(bare_server.ports) for bare_server in received)
    to_short, to_long, to_typing = received.values()

    def serve(until: Callable[[], object]) -> None:
        while not until():
            assert time.monotonic() < began + 60, [len(lines) for lines in received.values()]
            for bare_server, lines in received.items():
                while bare_server.pull.poll(1):
                    lines.append(bare_server.pull.recv())
                    bare_server.pub.send(b"12:01 " + lines[-1])

    began = time.monotonic()
    close(short, typed(*range(300)))
    close(long, typed(*range(3_000)))
    write(typing, typed(0, 1))
    serve(lambda: len(to_short) >= 300)
    assert time.monotonic() - began < 15  # They wait for no echo.
    serve(lambda: short.process.poll() is not None is not long.process.poll())
    assert 30 < time.monotonic() - began < 45
    assert undelivered(short) == 300
    assert to_short in (lines(*range(300)), lines(*range(300), 299))
    assert undelivered(long) >= client.WINDOW
    assert to_long in (lines(*range(1_000)), lines(*range(1_000), 999))
    write(typing, typed(2))
    serve(lambda: len(to_typing) > 2)
    assert to_typing == lines(0, 1, 2)
    typing.process.send_signal(signal.SIGINT)
    assert typing.wait() == 130
    assert typing.stderr == "client.py: 3 lines may not have been delivered\n"


@slow
def test_another_server_gets_what_a_person_types_once(
    bare_server: BareServer, open_terminal: Open
) -> None:
    command = python("client.py", *port_options(bare_server.ports), "--user", "k")
    terminal = open_terminal(*command, columns=100)
    terminal.wait_rows("client.py: connected to localhost")
    terminal.type("1\r")
    assert bare_server.receive() == lines(1)[0]
    bare_server.pub.send(b"12:01 k: 1")
    terminal.wait_text("12:01k:1")
    terminal.wait_text("client.py:noechoyetfor1line;thefirst:")
    terminal.type("2\r")
    assert bare_server.receive() == lines(2)[0]
    time.sleep(client.DELIVERY_TIMEOUT - client.ECHO_TIMEOUT + 1)
    terminal.type("3\r")
    assert bare_server.receive() == lines(3)[0]
    close_sockets(bare_server, ("pull", "pub"))
    open_sockets(bare_server, ("pull", "pub"))
    assert bare_server.receive() == lines(3)[0]  # The others are older than 30 seconds.
    assert bare_server.receive_all() == []
    terminal.type("\x03")
    terminal.wait_text("client.py:3linesmaynothavebeendelivered")
    assert terminal.process.wait(TIMEOUT) == 130


# README, What it adds to the original: Lines without an echo are sent again after a broken
# connection or a server restart.


@slow
@pytest.mark.parametrize("lossy", [False, True], ids=["64 kbit/s", "a tenth is lost"])
def test_the_link_may_be_slow_or_lose_packets(
    network: Network, start_server: StartServer, ken: Ken, tmp_path: Path, lossy: bool
) -> None:
    here, there = network.client_host, network.server_host
    server = start_server(before=there.command())
    if lossy:
        network.delay, network.loss = 0.1, 0.1
    else:
        network.delay, network.rate = 0.05, 64_000
    count = 2_000 if lossy else 1_200
    pipe = Pipe(ken, tmp_path, server.ports, count, there.address, before=here.command())
    pipe.wait_all_delivered(1)


@pytest.fixture
def cut_off(
    network: Network, start_server: StartServer, talking: Ken, ken: Ken, tmp_path: Path
) -> tuple[Pipe, Script, Script]:
    """Give three clients whose link is down: in mid-pipe, as the last line was typed, and idle."""
    server = start_server(before=network.server_host.command())
    address, before = network.server_host.address, network.client_host.command()
    last, idle = (talking(server, address, before=before) for _ in range(2))
    pipe = Pipe(ken, tmp_path, server.ports, 40_000, address, before=before)
    pipe.wait_last(3_000)
    network.up = False
    close(last, typed(100_001))
    return pipe, last, idle


CutOff = tuple[Pipe, Script, Script]


@slow
@pytest.mark.parametrize("seconds", [3, 12])
def test_the_link_may_be_down_for_a_while(network: Network, cut_off: CutOff, seconds: int) -> None:
    pipe, last, _ = cut_off
    time.sleep(seconds)
    network.up = True
    assert b"k> 100001\n" in read_all(last)
    assert last.wait() == 0
    pipe.wait_all_delivered(1)


# README, Differences from the original: it is disconnected after about 20 seconds


@slow
def test_a_link_that_is_down_for_good_is_reported(network: Network, cut_off: CutOff) -> None:
    pipe, last, idle = cut_off
    began = time.monotonic()
    idle.wait_stderr("no (server at|answer from port .* of) " + network.server_host.address)
    assert 10 < time.monotonic() - began < 30
    assert undelivered(pipe.script) >= client.WINDOW
    assert pipe.script.stderr.endswith(NOT_READ)
    assert undelivered(last) == 1
    assert 28 < time.monotonic() - began < 45
    assert pipe.numbers() == list(range(len(pipe.numbers())))
