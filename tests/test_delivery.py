"""README, "Delivery in detail": lines, their echoes, and what is sent again when."""

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
from peers import BareServer, Context, Join, MakeBareServer, line_of, message_of
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
    unix_line_ends,
    wait_for,
    write,
)
from terminal import Open

import client

slow = pytest.mark.slow

BACK = "your lines will be sent when it is back\n"
NO_SERVER = f"client.py: no server at localhost (or its --key differs); {BACK}"
CONNECTED = "client.py: connected to localhost\n"


def lines(*numbers: int) -> list[bytes]:
    """Return lines whose messages are numbers, as the client sends them."""
    return [line_of("k", str(number)) for number in numbers]


def typed(*numbers: int) -> bytes:
    """Return such lines as they are typed with --user k."""
    return b"".join(b"%d\n" % number for number in numbers)


def numbers_in(output: bytes) -> list[int]:
    """Return the numbers among the messages that a client printed."""
    return [int(number) for number in re.findall(rb"^k> (\d+)$", output, re.MULTILINE)]


def undelivered(script: Script) -> int:
    """Wait for a client's end, with status 1; return how many lines it has given up."""
    assert script.process.wait(120) == 1, script.stderr
    script.wait()
    report = re.search(r"client\.py: ([\d,]+) lines? may not have been delivered", script.stderr)
    assert report, script.stderr
    return int(report[1].replace(",", ""))


@pytest.fixture
def ken(start: Start) -> Callable[..., Script]:
    """Give a function that starts a client, which speaks as k, at a server's ports."""

    def start_it(ports: tuple[int, int], *options: str, **how: object) -> Script:
        how.setdefault("stdin", subprocess.PIPE)
        return start("client.py", *port_options(ports), "--user", "k", *options, **how)

    return start_it


Ken = Callable[..., Script]


@pytest.fixture
def talking(ken: Ken) -> Callable[[BareServer], Script]:
    """Give a function that starts a client, and has a bare server echo its first line, 0."""

    def start_it(bare_server: BareServer) -> Script:
        script = ken(bare_server.ports)
        write(script, typed(0))
        bare_server.answer(1)
        assert read_line(script) == b"k> 0\n"
        return script

    return start_it


Talking = Callable[[BareServer], Script]


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
        return numbers_in(unix_line_ends(self.path.read_bytes()))

    def last(self) -> int:
        """Return the number that it printed last, or -1."""
        with self.path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 100))
            return (numbers_in(unix_line_ends(file.read())) or [-1])[-1]

    def wait_last(self, number: int) -> None:
        """Wait until it has printed a number; it must not have printed the last one."""
        wait_for(lambda: self.last() >= number, lambda: (self.last(), self.script.stderr))
        assert self.last() < self.count - 1

    def wait_all_delivered(self, breaks: int = 0) -> None:
        """Wait for its end: all lines were published, in order, and few came twice."""
        assert self.script.process.wait(120) == 0, self.script.stderr
        self.script.wait()
        numbers = [number for number in self.numbers() if number < self.count]
        assert list(dict.fromkeys(numbers)) == list(range(self.count))
        assert len(numbers) - self.count <= 2 * client.WINDOW * breaks


# The loop is the talk's: it pushes each line, and prints each message.


def test_the_loop_pushes_lines_and_prints_messages(
    context: Context, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without tcp. Over inproc, monitors report no handshake."""
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    push, sub = context.socket(zmq.PUSH), context.socket(zmq.SUB)
    pull.set(zmq.RCVTIMEO, 1_000 * TIMEOUT)
    sub.set(zmq.SUBSCRIBE, b"")
    connection = client.Connection(push, sub, "here", False)
    for number, (theirs, ours) in enumerate(((pull, push), (pub, sub))):
        theirs.bind(f"inproc://{number}")
        ours.connect(f"inproc://{number}")
    connection.connected.update((push, sub))
    stdin, outbox = client.Stdin(client.Splitter()), client.Outbox(None)

    def type_lines() -> None:
        for part in (lines(0)[0] + b"\r\n\n", lines(1)[0][:9], lines(1)[0][9:] + b"\n\xff", b"\n"):
            stdin.thread_end.sendall(part)
            time.sleep(0.05)  # so that they come one by one
        stdin.thread_end.close()

    def serve() -> None:
        pub.send(message_of("ann", "hello"))
        for number in range(2):
            assert pull.recv() == lines(number)[0]
            pub.send(message_of("k", str(number)))

    helpers = [threading.Thread(target=target) for target in (type_lines, serve)]
    for helper in helpers:
        helper.start()
    with stdin.loop_end:
        client.chat(stdin, connection, outbox, client.Screen("always"))
    for helper in helpers:
        helper.join()
    assert pull.recv() == b"\xff"
    expected = [message_of(*pair).decode() for pair in (("ann", "hello"), ("k", "0"), ("k", "1"))]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == expected
    assert printed.err == "client.py: the server will drop this line: not UTF-8: \ufffd\n"
    assert outbox.report() == "1 line may not have been delivered"


def test_two_clients_see_each_other(start: Start, server: Script) -> None:
    two_people_chat(start, server.ports)


def test_the_client_talks_to_the_talks_server(start: Start, run_client: RunClient) -> None:
    ports = (free_port(), free_port())
    start("tests/reference.py", "server", *ports)
    done = run_client(ports, b"\n".join(lines(*range(500))))
    assert numbers_in(done.stdout) == list(range(500))
    assert (done.stderr, done.returncode) == (b"", 0)


# Status 0 means that each line was published while this client was subscribed.


def test_the_first_line_is_published_to_its_sender(server: Script, run_client: RunClient) -> None:
    for number in range(10):
        done = run_client(server.ports, typed(number), "--user", "k")
        assert (done.stdout, done.stderr, done.returncode) == (b"k> %d\n" % number, b"", 0)


def test_lines_wait_until_the_subscription_is_in_effect(
    bare_server: BareServer, context: Context
) -> None:
    push, sub = context.socket(zmq.PUSH), context.socket(zmq.SUB)
    connection = client.Connection(push, sub, "localhost", False)
    for sock, port in zip((push, sub), bare_server.ports, strict=True):
        sock.connect(f"tcp://127.0.0.1:{port}")
    began = 0.0

    def connected() -> bool:
        nonlocal began
        began = time.monotonic()
        assert not connection.came_up()
        return len(connection.connected) == 2

    wait_for(connected, lambda: connection.connected)
    wait_for(connection.came_up, lambda: connection.connected)
    assert connection.up
    assert time.monotonic() - began >= 0.1


def test_many_lines_come_back_in_order(server: Script, ken: Ken, tmp_path: Path) -> None:
    Pipe(ken, tmp_path, server.ports, 50_000).wait_all_delivered()


def test_without_input_and_without_a_server_it_ends_at_once(run_client: RunClient) -> None:
    done = run_client((free_port(), free_port()), b"\n")
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)


def test_it_receives_while_the_server_takes_no_line(context: Context, ken: Ken) -> None:
    """The server takes a line only after its subscriber has taken six messages for the last one."""
    pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
    pull.set(zmq.RCVHWM, 10)
    pub.set(zmq.SNDHWM, 10)
    pub.set(zmq.XPUB_NODROP, 1)
    pub.set(zmq.SNDTIMEO, TIMEOUT * 1_000)
    ports = (pull.bind_to_random_port("tcp://*"), pub.bind_to_random_port("tcp://*"))
    script = ken(ports)
    texts = [f"{number} {'x' * 10_000}" for number in range(3_000)]  # more than all buffers hold
    writer = threading.Thread(target=close, args=(script, "\n".join(texts).encode()))
    printed: set[bytes] = set()
    reader = threading.Thread(target=lambda: printed.update(script.process.stdout or ()))
    writer.start()
    reader.start()
    for text in texts:
        assert pull.poll(TIMEOUT * 1_000)
        assert pull.recv() == line_of("k", text)
        for _ in range(6):
            pub.send(message_of("k", text))
    assert script.wait() == 0
    writer.join()
    reader.join()
    assert set(map(unix_line_ends, printed)) == {f"k> {text}\n".encode() for text in texts}


# Up to 1,000 lines are in flight. They go at once, in order. An echo acknowledges its line and all
# lines before it.


def test_a_thousand_lines_go_at_once(bare_server: BareServer, ken: Ken, tmp_path: Path) -> None:
    pipe = Pipe(ken, tmp_path, bare_server.ports, 2_500)
    for first, last in ((0, 1_000), (1_000, 2_000), (2_000, 2_500)):
        assert [bare_server.receive() for _ in range(first, last)] == lines(*range(first, last))
        assert bare_server.receive_all() == []
        bare_server.echo(lines(last - 1)[0])
    assert pipe.script.wait() == 0
    assert bare_server.receive_all(0.1) == []


def test_only_an_echo_acknowledges() -> None:
    outbox = client.Outbox("k")
    for number in (0, 1, 1, 1, 2, 3):
        outbox.add(b"%d" % number)
    outbox.in_flight = 5
    cases: list[tuple[tuple[str, str], int]] = [
        (("ann", "0"), 6),  # someone else's
        (("k", "3"), 6),  # of a line that is not in flight
        (("k", "1"), 4),  # of the first of equal lines
        (("k", "1"), 3),
        (("k", "0"), 3),  # of a line that is acknowledged
        (("k", "2"), 1),
    ]
    for (user, text), left in cases:
        outbox.acknowledge([client.sanitize_message(message_of(user, text))])
        assert len(outbox.lines) == left
        assert outbox.report().startswith(f"{left} line")


def test_equal_lines_need_as_many_echoes(server: Script, run_client: RunClient) -> None:
    done = run_client(server.ports, b"again\n" * 5_000, "--user", "k")
    assert done.stdout == b"k> again\n" * 5_000
    assert done.returncode == 0


@pytest.mark.parametrize("colors", [("", ""), ("\x1b[0;36;49m", "\x1b[0m"), ("", "\x1b[1;31m")])
def test_an_echo_may_have_any_colours(
    bare_server: BareServer, ken: Ken, colors: tuple[str, str]
) -> None:
    bare_server.colors = colors
    script = ken(bare_server.ports)
    close(script, typed(*range(10)))
    assert bare_server.answer(10) == lines(*range(10))
    assert script.wait() == 0
    assert numbers_in(read_all(script)) == list(range(10))


def test_lines_without_an_echo_go_in_their_turn(bare_server: BareServer, start: Start) -> None:
    """As to a server that takes plain text. When the client ends, this one is still behind."""
    script = start("client.py", *port_options(bare_server.ports), stdin=subprocess.PIPE)
    texts = [b"%d %s" % (number, b"x" * 16_000) for number in range(1_500)]
    close(script, b"\n".join(texts))
    time.sleep(0.2)
    assert [bare_server.receive() for _ in texts] == texts
    assert bare_server.receive_all(0.1) == []
    assert undelivered(script) == len(texts)


# Both sockets are connected, or there is no connection. Over a new connection of either, all lines
# go again that are not acknowledged. A notice names what is missing, after a second.

SOCKETS = {"PULL": ("pull",), "PUB": ("pub",), "both": ("pull", "pub")}
sockets = pytest.mark.parametrize("closed", SOCKETS.values(), ids=SOCKETS)


def close_sockets(bare_server: BareServer, names: tuple[str, ...]) -> None:
    """Close sockets of a bare server."""
    for name in names:
        getattr(bare_server, name).close(linger=0)


def open_sockets(bare_server: BareServer, names: tuple[str, ...]) -> None:
    """Open sockets of a bare server again."""
    for name in names:
        getattr(bare_server, f"open_{name}")()


@sockets
def test_lines_in_flight_go_again_over_a_new_connection(
    bare_server: BareServer, ken: Ken, closed: tuple[str, ...]
) -> None:
    script = ken(bare_server.ports)
    close(script, typed(*range(10)))
    bare_server.answer(4)
    assert [read_line(script) for _ in range(4)] == [b"k> %d\n" % n for n in range(4)]
    quick = True
    for first in range(4, 10):  # however often it breaks
        assert [bare_server.receive() for _ in range(first, 10)] == lines(*range(first, 10))
        began = time.monotonic()
        close_sockets(bare_server, closed)
        open_sockets(bare_server, closed)
        assert bare_server.answer(1) == lines(first)
        assert read_line(script) == b"k> %d\n" % first
        quick = quick and time.monotonic() - began < 1
        assert not quick or script.stderr == ""
    assert script.wait() == 0
    assert bare_server.receive_all(0.1) == []


@sockets
def test_a_connection_that_is_down_is_reported(
    bare_server: BareServer, talking: Talking, closed: tuple[str, ...]
) -> None:
    script = talking(bare_server)
    pull_port, pub_port = bare_server.ports
    down = {
        ("pull",): f"client.py: no answer from port {pull_port} of localhost; {BACK}",
        ("pub",): f"client.py: no answer from port {pub_port} of localhost; {BACK}",
        ("pull", "pub"): NO_SERVER,
    }[closed]
    expected = ""
    for number in (1, 2):
        close_sockets(bare_server, closed)
        script.wait_stderr(f"^{re.escape(expected + down)}$")
        write(script, typed(number))
        open_sockets(bare_server, closed)
        expected += down + CONNECTED
        script.wait_stderr(f"^{re.escape(expected)}$")
        assert bare_server.answer(1) == lines(number)
        assert read_line(script) == b"k> %d\n" % number
    close(script)
    assert script.wait() == 0


def test_a_line_that_went_again_has_one_echo(bare_server: BareServer, talking: Talking) -> None:
    """The server that went away had not published it. The next equal line waits for its own."""
    script = talking(bare_server)
    write(script, typed(1))
    assert bare_server.receive() == lines(1)[0]
    close_sockets(bare_server, ("pull",))
    open_sockets(bare_server, ("pull",))
    assert bare_server.answer(1) == lines(1)
    assert read_line(script) == b"k> 1\n"
    close(script, typed(1))
    assert bare_server.receive() == lines(1)[0]
    assert script.process.poll() is None
    bare_server.echo(lines(1)[0])
    assert script.process.wait(4) == 0  # sooner than it would go again


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


# A server may be killed and started again: no line is lost, the order stays, and 2,000 lines at
# most appear twice.


def restart(
    pipe: Pipe, server: Script, start_server: StartServer, at: int, pause: float = 0
) -> Script:
    """Kill a server when a pipe has printed a number, and start another one after a pause."""
    pipe.wait_last(at)
    server.kill()
    time.sleep(pause)
    return start_server(ports=server.ports)


@pytest.mark.parametrize("restarts", [1, 3])
def test_a_server_may_restart_in_mid_pipe(
    server: Script, start_server: StartServer, ken: Ken, tmp_path: Path, restarts: int
) -> None:
    pipe = Pipe(ken, tmp_path, server.ports, 50_000 * restarts)
    for _ in range(restarts):
        server = restart(pipe, server, start_server, pipe.last() + 5_000)
    pipe.wait_all_delivered(restarts)
    assert re.fullmatch(f"({re.escape(NO_SERVER + CONNECTED)})*", pipe.script.stderr)


@slow
def test_a_server_may_restart_later(
    server: Script, start_server: StartServer, ken: Ken, tmp_path: Path
) -> None:
    pipe = Pipe(ken, tmp_path, server.ports, 50_000)
    restart(pipe, server, start_server, 4_000, pause=5)
    pipe.wait_all_delivered(1)
    assert pipe.script.stderr == NO_SERVER + CONNECTED


@pytest.mark.parametrize("pauses", [(0.5, 0.5), pytest.param((25, 1), marks=slow)])
def test_a_server_may_restart_while_nobody_reads_stdout(
    server: Script, start_server: StartServer, ken: Ken, join: Join, pauses: tuple[float, float]
) -> None:
    script = ken(server.ports)
    write(script, typed(0))
    assert read_line(script) == b"k> 0\n"
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


@slow
def test_it_ends_at_once_though_the_server_is_killed_after_the_last_echo(
    start_server: StartServer, ken: Ken, join: Join
) -> None:
    """It takes a few servers for one to be killed in that very moment."""
    for _ in range(6):
        server = start_server()
        script = ken(server.ports)
        write(script, typed(0))
        assert read_line(script) == b"k> 0\n"
        peer = join(server.ports)  # which receives each message after the client
        close(script, typed(1))
        while peer.receive() != message_of("k", "1"):
            pass
        server.process.kill()
        assert script.process.wait(5) == 0


# If no more input can be read and no echo comes for 5 seconds, the newest line goes once more.


@slow
def test_the_newest_line_goes_again_if_no_echo_comes(
    make_bare_server: MakeBareServer, talking: Talking
) -> None:
    counts = (1, 999, 1_000, 1_999)
    servers = [make_bare_server() for _ in counts]
    scripts = [talking(bare_server) for bare_server in servers]
    for count, bare_server, script in zip(counts, servers, scripts, strict=True):
        close(script, typed(*range(1, count + 1)))
        for number in range(1, count + 1):
            assert bare_server.receive() == lines(number)[0]
            if number == client.WINDOW and count > client.WINDOW:
                bare_server.echo(lines(number)[0])  # All echoes behind this one are lost.
    waiting = make_bare_server()
    scripts.append(talking(waiting))
    write(scripts[-1], typed(1))
    assert waiting.receive_all(6) == lines(1)  # More input may come.
    close(scripts[-1])
    cases = zip((*counts, 1), (*servers, waiting), scripts, strict=True)
    for count, bare_server, script in cases:
        assert bare_server.receive() == lines(count)[0]
        assert bare_server.receive_all(0.2) == []
        bare_server.echo(lines(count)[0])
        assert script.wait() == 0


# At the end of the input, it waits for the next echo for 30 seconds, or for 8 if it never had a
# connection. Then it reports how many lines may not have been delivered, and the status is 1.


@slow
@POSIX
def test_lines_are_given_up_after_8_seconds_if_there_never_was_a_connection(
    server: Script, start_server: StartServer, start: Start, ken: Ken, tmp_path: Path
) -> None:
    """The last server stands still from the start: the kernel takes its connections."""
    still = start_server()
    still.process.send_signal(signal.SIGSTOP)
    away = free_port()
    cases = {
        NO_SERVER: (away, free_port()),
        f"client.py: no answer from port {away} of localhost; {BACK}": (away, server.ports[1]),
        f"client.py: no answer from port {away + 1} of localhost; {BACK}": (
            server.ports[0],
            away + 1,
        ),
    }
    pipes = {notice: Pipe(ken, tmp_path, ports, 5) for notice, ports in cases.items()}
    frozen = Pipe(ken, tmp_path, still.ports, 5)
    lost = ken((away, away), "no-such-host.invalid")
    text = start("client.py", *port_options((away, away)), stdin=subprocess.PIPE)
    for script in (lost, text):
        close(script, typed(1))
    began = time.monotonic()
    for notice, pipe in pipes.items():
        assert undelivered(pipe.script) == 5
        assert pipe.script.stderr == f"{notice}client.py: 5 lines may not have been delivered\n"
    assert undelivered(frozen.script) == 5
    assert NO_SERVER in frozen.script.stderr
    assert undelivered(lost) == 1
    assert NO_SERVER.replace("localhost", "no-such-host.invalid") in lost.stderr
    assert undelivered(text) == 1
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
        assert script.stderr.endswith(" delivered; the rest of the input was not read\n")
    assert most < 60


@slow
@POSIX
def test_lines_are_given_up_after_30_seconds_without_an_echo(
    start_server: StartServer, make_bare_server: MakeBareServer, ken: Ken, tmp_path: Path
) -> None:
    """Servers that are killed or stand still, in mid-pipe and idle, or lose a port."""
    servers = {how: start_server() for how in ("killed", "still", "killed idle", "still idle")}
    pipes = {how: Pipe(ken, tmp_path, servers[how].ports, 200_000) for how in ("killed", "still")}
    idle = {how: ken(servers[how].ports) for how in ("killed idle", "still idle")}
    half = make_bare_server()
    partly = Pipe(ken, tmp_path, half.ports, 1_500)
    half.answer(600)
    close_sockets(half, ("pub",))
    for how, script in idle.items():
        write(script, typed(0))
        assert read_line(script) == b"k> 0\n", how
    for how, pipe in pipes.items():
        pipe.wait_last(4_000)
        servers[how].process.send_signal(signal.SIGKILL if "killed" in how else signal.SIGSTOP)
    for how, script in idle.items():
        servers[how].process.send_signal(signal.SIGKILL if "killed" in how else signal.SIGSTOP)
        close(script, typed(1, 2, 3))
    began = time.monotonic()
    for how, script in idle.items():
        assert undelivered(script) == 3, how
    for how, pipe in pipes.items():
        assert undelivered(pipe.script) >= client.WINDOW, how
        assert pipe.script.stderr.endswith("; the rest of the input was not read\n"), how
        assert pipe.numbers() == list(range(len(pipe.numbers()))), how
    assert undelivered(partly.script) >= 900
    assert "not read" not in partly.script.stderr
    assert f"no answer from port {half.ports[1]} of localhost" in partly.script.stderr
    assert 28 <= time.monotonic() - began < 45


@slow
@POSIX
def test_time_in_which_the_client_was_stopped_does_not_count(
    bare_server: BareServer, ken: Ken
) -> None:
    script = ken(bare_server.ports)
    close(script, typed(0, 1))
    bare_server.answer(1)
    line = bare_server.receive()
    script.process.send_signal(signal.SIGSTOP)
    time.sleep(client.DELIVERY_TIMEOUT + 1)
    script.process.send_signal(signal.SIGCONT)
    time.sleep(1)
    bare_server.echo(line)
    assert script.wait() == 0


# Another server may publish nothing, or write its messages in another way. It gets each line once,
# but for the newest of a pipe, which may come twice. While more input may come, lines are given up
# for good after 30 seconds.


@slow
@POSIX
def test_another_server_gets_what_is_piped_once(make_bare_server: MakeBareServer, ken: Ken) -> None:
    """As well from a pipe that stays open. Of 3,000 lines, it gets as many as may be in flight."""
    silent = [make_bare_server() for _ in range(3)]
    others = [make_bare_server() for _ in range(3)]
    received: dict[BareServer, list[bytes]] = {
        bare_server: [] for bare_server in (*silent, *others)
    }

    def serve(until: Callable[[], object]) -> None:
        """Receive lines, and publish nothing, or what is no echo."""
        while not until():
            assert time.monotonic() < began + 60, [len(lines) for lines in received.values()]
            for bare_server, lines in received.items():
                while bare_server.pull.poll(1):
                    lines.append(bare_server.pull.recv())
                    if bare_server in others:
                        bare_server.pub.send(b"12:01 " + lines[-1])

    def ended(script: Script) -> bool:
        return script.process.poll() is not None

    began = time.monotonic()
    scripts = {bare_server: ken(bare_server.ports) for bare_server in received}
    for piped, typing, long in (silent, others):
        close(scripts[piped], typed(*range(300)))
        write(scripts[typing], typed(0, 1))
        close(scripts[long], typed(*range(3_000)))
    serve(lambda: len(received[silent[0]]) >= 300 <= len(received[others[0]]))
    assert time.monotonic() - began < 4  # at once
    serve(lambda: all(ended(scripts[three[n]]) for three in (silent, others) for n in (0, 2)))
    assert 30 < time.monotonic() - began < 45
    for piped, typing, long in (silent, others):
        assert undelivered(scripts[piped]) == 300
        assert received[piped][:300] == lines(*range(300))
        assert received[piped][300:] in ([], lines(299))
        assert undelivered(scripts[long]) >= client.WINDOW
        window = lines(*range(client.WINDOW))
        assert received[long] in (window, [*window, window[-1]])
        write(scripts[typing], typed(2))
    serve(lambda: len(received[silent[1]]) > 2 < len(received[others[1]]))
    for _, typing, _ in (silent, others):
        assert received[typing] == lines(0, 1, 2)
        scripts[typing].process.send_signal(signal.SIGINT)
        assert scripts[typing].wait() == 130
        assert scripts[typing].stderr == "client.py: 3 lines may not have been delivered\n"


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


# The same holds between two hosts, whatever the link is like.

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


LINKS = {  # bits per second, delay, loss, and a number of lines
    "64 kbit/s": (64_000, 0.05, 0, 1_200),
    "a tenth is lost": (None, 0.1, 0.1, 2_000),
}


@slow
@pytest.mark.parametrize(("rate", "delay", "loss", "count"), LINKS.values(), ids=LINKS)
def test_the_link_may_be_slow_or_lose_packets(
    network: Network,
    network_pipe: NetworkPipe,
    rate: float | None,
    delay: float,
    loss: float,
    count: int,
) -> None:
    network.rate, network.delay, network.loss = rate, delay, loss
    network_pipe(count).wait_all_delivered(1)


@pytest.fixture
def cut_off(
    network: Network, start_server: StartServer, ken: Ken, tmp_path: Path
) -> tuple[Pipe, Script]:
    """Give two clients whose link went down: in mid-pipe, and as the last line was typed."""
    server_host, client_host = network.server_host, network.client_host
    ports = start_server(before=server_host.command()).ports
    last = ken(ports, server_host.address, before=client_host.command())
    write(last, typed(100_000))
    assert read_line(last) == b"k> 100000\n"
    pipe = Pipe(ken, tmp_path, ports, 40_000, server_host.address, before=client_host.command())
    pipe.wait_last(3_000)
    network.up = False
    close(last, typed(100_001))
    return pipe, last


@slow
@pytest.mark.parametrize("seconds", [3, 12])
def test_the_link_may_be_down_for_a_while(
    network: Network, cut_off: tuple[Pipe, Script], seconds: int
) -> None:
    pipe, last = cut_off
    time.sleep(seconds)
    network.up = True
    printed = read_all(last)
    assert last.wait() == 0
    assert b"k> 100001\n" in printed
    pipe.wait_all_delivered(1)


@slow
def test_lines_are_given_up_if_the_link_is_down_for_good(cut_off: tuple[Pipe, Script]) -> None:
    pipe, last = cut_off
    began = time.monotonic()
    assert undelivered(pipe.script) >= client.WINDOW
    assert pipe.script.stderr.endswith("; the rest of the input was not read\n")
    assert undelivered(last) == 1
    assert 28 < time.monotonic() - began < 45
    numbers = [number for number in pipe.numbers() if number < 100_000]
    assert numbers == list(range(len(numbers)))


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
    with contextlib.suppress(OSError):  # There are others.
        settings.parent.parent.rmdir()


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
