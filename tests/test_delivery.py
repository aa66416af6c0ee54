"""README, "Delivery": lines, their echoes, and what is sent again when."""

import argparse
import math
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import zmq
from network import Network
from peers import BareServer, Context, Join, line_of
from processes import (
    LINUX,
    POSIX,
    REBINDS,
    TIMEOUT,
    RunClient,
    Script,
    Start,
    StartClient,
    StartServer,
    after,
    close,
    free_port,
    port_options,
    read_all,
    read_line,
    wait_for,
    write,
)

import client
from client import Outbox, Watchdog

slow = pytest.mark.slow

BACK = "your lines will be sent when it is back\n"
NO_SERVER = f"client.py: no server at localhost (or its --key differs); {BACK}"
NO_PORT = f"client.py: no answer from tcp://localhost:{{}}; {BACK}"
CONNECTED = "client.py: connected to localhost\n"
REPORT = "client.py: {} may not have been delivered\n"
NOT_READ = (
    r"client\.py: the rest of the input, if any, was not read; "
    r"{} lines may not have been delivered\n"
)


def lines(*numbers: int) -> list[bytes]:
    """Return lines whose messages are numbers, as the client sends them."""
    return [line_of("k", str(number)) for number in numbers]


def typed(*numbers: int) -> bytes:
    """Return such lines as they are typed with --user k."""
    return b"".join(b"%d\n" % number for number in numbers)


def numbers_in(output: bytes) -> list[int]:
    """Return the numbers among the messages that a client printed."""
    return [int(number) for number in re.findall(rb"^k> (\d+)\r?$", output, re.MULTILINE)]


def start_to_connect(
    context: Context, ports: tuple[int, int], host: str = "127.0.0.1"
) -> client.Connection:
    """Return a connection to a server, which is not up yet."""
    options = argparse.Namespace(host=host, push_port=ports[0], sub_port=ports[1], key=None)
    push, sub = client.make_sockets(context, options)
    return client.Connection(push, sub, options, interactive=False)


def connect(context: Context, server: BareServer) -> client.Connection:
    """Return a connection to a server, once it is up."""
    connection = start_to_connect(context, server.ports)

    def is_up() -> bool:
        connection.update()
        return connection.up

    wait_for(is_up, lambda: connection.unconnected)
    return connection


def outbox_of(context: Context, user: str | None, texts: str) -> tuple[Outbox, client.Connection]:
    """Return an outbox after it has pushed lines of one letter each, and a connection for more."""
    connection = start_to_connect(context, (1, 1))  # where no server is
    connection.push, connection.up = context.socket(zmq.PUSH), True
    connection.push.set(zmq.SNDHWM, 0)
    connection.push.connect("inproc://nowhere")  # The socket keeps what is pushed.
    outbox = Outbox(user)
    for text in texts:
        outbox.add(text.encode())
    outbox.push_to(connection)
    return outbox, connection


def push_again(outbox: Outbox, connection: client.Connection) -> None:
    """Push as over a new connection."""
    connection.came_up = True
    outbox.push_to(connection)
    connection.came_up = False


def start_chat(
    context: Context, server: BareServer, screen: client.Screen
) -> tuple[Watchdog, threading.Thread]:
    """Start a chat of three lines, 1, 2 and 3. Return when the server has received them."""
    stdin = client.Stdin(iter([typed(1, 2, 3), b""]).__next__, client.Splitter().feed)
    connection, outbox = connect(context, server), Outbox("k")
    watchdog = Watchdog(outbox, connection, screen)
    arguments = stdin, connection, outbox, watchdog, screen
    chat = threading.Thread(target=client.chat, args=arguments, daemon=True)
    chat.start()
    server.expect(lines(1, 2, 3))
    return watchdog, chat


def report_of(script: Script) -> str:
    """Wait for a client's end, with status 1; return the last line of its stderr."""
    script.process.wait(120)
    assert script.wait() == 1, script.stderr
    return script.stderr.splitlines(keepends=True)[-1]


@pytest.fixture
def talking(start_client: StartClient) -> StartClient:
    """Give a function that starts a client, and waits for the echo of its first line, 0."""

    def start_it(server: Script | BareServer, *options: str, **how: object) -> Script:
        script = start_client(server.ports, *options, **how)
        write(script, typed(0))
        if isinstance(server, BareServer):
            server.answer(1)
        assert read_line(script) == b"k> 0\n"
        return script

    return start_it


class Pipe:
    """A client whose stdin is a file of numbers, and whose stdout is a file, too."""

    def __init__(self, start_client: StartClient, path: Path) -> None:
        self.start_client, self.typed, self.printed = start_client, path / "typed", path / "printed"

    def start(self, ports: tuple[int, int], count: int, *options: str, **how: object) -> None:
        """Start the client, with numbers below count."""
        self.count = count
        self.typed.write_bytes(typed(*range(count)))
        with self.typed.open("rb") as stdin, self.printed.open("wb") as stdout:
            self.script = self.start_client(ports, *options, stdin=stdin, stdout=stdout, **how)

    def numbers(self) -> list[int]:
        """Return the numbers that it printed."""
        return numbers_in(self.printed.read_bytes())

    def wait_for_more(self, count: int) -> None:
        """Wait until it has printed more numbers; it must not have printed the last one."""
        count += len(self.numbers())
        wait_for(lambda: len(self.numbers()) >= count, lambda: self.script.stderr)
        assert self.numbers()[-1] < self.count - 1

    def wait_all_delivered(self, breaks: int) -> None:
        """Wait for its end: all lines were published, in order, and few came twice."""
        self.script.process.wait(120)
        assert self.script.wait() == 0, self.script.stderr
        numbers = self.numbers()
        assert list(dict.fromkeys(numbers)) == list(range(self.count))
        assert len(numbers) - self.count <= client.WINDOW * breaks + 1


@pytest.fixture
def pipe(start_client: StartClient, tmp_path: Path) -> Pipe:
    return Pipe(start_client, tmp_path)


# README, How it works: The server turns it into a colored *message* and publishes that on port 1338
# to every client, including the sender.
# README, Limits: Names are not verified. Two people can use the same name.
@pytest.mark.parametrize("name", ["ken", "ann"])
def test_everybody_sees_each_message(server: Script, start_client: StartClient, name: str) -> None:
    ann = start_client(server.ports, "--user", "ann")
    write(ann, b"here I am\n")
    assert read_line(ann) == b"ann> here I am\n"
    other = start_client(server.ports, "--user", name)
    write(other, "你好 👨‍👩‍👧\n".encode())
    assert read_line(ann) == read_line(other) == f"{name}> 你好 👨‍👩‍👧\n".encode()


# README, zmq-talk-chat: a faithful port of the Ruby chat service from slides 3 to 14
def test_the_client_talks_to_the_talks_server(start: Start, run_client: RunClient) -> None:
    ports = (free_port(), free_port())
    start("tests/reference.py", "server", *ports)
    done = run_client(ports, b"\n".join(lines(*range(500))))
    assert numbers_in(done.stdout) == list(range(500))
    assert (done.stderr, done.returncode) == (b"", 0)


# README, What it adds to the original: The client gives its subscription time to take effect.
def test_lines_wait_for_the_subscription(bare_server: BareServer, context: Context) -> None:
    connection = start_to_connect(context, bare_server.ports)
    connection.notice_at = connected_at = 0.0
    while not connection.up:
        connection.update()
        if connection.unconnected:
            connected_at = time.monotonic()
        else:
            assert connection.new_notice() == ""  # although it would be time for one
    assert time.monotonic() - connected_at >= 0.1


def test_a_break_of_less_than_a_second_causes_no_notice(
    bare_server: BareServer, context: Context
) -> None:
    connection = connect(context, bare_server)
    bare_server.close("pull")
    assert connection.monitors[connection.push].poll(1_000 * TIMEOUT)
    connection.notice_at = connection.retry_at = 0.0  # The client has been suspended meanwhile.
    connection.update()
    assert not connection.up
    assert connection.new_notice() == ""
    assert connection.retry_at > time.monotonic() + client.NOTICE_DELAY


# README, How it works: There is no history: a client receives only what is published while it is
# connected.
# README, Delivery: If the client exits with status 0, the server has published every line you sent
# README, More differences: the client waits for the last echo
# README, What status 0 does not prove: An echo does not prove that other clients received the
# message.
@pytest.mark.parametrize("numbers", [range(15_000), [1] * 3_000], ids=["different", "equal"])
def test_it_prints_the_echo_of_each_line_once_and_nothing_else(
    server: Script, join: Join, run_client: RunClient, numbers: Sequence[int]
) -> None:
    join(server.ports).chat("before")
    done = run_client(server.ports, typed(*numbers), "--user", "k")
    assert done.stdout == b"".join(b"k> %d\n" % number for number in numbers)
    assert (done.stderr, done.returncode) == (b"", 0)


def test_without_input_and_without_a_server_it_ends_at_once(run_client: RunClient) -> None:
    done = run_client((free_port(), free_port()), b"\n")
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)


def test_a_subscription_that_waits_for_a_server_does_not_delay_the_end() -> None:
    context: Context = zmq.Context()
    connection = start_to_connect(context, (free_port(), free_port()))
    connection.sub.poll(100)  # Now the subscription is queued.
    began = time.monotonic()
    context.destroy()
    assert time.monotonic() - began < 1  # as long as the client waits for PUSH


# README, Delivery in detail: A missed echo does no harm if a later line is echoed in time.
# README, Delivery in detail: So in that state, if the client has been connected for five seconds
# and no echo has come for five seconds, it resends its newest line as a probe, whose echo
# acknowledges all lines. It does not send another probe before an echo has come, or the connection
# has broken.
# README, Delivery in detail: The client misses messages, echoes included, if its stdout is blocked
# for a long time
def test_a_missed_echo_does_no_harm(bare_server: BareServer, start_client: StartClient) -> None:
    """The second client has missed the echo of its newest line."""
    script = start_client(bare_server.ports)
    close(script, typed(*range(10)))
    bare_server.expect(lines(*range(10)))
    bare_server.echo(*lines(5))
    assert bare_server.receive_all(1) == []
    bare_server.echo(*lines(9))
    assert script.process.wait(4) == 0
    script = start_client(bare_server.ports)
    close(script, typed(0, 1))
    bare_server.expect(lines(0, 1))
    began = time.monotonic()
    bare_server.expect(lines(1))
    assert client.ECHO_TIMEOUT - client.TICK < time.monotonic() - began < client.ECHO_TIMEOUT + 3
    bare_server.echo(*lines(1))
    assert script.wait() == 0
    bare_server.expect([])


def test_the_newest_line_goes_again_once(context: Context, bare_server: BareServer) -> None:
    """Each case has an event, and the lines that are pushed in the 5 seconds after it."""
    connection, outbox = connect(context, bare_server), Outbox("k")
    watchdog = Watchdog(outbox, connection, client.Screen(color=False))
    cases = [
        ("typed", "abaa"),
        ("a second later", ""),
        ("a", "a"),  # the echo of the first line
        ("a second later", ""),
        ("x", ""),  # somebody else's message
        ("new connection", "baa"),
        ("b", "a"),
        ("a", ""),
    ]
    for event, pushed in cases:
        if event == "typed":
            for text in "aba":
                outbox.add(text.encode())
        connection.came_up = event == "new connection"
        echo_came = outbox.acknowledge([client.sanitize_message(f"k> {event}".encode())])
        outbox.push_to(connection)
        for seconds in (client.ECHO_TIMEOUT - 1, 1):
            assert not watchdog.act(reading=False, echo_came=echo_came)
            watchdog.clock += seconds
            connection.came_up = echo_came = False
        watchdog.act(reading=True, echo_came=False)
        watchdog.act(reading=False, echo_came=False)
        outbox.push_to(connection)
        bare_server.expect([line_of("k", text) for text in pushed])
        watchdog.clock = min(watchdog.clock, client.DELIVERY_TIMEOUT - 10)
    assert not outbox.lines
    for text, pushed in (("c", "c"), ("d", "d"), ("", "d")):  # PUSH is full until d is pushed.
        outbox.push_to(connection)
        if text:
            outbox.add(text.encode())
        watchdog.clock = client.ECHO_TIMEOUT
        watchdog.act(reading=False, echo_came=False)
        outbox.push_to(connection)
        bare_server.expect([line_of("k", text) for text in pushed])


def test_the_time_of_a_line_that_has_left_does_not_count(
    context: Context, bare_server: BareServer
) -> None:
    connection, outbox = connect(context, bare_server), Outbox(None)
    watchdog = Watchdog(outbox, connection, client.Screen(color=False))
    outbox.add(b"x")
    watchdog.clock = 20.0  # "x" has waited for a connection. It leaves, as it gets no echo.
    outbox.push_to(connection)
    watchdog.act(reading=False, echo_came=False)
    assert (outbox.lines, watchdog.clock) == ([], 0.0)
    outbox.add(line_of("k", "given up"))
    outbox.push_to(connection)
    watchdog.clock = client.DELIVERY_TIMEOUT
    watchdog.act(reading=True, echo_came=False)
    assert (outbox.lines, watchdog.clock) == ([], 0.0)


# README, Delivery in detail: Each echo sets the timer back to zero
def test_an_echo_ends_the_silence_and_a_new_connection_allows_a_probe(
    context: Context, bare_server: BareServer
) -> None:
    watchdog, chat = start_chat(context, bare_server, client.Screen(color=False))
    watchdog.clock, watchdog.overdue, watchdog.probe_at = 9.0, True, math.inf  # It has probed.
    bare_server.close("pull")
    bare_server.open("pull")
    bare_server.expect(lines(1, 2, 3))
    assert watchdog.probe_at < math.inf
    bare_server.echo(*lines(1))
    wait_for(lambda: not watchdog.overdue, lambda: watchdog.clock)
    assert watchdog.clock < 9.0
    bare_server.echo(*lines(3))
    chat.join(TIMEOUT)
    assert not chat.is_alive()


# README, Delivery in detail: it resends all lines in flight.
def test_a_probe_does_not_go_ahead_of_them(context: Context, bare_server: BareServer) -> None:
    """A probe is due, but PUSH has been reconnected while stdout was blocked."""
    printing, unblocked = threading.Event(), threading.Event()
    unblocked.set()

    class BlockedScreen(client.Screen):
        def print_messages(self, _messages: list[client.Message]) -> bool:
            printing.set()
            return unblocked.wait(TIMEOUT)

    watchdog, chat = start_chat(context, bare_server, BlockedScreen(color=False))
    unblocked.clear()
    printing.clear()
    assert printing.wait(TIMEOUT)
    bare_server.close("pull")
    bare_server.open("pull")
    assert bare_server.pull.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED).poll(1_000 * TIMEOUT)
    watchdog.clock = client.ECHO_TIMEOUT
    unblocked.set()
    assert bare_server.answer(3) == lines(1, 2, 3)
    chat.join(TIMEOUT)
    assert not chat.is_alive()


# README, More differences: the client sends at most 1,000 lines ahead of their echoes
# README, Delivery in detail: While a total of 1,000 lines are in flight or waiting for a
# connection, the client *pauses* its input: it reads no more from a pipe or a file.
# README, Delivery in detail: The client keeps up to 1,000 lines *in flight*: sent, but not yet
# acknowledged.
def test_a_thousand_lines_go_at_once(bare_server: BareServer, start_client: StartClient) -> None:
    # What it prints is not read, and Windows' pipes take 4 kB only.
    script = start_client(bare_server.ports, stdout=subprocess.DEVNULL)
    close(script, typed(*range(2_500)))
    for window in (range(1_000), range(1_000, 2_000), range(2_000, 2_500)):
        bare_server.expect(lines(*window))
        bare_server.echo(*lines(*window))
    assert script.wait() == 0
    bare_server.expect([])


def test_lines_without_an_echo_take_no_room_in_the_window(context: Context) -> None:
    outbox, _ = outbox_of(context, None, "x" * (client.WINDOW + 1))
    assert not outbox.lines


# README, Delivery in detail: An echo acknowledges its line and all lines before it
# README, What status 0 does not prove: another line, yours or somebody else's, results in the same
# message: the client recognizes an echo only by its text, without colors
def test_only_an_echo_acknowledges_and_ends_the_wait(context: Context) -> None:
    """Each case is a message, how many lines are left after it, and whether it was an echo."""
    outbox, _ = outbox_of(context, "k", "90112")
    outbox.add(b"3")
    cases: list[tuple[bytes, int, bool]] = [
        (b"ann> 9", 6, False),  # someone else's
        (b"12:01 k> 9", 6, False),  # written in another way
        (b"k> 3", 6, False),  # of a line that was not sent
        (b"k> \x1b[36m9\x1b[0m", 5, True),
        (b"k> 9", 5, False),  # of a line that is acknowledged
        (b"\x1b[0;36;49mk> 1\x1b[0m", 3, True),  # in other colours; of the first of equal lines
        (b"k> \x1b[1;31m1", 2, True),
        (b"k> 2", 1, True),
        (b"k> 3", 1, False),  # still not sent
    ]
    for message, left, is_echo in cases:
        assert outbox.acknowledge([client.sanitize_message(message)]) is is_echo
        assert len(outbox.lines) == left
        assert outbox.undelivered_notice().startswith(f"{left} line")
    outbox, connection = outbox_of(context, "k", "12")
    push_again(outbox, connection)
    # The second echo, of a line that was sent twice, ends the wait, too.
    for _ in range(2):
        assert outbox.acknowledge([client.sanitize_message(b"k> 1")])
        assert len(outbox.lines) == 1
    for _ in range(2):
        push_again(outbox, connection)
    for _ in range(4):  # of a line that was sent four times
        outbox.add(b"3")
        assert outbox.acknowledge([client.sanitize_message(b"k> 2")])
    # So does one that comes after all lines had been acknowledged, until a new connection.
    outbox, connection = outbox_of(context, "k", "1")
    push_again(outbox, connection)
    echo = [client.sanitize_message(b"k> 1")]
    assert outbox.acknowledge(echo)
    outbox.add(b"2")
    assert outbox.acknowledge(echo)
    push_again(outbox, connection)
    assert not outbox.acknowledge(echo)
    outbox, _ = outbox_of(context, "k", "12")
    outbox.give_up()
    outbox.add(b"3")
    outbox.acknowledge([client.sanitize_message(b"k> 3")])
    assert len(outbox.lines) == 1


# README, Delivery in detail: | open | down | until the server is up | sends the lines, or resends
# them |
def test_even_a_long_host_name_may_be_down(context: Context) -> None:
    """Its endpoints are longer than what pyzmq reads of zmq.LAST_ENDPOINT."""
    connection = start_to_connect(context, (1, 2), host=".".join(["x" * 60] * 5))
    connection.retry_at = 0.0
    connection.update()
    assert connection.unconnected == {connection.push, connection.sub}


# README, Delivery in detail: When the client reconnects, that is, when both of its sockets are
# connected again, it resends all lines in flight.
# README, More differences: a notice; lines wait until the server is up
@pytest.mark.parametrize(
    "closed",
    [("pull", "pub"), *(pytest.param((name,), marks=slow) for name in ("pull", "pub"))],
)
def test_lines_in_flight_go_again_over_a_new_connection(
    bare_server: BareServer, talking: StartClient, closed: tuple[str, ...]
) -> None:
    """After a short break, of which nothing is said, and a long one."""
    script = talking(bare_server)
    write(script, typed(1, 2, 3))
    bare_server.expect(lines(1, 2, 3))
    began = time.monotonic()
    bare_server.close(*closed)
    bare_server.open(*closed)
    assert bare_server.answer(1) == lines(1)
    assert read_line(script) == b"k> 1\n"
    assert script.stderr == "" or time.monotonic() - began > 1
    bare_server.expect(lines(2, 3))
    bare_server.close(*closed)
    port = bare_server.ports[closed[0] == "pub"]
    notice = NO_SERVER if len(closed) == 2 else NO_PORT.format(port)
    script.wait_stderr(f"{re.escape(notice)}$")
    close(script, typed(4))
    bare_server.open(*closed)
    bare_server.expect(lines(2, 3, 4))
    script.wait_stderr(f"{re.escape(notice + CONNECTED)}$")
    bare_server.echo(*lines(2, 3, 4))
    bare_server.close("pull", "pub")  # Nothing but the echoes is needed any more.
    assert script.process.wait(4) == 0
    assert read_all(script) == b"k> 2\nk> 3\nk> 4\n"


def test_push_takes_no_line_without_a_connection(context: Context) -> None:
    connection = start_to_connect(context, (free_port(), free_port()))
    with pytest.raises(zmq.Again):
        connection.push.send(b"x", zmq.NOBLOCK)


# README, Delivery in detail: So each reconnection causes at most 1,000 resends.
# README, More differences: lines without an echo are sent again
@REBINDS
@pytest.mark.parametrize("pauses", [(0,), pytest.param((0, 0, 5), marks=slow)])
def test_a_server_may_restart_in_mid_pipe(
    server: Script, start_server: StartServer, pipe: Pipe, pauses: tuple[int, ...]
) -> None:
    pipe.start(server.ports, 20_000 * len(pauses))
    for pause in pauses:
        pipe.wait_for_more(4_000)
        server.kill()
        time.sleep(pause)
        server = start_server(ports=server.ports)
    pipe.wait_all_delivered(len(pauses))
    # On a busy machine, there may be a notice, even when one port answers already.
    notices = [NO_SERVER, *(NO_PORT.format(port) for port in server.ports)]
    down = "|".join(map(re.escape, notices))
    assert re.fullmatch(f"(({down}){re.escape(CONNECTED)})*", pipe.script.stderr)


@REBINDS
@pytest.mark.parametrize("pauses", [(0.5, 0.5), pytest.param((25, 1), marks=slow)])
def test_a_server_may_restart_while_nobody_reads_stdout(
    start_server: StartServer, talking: StartClient, join: Join, pauses: tuple[float, ...]
) -> None:
    server = start_server()
    script = talking(server)
    for pause in pauses:
        peer = join(server.ports)
        for _ in range(3_000):
            peer.push.send(line_of("ann", "x" * 1_000))
        time.sleep(pause)
        server.kill()
        server = start_server(ports=server.ports)
    close(script, typed(*range(1, 1_501)))
    numbers = numbers_in(read_all(script))
    assert script.wait() == 0
    assert list(dict.fromkeys(numbers)) == list(range(1, 1_501))


# README, Delivery in detail: How long the client waits for an echo depends on its input and on the
# connection
# README, Delivery in detail: never up | 8 seconds | exits with status 1
@slow
@LINUX
def test_lines_are_given_up_after_8_seconds(
    server: Script, start_server: StartServer, start: Start, start_client: StartClient
) -> None:
    """One client has input without end, of which it reads little."""
    still = start_server()
    still.process.send_signal(signal.SIGSTOP)  # The kernel takes connections nevertheless.
    source = subprocess.Popen(["yes", "👋" + "x" * 15_000], stdout=subprocess.PIPE)
    nobody, (pull_port, pub_port) = free_port(), server.ports
    began = time.monotonic()
    endless = start_client((nobody, nobody), stdin=source.stdout)
    cases = [
        (start_client((nobody, nobody)), NO_SERVER),
        (start_client(still.ports), NO_SERVER),
        (start_client((nobody, pub_port)), NO_PORT.format(nobody)),
        (start_client((pull_port, nobody)), NO_PORT.format(nobody)),
        (start("client.py", *port_options((nobody, nobody)), stdin=subprocess.PIPE), NO_SERVER),
    ]
    for script, _ in cases:
        close(script, typed(*range(5)))
    time.sleep(5)
    assert endless.memory() < 60
    assert re.fullmatch(NOT_READ.format(r"\d+,\d+"), report_of(endless))
    source.kill()
    source.communicate()
    for script, notice in cases:
        assert report_of(script) == REPORT.format("5 lines")
        assert notice in script.stderr
    assert 8 < time.monotonic() - began < 15


@slow
def test_a_silent_name_service(network: Network, start_client: StartClient, tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text(f"nameserver {network.server_host.address}\n")
    network.become(loss=1)
    mount = after(f"mount --bind {tmp_path}/resolv.conf /etc/resolv.conf")
    before = network.client_host.command(*mount)  # which alone sees the mount
    ports = (free_port(), free_port())
    began = time.monotonic()
    waiting, left = (start_client(ports, "chat.example.org", before=before) for _ in range(2))
    close(waiting, typed(1))
    notice = NO_SERVER.replace("localhost", "chat.example.org")
    left.wait_stderr(re.escape(notice))
    left.process.send_signal(signal.SIGINT)
    assert left.wait() == 130
    assert time.monotonic() - began < 5
    assert waiting.wait() == 1
    assert waiting.stderr == notice + REPORT.format("1 line")
    assert 8 < time.monotonic() - began < 15


# README, Delivery in detail: was up at least once | 30 seconds | exits with status 1
# README, Delivery in detail: open | down | until the server is up
# README, Delivery: If none comes for 30 seconds (or 8, if it never reached the server), it exits
# with status 1, and says how many lines may be lost.
# README, Delivery in detail: At the end of the input, the client waits until all lines are
# acknowledged
# README, Delivery in detail: When the client gives up and exits, it reports how many of the lines
# that it has read may not have been published, and adds a note if it has not seen the end of the
# input.
# README, Delivery in detail: Time during which the client is suspended, or its stdout is blocked,
# does not count.
@slow
@POSIX
def test_lines_are_given_up_after_30_seconds(context: Context, talking: StartClient) -> None:
    """Two clients give up nothing: one that may get more input, and one that is stopped."""
    servers = [BareServer(context) for _ in range(4)]
    ended, full, patient, stopped = (talking(server) for server in servers)
    close(ended, typed(1, 2, 3))
    close(full, typed(*range(1, 3_000)))
    write(patient, typed(1))
    close(stopped, typed(1))
    for server, count in zip(servers, (3, 1_000, 1, 1), strict=True):
        server.expect(lines(*range(1, count + 1)))
    stopped.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    for server in servers[:3]:
        server.close("pull", "pub")
    assert report_of(ended) == REPORT.format("3 lines")
    assert re.fullmatch(NOT_READ.format("2,999"), report_of(full))
    assert 28 < time.monotonic() - began < 45
    stopped.process.send_signal(signal.SIGCONT)
    time.sleep(1)  # in which it could give up
    servers[3].echo(*lines(1))
    assert stopped.wait() == 0
    servers[2].open("pull", "pub")
    assert servers[2].answer(1) == lines(1)
    assert read_line(patient) == b"k> 1\n"


# README, Delivery in detail: gives up on the lines in flight and goes on; when it ends, its status
# is 1
# README, Delivery in detail: Lines that the client has given up on are never sent again.
# README, Delivery in detail: While the input is open, there is no probe, because the next line has
# the same effect. If the client is connected and no echo comes for 30 seconds, it gives up on the
# lines in flight
@slow
@POSIX
def test_another_server_gets_each_line_once(context: Context, start_client: StartClient) -> None:
    """One client pipes 300 lines, one pipes 6,000, and the stdin of one stays open."""
    servers = [BareServer(context) for _ in range(3)]
    short, long, typing = (start_client(server.ports) for server in servers)
    began = time.monotonic()
    close(short, typed(*range(300)))
    close(long, typed(*range(6_000)))
    write(typing, typed(0, 1))
    for server, count in zip(servers, (300, 1_000, 2), strict=True):
        for line in lines(*range(count)):
            assert server.receive() == line
            server.pub.send(b"12:01 " + line)
    assert report_of(short) == REPORT.format("300 lines")
    assert re.fullmatch(NOT_READ.format(r"\d+,\d+"), report_of(long))
    assert 30 < time.monotonic() - began < 45
    # The newest line went again, except where more may be typed.
    assert [server.receive_all() for server in servers] == [lines(299), lines(999), []]
    time.sleep(1)  # By now, the third one has given up, too.
    write(typing, typed(2))
    servers[2].expect(lines(2))
    servers[2].close("pull", "pub")
    servers[2].open("pull", "pub")
    servers[2].expect(lines(2))
    typing.process.send_signal(signal.SIGINT)
    assert typing.wait() == 130
    assert typing.stderr.endswith(REPORT.format("3 lines"))


# README, What it adds to the original: The client reconnects and resends the lines that still wait
# for their echo
@slow
@pytest.mark.parametrize("link", [(0, 0.05, 64_000), (0.1, 0.1, math.inf)], ids=["slow", "lossy"])
def test_the_link_may_be_slow_or_lose_packets(
    network: Network,
    start_server: StartServer,
    talking: StartClient,
    pipe: Pipe,
    link: tuple[float, ...],
) -> None:
    """A listener on the server's host gets all lines. The client may be subscribed too late."""
    server = start_server(before=network.server_host.command())
    listener = talking(server, before=network.server_host.command())
    network.become(*link)
    address, before = network.server_host.address, network.client_host.command()
    pipe.start(server.ports, 1_500, address, before=before)
    pipe.script.process.wait(120)
    assert pipe.script.wait() == 0, pipe.script.stderr
    close(listener, typed(1_500))
    assert list(dict.fromkeys(numbers_in(read_all(listener)))) == list(range(1_501))


@slow
@pytest.mark.parametrize("seconds", [3, 12])
def test_the_link_may_be_down_for_a_while(
    network: Network, start_server: StartServer, talking: StartClient, pipe: Pipe, seconds: int
) -> None:
    server = start_server(before=network.server_host.command())
    address, before = network.server_host.address, network.client_host.command()
    last = talking(server, address, before=before)
    pipe.start(server.ports, 20_000, address, before=before)
    pipe.wait_for_more(3_000)
    network.become(loss=1)
    close(last, b"last\n")
    time.sleep(seconds)
    network.become()
    assert b"k> last\n" in read_all(last)
    assert last.wait() == 0
    pipe.wait_all_delivered(1)


# README, More differences: it is disconnected after about 20 seconds
@slow
def test_a_server_that_vanishes_is_reported(
    network: Network, start_server: StartServer, talking: StartClient
) -> None:
    server = start_server(before=network.server_host.command())
    address, before = network.server_host.address, network.client_host.command()
    script = talking(server, address, before=before)
    network.become(loss=1)
    began = time.monotonic()
    script.wait_stderr(f"no (server at|answer from port .* of) {address}")
    assert 10 < time.monotonic() - began < 30
