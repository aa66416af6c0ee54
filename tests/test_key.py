"""--key: the files, the chat among those invited, and what strangers get of it: nothing."""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
import zmq.auth
from bare import body_of, close, read_all, read_line, two_people_chat, write
from benchmark import GREETING, frame
from conftest import (
    ROOT,
    TIMEOUT,
    Peer,
    RunClient,
    Script,
    Start,
    free_port,
    listening,
    port_options,
    wait_for,
)
from test_server import chat_body, published

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes of files, signals, terminals")
slow = pytest.mark.slow

Context = zmq.Context[zmq.Socket[bytes]]


@pytest.fixture
def chat_key(tmp_path: Path) -> Path:
    """Make a pair of keys; give the public one's file, which is the invitation."""
    return make_keys(tmp_path, "chat")


def make_keys(directory: Path, name: str) -> Path:
    """Make a pair of keys; return the public one's file."""
    return Path(zmq.auth.create_certificates(directory, name)[0])


StartKeyed = Callable[..., Script]


@pytest.fixture
def start_keyed(start: Start) -> StartKeyed:
    """Give a function that starts server.py with the keys of an invitation, or with None."""

    def start_it(key: Path | None, ports: tuple[int, int] | None = None) -> Script:
        pull_port, pub_port = ports or (free_port(), free_port())
        options = ["--pull-port", pull_port, "--pub-port", pub_port]
        if key:
            options += ["--key", key.with_suffix("")]
        return listening(start("server.py", *options))

    return start_it


@pytest.fixture
def keyed(start_keyed: StartKeyed, chat_key: Path) -> Script:
    """Give a server with a key, that of `chat_key`."""
    return start_keyed(chat_key)


def equip(sock: zmq.Socket[bytes], key: Path | None) -> zmq.Socket[bytes]:
    """Give a socket of ours a server's public key, if there is one; return it."""
    if key:
        sock.curve_publickey, sock.curve_secretkey = zmq.curve_keypair()
        sock.curve_serverkey = zmq.auth.load_certificate(key)[0]
    return sock


class Guest(Peer):
    """A Peer with an invitation."""

    def __init__(self, context: Context, ports: tuple[int, int], key: Path | None) -> None:
        self.push = equip(context.socket(zmq.PUSH), key)
        self.sub = equip(context.socket(zmq.SUB), key)
        self.subs = [self.sub]
        self.push.connect(f"tcp://127.0.0.1:{ports[0]}")
        self.sub.setsockopt(zmq.SUBSCRIBE, b"")
        self.sub.connect(f"tcp://127.0.0.1:{ports[1]}")
        self._join()

    def says_and_hears(self, text: str) -> None:
        """Say something, and hear that next, and so nothing that anyone else has said."""
        self.push.send(chat_body(text))
        assert self.receive() == published("k", text)


# The files.


def cd(directory: Path) -> list[str]:
    """Return the command that runs what follows it in a directory."""
    return ["sh", "-c", 'cd "$0" && exec "$@"', str(directory)]


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


ANY_PORTS = ["--pull-port", "0", "--pub-port", "0"]


@pytest.mark.parametrize("umask", ["000", "022", "777"])
def test_both_files_are_made_and_readable_by_their_owner_alone(
    start: Start, tmp_path: Path, umask: str
) -> None:
    before = ["sh", "-c", f'umask {umask}; cd "$0" && exec "$@"', str(tmp_path)]
    script = listening(start("server.py", "--key", "chat", *ANY_PORTS, before=before))
    assert {file.name: mode(file) for file in tmp_path.iterdir()} == {
        "chat.key": 0o600,
        "chat.key_secret": 0o600,
    }
    assert "encrypted" in script.said
    assert re.search(r"\bchat\.key\n", script.said), "the file to hand out"
    assert "chat.key_secret" not in script.said


def test_the_files_are_used_from_then_on(start: Start, tmp_path: Path, context: Context) -> None:
    contents = []
    for _ in range(2):
        script = listening(start("server.py", "--key", "chat", *ANY_PORTS, before=cd(tmp_path)))
        Guest(context, script.ports, tmp_path / "chat.key").says_and_hears("here I am")
        script.process.terminate()
        assert script.wait() == 0
        contents.append({file.name: file.read_bytes() for file in tmp_path.iterdir()})
    assert contents[0] == contents[1]


@pytest.mark.parametrize("name", ["sub/chat", "./chat", "chat.v2", "größe 1", "-"])
def test_a_name_may_be_a_path(start: Start, tmp_path: Path, context: Context, name: str) -> None:
    (tmp_path / "sub").mkdir()
    script = listening(start("server.py", f"--key={name}", *ANY_PORTS, before=cd(tmp_path)))
    script.wait_said(r"encrypted.*\n")
    assert f"{name}.key\n" in script.said
    Guest(context, script.ports, tmp_path / f"{name}.key").says_and_hears("here I am")


def test_the_name_of_the_invitation_names_the_chat_too(start: Start, tmp_path: Path) -> None:
    script = listening(start("server.py", "--key", "chat.key", *ANY_PORTS, before=cd(tmp_path)))
    assert script.said.endswith(" chat.key\n")
    assert {file.name for file in tmp_path.iterdir()} == {"chat.key", "chat.key_secret"}


def refuses(script: Script, *words: str) -> None:
    """Check that a server says one line with these words, listens nowhere, and ends with 1."""
    assert script.wait() == 1
    assert re.fullmatch(r"server\.py: .+\n", script.said), script.said
    assert "--key" in script.said
    assert "listens" not in script.said
    for word in words:
        assert word in script.said


def put_other(directory: Path, *suffixes: str) -> None:
    """Replace files of the chat by those of another pair of keys."""
    (directory / "other").mkdir()
    make_keys(directory / "other", "chat")
    for suffix in suffixes:
        shutil.move(directory / "other" / f"chat{suffix}", directory / f"chat{suffix}")
    shutil.rmtree(directory / "other")


def edit(file: Path, pattern: str, new: str) -> None:
    """Replace what matches a pattern."""
    text, count = re.subn(pattern, new, file.read_text(), flags=re.DOTALL)
    assert count == 1
    file.write_text(text)


def change_secret(directory: Path) -> None:
    """Have the secret file hold the invitation's public key beside another pair's secret one."""
    secret = zmq.curve_keypair()[1].decode()
    edit(directory / "chat.key_secret", r'secret-key = "[^"]*"', f'secret-key = "{secret}"')


def make_directory(file: Path) -> None:
    """Put a directory in a file's place."""
    file.unlink()
    file.mkdir()


PUBLIC, SECRET = ".key", ".key_secret"
Damage = Callable[[Path], object]
BOTH_HALVES: dict[str, Damage] = {  # for either file, its path given
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "noise": lambda file: file.write_bytes(random.Random(1).randbytes(300)),
    "cut short": lambda file: edit(file, r'-key = "(.{20}).*', r'-key = "\1'),
    "a directory": make_directory,
    "no sign": lambda file: edit(file, "-key = .*", "-key"),  # The key may hold one, too.
    "no keys": lambda file: edit(file, "(public|secret)-key =.*", ""),
}
DAMAGED: dict[str, Damage] = {
    f"{half[1:]} {what}": lambda directory, half=half, damage=damage: damage(
        directory / f"chat{half}"
    )
    for half in (PUBLIC, SECRET)
    for what, damage in BOTH_HALVES.items()
} | {
    "secret not z85": lambda where: edit(
        where / "chat.key_secret", r't-key = ".{5}', 't-key = "~~~~~'
    ),
    "another's public": lambda where: put_other(where, PUBLIC),
    "another's secret": lambda where: put_other(where, SECRET),
    "another's secret with our public": change_secret,
    "public twice": lambda where: shutil.copy(where / "chat.key", where / "chat.key_secret"),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_keys_that_cannot_be_used_are_one_line_and_stay_as_they_are(
    start: Start, tmp_path: Path, chat_key: Path, damage: Damage
) -> None:
    assert chat_key.exists()
    damage(tmp_path)
    before = {file: file.is_file() and file.read_bytes() for file in tmp_path.iterdir()}
    refuses(start("server.py", "--key", tmp_path / "chat", *ANY_PORTS), "chat.key", "chat")
    assert before == {file: file.is_file() and file.read_bytes() for file in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["", "missing/chat", "file/chat", "sub/", "x" * 300])
def test_a_name_that_cannot_be_used_is_one_line_and_makes_nothing(
    start: Start, tmp_path: Path, name: str
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").touch()
    refuses(start("server.py", f"--key={name}", *ANY_PORTS, before=cd(tmp_path)))
    assert {file.name for file in tmp_path.rglob("*")} == {"sub", "file"}


def test_a_libzmq_without_curve_is_one_line_and_makes_nothing(start: Start, tmp_path: Path) -> None:
    """What such a libzmq answers is answered to the real script."""
    refusal = "def refuse(*_):\n    raise zmq.ZMQError(zmq.ENOTSUP)\n"
    patch = f"import zmq\n{refusal}zmq.curve_keypair = zmq.curve_public = refuse\n"
    (tmp_path / "sitecustomize.py").write_text(patch)
    (tmp_path / "keys").mkdir()
    before = ["env", f"PYTHONPATH={tmp_path}", "PYTHONDONTWRITEBYTECODE=1"]
    chat = tmp_path / "keys" / "chat"
    refuses(start("server.py", "--key", chat, *ANY_PORTS, before=before), "not supported")
    assert not list(chat.parent.iterdir())


@pytest.mark.parametrize("script", ["server.py", "client.py"])
def test_what_only_keys_need_is_not_imported_without_them(script: str) -> None:
    code = f"import sys, {script[:-3]}; print('zmq.auth' in sys.modules)"
    done = subprocess.run([sys.executable, "-Bc", code], cwd=ROOT, capture_output=True)
    assert done.stdout == b"False\n"


# The chat among those invited.


def test_the_invited_see_each_other_live(start: Start, keyed: Script, chat_key: Path) -> None:
    two_people_chat(start, keyed.ports, "--key", chat_key)


def test_thousands_of_piped_lines_come_back_in_order(
    keyed: Script, chat_key: Path, run_client: RunClient
) -> None:
    lines = [b"%d" % number for number in range(20_000)]
    done = run_client(keyed.ports, b"\n".join(lines), "--user", "k", "--key", str(chat_key))
    assert done.stdout == b"".join(b"k> " + line + b"\n" for line in lines)
    assert (done.stderr, done.returncode) == (b"", 0)


LONGEST = 16_384
LONGEST_SAID = LONGEST - len(body_of("k", ""))


def test_the_longest_lines_pass_to_the_byte_and_one_byte_more_is_refused(
    keyed: Script, chat_key: Path, run_client: RunClient
) -> None:
    lines = [b"x" * (LONGEST_SAID - less) for less in (40, 34, 33, 32, 1, 0)]
    typed = b"\n".join([*lines, b"y" * (LONGEST_SAID + 1), b"the end"])
    done = run_client(keyed.ports, typed, "--user", "k", "--key", str(chat_key))
    assert done.stdout == b"".join(b"k> %s\n" % line for line in [*lines, b"the end"])
    assert done.stderr.count(b"\n") == 2
    assert done.returncode == 1


def disconnected(monitor: zmq.Socket[bytes]) -> bool:
    """Return whether a monitor tells that a server has hung up."""
    return bool(monitor.poll(0)) and bool(monitor.recv_multipart())


def test_the_server_takes_the_longest_line_and_hangs_up_at_a_longer_one(
    keyed: Script, chat_key: Path, context: Context
) -> None:
    guest = Guest(context, keyed.ports, chat_key)
    monitor = guest.push.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    frame_of = b'{"user":"k","message":"%s"}'
    guest.push.send(frame_of % (b"x" * (LONGEST - len(frame_of) + 2)))
    assert guest.receive() == published("k", "x" * (LONGEST - len(frame_of) + 2))
    assert not monitor.poll(100)
    guest.push.send(frame_of % (b"x" * (LONGEST - len(frame_of) + 3)))
    wait_for(lambda: disconnected(monitor), lambda: "it did not hang up")


def test_subscriptions_are_limited_as_without_a_key(
    keyed: Script, chat_key: Path, context: Context
) -> None:
    guest = Guest(context, keyed.ports, chat_key)
    monitor = guest.sub.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    guest.sub.setsockopt(zmq.SUBSCRIBE, b"x" * 500)
    guest.says_and_hears("still here")
    assert not monitor.poll(100)
    guest.sub.setsockopt(zmq.SUBSCRIBE, b"x" * 513)
    wait_for(lambda: disconnected(monitor), lambda: "it did not hang up")


def test_a_server_killed_amid_a_pipe_and_started_again_costs_nothing(
    start: Start, start_keyed: StartKeyed, keyed: Script, chat_key: Path, tmp_path: Path
) -> None:
    lines = [b"%d" % number for number in range(20_000)]
    typed = tmp_path / "typed"
    typed.write_bytes(b"\n".join(lines))
    options = [*port_options(keyed.ports), "--user", "k", "--key", chat_key]
    with typed.open("rb") as file:
        pipe = start("client.py", *options, stdin=file.fileno())
    shown = [read_line(pipe) for _ in range(1_000)]
    keyed.process.kill()
    keyed.wait()
    start_keyed(chat_key, keyed.ports)
    shown += read_all(pipe).splitlines(keepends=True)
    assert set(shown) == {b"k> %s\n" % line for line in lines}
    assert list(dict.fromkeys(shown)) == [b"k> %s\n" % line for line in lines]
    assert pipe.wait() == 0


def test_the_echo_is_the_receipt(start: Start, keyed: Script, chat_key: Path) -> None:
    """A server that has stopped takes lines, but nobody sees them: the client waits for it."""
    options = [*port_options(keyed.ports), "--user", "k", "--key", chat_key]
    person = start("client.py", *options, stdin=subprocess.PIPE)
    write(person, b"one\n")
    assert read_line(person) == b"k> one\n"
    keyed.process.send_signal(signal.SIGSTOP)
    close(person, b"two\n")
    with pytest.raises(subprocess.TimeoutExpired):
        person.process.wait(0.5)
    keyed.process.send_signal(signal.SIGCONT)
    assert read_all(person) == b"k> two\n"
    assert person.wait() == 0


CLIENT_DAMAGE = {
    **BOTH_HALVES,
    "not z85": lambda file: edit(file, r'c-key = ".{5}', 'c-key = "~~~~~'),
    "not ASCII": lambda file: edit(file, r'c-key = ".{5}', 'c-key = "äöüßÿ'),
    "too long": lambda file: edit(file, r'c-key = "', 'c-key = "aaaaa'),
}


@pytest.mark.parametrize("damage", CLIENT_DAMAGE.values(), ids=CLIENT_DAMAGE)
def test_a_file_that_is_no_key_is_one_line_and_status_1(
    start_keyed: StartKeyed, run_client: RunClient, chat_key: Path, damage: Damage
) -> None:
    open_to_all = start_keyed(None)
    damage(chat_key)
    done = run_client(open_to_all.ports, b"hello\n", "--user", "k", "--key", str(chat_key))
    assert done.stdout == b""
    assert re.fullmatch(rb"client\.py: --key: .*chat\.key.*\n", done.stderr), done.stderr
    assert done.returncode == 1


def test_an_empty_name_is_no_file(run_client: RunClient) -> None:
    done = run_client((free_port(), free_port()), b"hello\n", "--key", "")
    assert done.stderr.startswith(b"client.py: --key: ")
    assert (done.stderr.count(b"\n"), done.returncode) == (1, 1)


# Those who are not invited.


@contextlib.contextmanager
def tunnel() -> Iterator[int]:
    """Give a port where connections are taken and then closed: a tunnel, and no server behind."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(TIMEOUT)


# Whether the server has a key, and which one the client has: none, another, or the right one.
DOORS = {
    "no key": (True, None),
    "wrong key": (True, "other"),
    "key where there is none": (False, "chat"),
}


def client_key(name: str | None, directory: Path) -> Path | None:
    """Return the invitation of a name; make it if there is none yet."""
    if name is None:
        return None
    file = directory / f"{name}.key"
    return file if file.exists() else make_keys(directory, name)


# A raw PUSH and a raw SUB in a process of its own, for a context where handshakes have failed may
# never end: `stranger.py PULL_PORT PUB_PORT [KEY]`. It prints what it reads.
STRANGER = """
import contextlib, sys, zmq
context = zmq.Context()
socks = [context.socket(kind) for kind in (zmq.PUSH, zmq.SUB)]
push, sub = socks
monitors = [sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED) for sock in socks]
sub.setsockopt(zmq.SUBSCRIBE, b"")
for sock, port in zip(socks, sys.argv[1:]):
    if sys.argv[3:]:
        sock.curve_publickey, sock.curve_secretkey = zmq.curve_keypair()
        sock.curve_serverkey = sys.argv[3].encode()
    sock.connect(f"tcp://127.0.0.1:{port}")
with contextlib.suppress(zmq.Again):  # It may be turned away meanwhile.
    for number in range(100):
        push.send(b'{"user": "stranger", "message": "%d"}' % number, zmq.NOBLOCK)
for monitor in monitors:
    monitor.poll()
print("turned away", file=sys.stderr, flush=True)
while True:
    print(sub.recv(), flush=True)
"""


@pytest.mark.parametrize(("has_key", "name"), DOORS.values(), ids=DOORS)
def test_the_uninvited_read_nothing_and_publish_nothing(
    start: Start,
    start_keyed: StartKeyed,
    context: Context,
    chat_key: Path,
    tmp_path: Path,
    has_key: bool,
    name: str | None,
) -> None:
    server_key = chat_key if has_key else None
    server = start_keyed(server_key)
    guest = Guest(context, server.ports, server_key)
    (tmp_path / "stranger.py").write_text(STRANGER)
    key = client_key(name, tmp_path)
    keys = [(zmq.auth.load_certificate(key)[0] or b"").decode()] if key else []
    stranger = start(str(tmp_path / "stranger.py"), *server.ports, *keys)
    stranger.wait_said("turned away\n")
    until = time.monotonic() + 0.5  # in which it tries several times more
    while time.monotonic() < until:
        guest.says_and_hears(f"guest {time.monotonic()}")
    assert stranger.process.poll() is None
    stranger.process.kill()
    assert read_all(stranger) == b""


def ready(kind: bytes) -> bytes:
    """Return the frame of a READY command (ZMTP 3.0)."""
    command = b"\5READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    return b"\4" + bytes([len(command)]) + command


def greeting(mechanism: bytes, as_server: int = 0, minor: int = 1) -> bytes:
    """Return a greeting (ZMTP 3.x) by libzmq."""
    signature = b"\xff" + bytes(7) + b"\1\x7f"
    return (
        signature + bytes([3, minor]) + mechanism.ljust(20, b"\0") + bytes([as_server, *[0] * 31])
    )


SUBSCRIBED = b"\0\1\1"
WORDS = chat_body("a stranger's words")
OLD_SIGNATURE = b"\xff" + bytes(7) + b"\1\x7f"
DIALECTS = {  # how those who want no encryption shake hands, as a PUSH and as a SUB, and go on
    "ZMTP 1.0": (b"\1\0", bytes([len(WORDS) + 1, 0]) + WORDS, b"\1\0", b"\2\0\1"),
    "ZMTP 2.0": (
        OLD_SIGNATURE + b"\1\x08\0\0",
        frame(WORDS),
        OLD_SIGNATURE + b"\1\x02\0\0",
        SUBSCRIBED,
    ),
    "ZMTP 3.0 NULL": (
        greeting(b"NULL", minor=0) + ready(b"PUSH"),
        frame(WORDS),
        greeting(b"NULL", minor=0) + ready(b"SUB"),
        SUBSCRIBED,
    ),
    "ZMTP 3.1 NULL": (
        GREETING + ready(b"PUSH"),
        frame(WORDS),
        GREETING + ready(b"SUB"),
        SUBSCRIBED,
    ),
    "ZMTP 3.1 CURVE, unencrypted": (
        greeting(b"CURVE") + ready(b"PUSH"),
        frame(WORDS),
        greeting(b"CURVE") + ready(b"SUB"),
        SUBSCRIBED,
    ),
}


def speak(ports: tuple[int, int], dialect: str) -> tuple[socket.socket, socket.socket]:
    """Return a PUSH and a SUB that speak a dialect, and have sent what they want to."""
    socks = []
    said = DIALECTS[dialect]
    for port, handshake, rest in zip(ports, said[::2], said[1::2], strict=True):
        sock = socket.create_connection(("127.0.0.1", port))
        socks.append(sock)
        with contextlib.suppress(ConnectionError):
            sock.sendall(handshake)
            heard_by(sock, 0.1)  # Only then is the other side ready.
            sock.sendall(rest)
    return socks[0], socks[1]


def heard_by(sock: socket.socket, pause: float = 0.3) -> tuple[bytes, bool]:
    """Return what comes until there is no more for a while, and whether the server hung up."""
    sock.settimeout(pause)
    heard = b""
    try:
        while data := sock.recv(65_536):
            heard += data
    except TimeoutError:
        return heard, False
    except ConnectionError:
        pass
    return heard, True


def test_no_dialect_talks_a_server_out_of_its_key(
    keyed: Script, chat_key: Path, context: Context
) -> None:
    guest = Guest(context, keyed.ports, chat_key)
    with contextlib.ExitStack() as stack:
        socks = [
            stack.enter_context(sock)
            for dialect in DIALECTS
            for sock in speak(keyed.ports, dialect)
        ]
        for number in range(20):
            guest.says_and_hears(f"swordfish {number}")
            time.sleep(0.01)  # for strangers to come in between
        for sock in socks:
            heard, hung_up = heard_by(sock)
            assert hung_up
            assert b"swordfish" not in heard
    guest.says_and_hears("and that was all")


@pytest.mark.parametrize("dialect", list(DIALECTS)[:4])
def test_the_dialects_are_understood_by_a_server_without_a_key(
    start_keyed: StartKeyed, context: Context, dialect: str
) -> None:
    """Or else the test above would show nothing."""
    server = start_keyed(None)
    guest = Guest(context, server.ports, None)
    push, sub = speak(server.ports, dialect)
    with push, sub:
        assert guest.receive() == published("k", "a stranger's words")
        for number in range(100):
            guest.says_and_hears(f"swordfish {number}")
        assert b"swordfish 99" in heard_by(sub)[0]


def letters(terminal: object) -> str:
    """Return what is on a terminal's screen, without the spaces that its rows end with."""
    return "".join(terminal.rows()).replace(" ", "")  # type: ignore[attr-defined]


TOLD = re.compile(r"client\.py:noserveratlocalhost,oronewhose--key")


@pytest.mark.parametrize("mended", [False, pytest.param(True, marks=slow)])
def test_on_a_terminal_the_uninvited_are_told_of_the_key_and_come_in_when_it_fits(
    start_keyed: StartKeyed, chat_key: Path, tmp_path: Path, mended: bool
) -> None:
    """All kinds of them at once, one behind a tunnel. It is told within two seconds, and once."""
    from test_terminal import CLIENT, Terminal

    people: dict[str, tuple[Terminal, float]] = {}
    ports: dict[str, tuple[int, int]] = {}
    servers: list[Script] = []
    with contextlib.ExitStack() as stack:
        for door, (has_key, _) in DOORS.items():
            servers.append(start_keyed(chat_key if has_key else None))
            ports[door] = servers[-1].ports
        tunnels = stack.enter_context(contextlib.ExitStack())
        ports["tunnel"] = tunnels.enter_context(tunnel()), tunnels.enter_context(tunnel())
        for door in ports:
            name = DOORS.get(door, (True, "chat"))[1]
            key = client_key(name, tmp_path)
            options = ["--user", "ken", *(["--key", str(key)] if key else [])]
            command = [*CLIENT, *port_options(ports[door]), *options]
            people[door] = Terminal(*command, environment={}), time.monotonic()
            stack.callback(people[door][0].close)
        for door, (terminal, began) in people.items():
            wait_for(lambda: TOLD.search(letters(terminal)), terminal.rows)  # noqa: B023
            assert time.monotonic() - began < 2, door
            assert "connectedto" not in letters(terminal)
        if not mended:
            return
        for server in servers:
            server.process.kill()
            server.wait()
        tunnels.close()
        for door, (terminal, _) in people.items():
            # For those with the wrong key, the right server is the one that has it.
            name = DOORS.get(door, (True, "chat"))[1]
            start_keyed(client_key(name, tmp_path), ports[door])
            wait_for(lambda: "connectedtolocalhost" in letters(terminal), terminal.rows)  # noqa: B023
            terminal.type("it is me\r")
            wait_for(lambda: "ken>itisme" in letters(terminal), terminal.rows)  # noqa: B023
            assert len(TOLD.findall(letters(terminal))) == 1


@slow
def test_on_a_terminal_those_who_are_not_invited_any_more_are_told(
    start_keyed: StartKeyed, keyed: Script, chat_key: Path, tmp_path: Path
) -> None:
    from test_terminal import CLIENT, Terminal

    ports = keyed.ports
    command = [*CLIENT, *port_options(ports), "--user", "ken", "--key", str(chat_key)]
    terminal = Terminal(*command, environment={})
    try:
        wait_for(lambda: "connectedtolocalhost" in letters(terminal), terminal.rows)
        keyed.process.kill()
        keyed.wait()
        wait_for(lambda: "oronewhose--keydiffers" in letters(terminal), terminal.rows)
        again = start_keyed(make_keys(tmp_path, "again"), ports)
        terminal.type("who is there?\r")
        wait_for(lambda: letters(terminal).endswith("whoisthere?"), terminal.rows)
        again.process.kill()
        again.wait()
        start_keyed(chat_key, ports)
        wait_for(lambda: letters(terminal).count("connectedtolocalhost") == 2, terminal.rows)
        wait_for(lambda: letters(terminal).endswith("ken>whoisthere?"), terminal.rows)
    finally:
        terminal.close()


@slow
def test_a_pipe_of_the_uninvited_ends_as_soon_as_one_without_a_server(
    start: Start, start_keyed: StartKeyed, chat_key: Path, tmp_path: Path, context: Context
) -> None:
    """All kinds of them at once, 8 to 12 seconds."""
    with contextlib.ExitStack() as stack:
        tunnels = stack.enter_context(tunnel()), stack.enter_context(tunnel())
        doors: dict[str, tuple[tuple[int, int], str | None]] = {
            "tunnel": (tunnels, "chat"),
            "tunnel, no key": (tunnels, None),
            "no server": ((free_port(), free_port()), "chat"),
        }
        guests = []
        for door, (has_key, name) in DOORS.items():
            server_key = chat_key if has_key else None
            doors[door] = start_keyed(server_key).ports, name
            guests.append(Guest(context, doors[door][0], server_key))
        pipes, began = {}, time.monotonic()
        for door, (ports, name) in doors.items():
            key = client_key(name, tmp_path)
            options = [*port_options(ports), "--user", "k", *(["--key", key] if key else [])]
            pipes[door] = start("client.py", *options, stdin=subprocess.PIPE)
            close(pipes[door], b"one\ntwo\n")
        for door, pipe in pipes.items():
            assert pipe.wait() == 1, door
            assert 8 < time.monotonic() - began < 12, door
            assert read_all(pipe) == b""
            assert "one whose --key differs" in pipe.said, door
            assert "lines not known to be delivered: 2\n" in pipe.said
        for guest in guests:
            guest.says_and_hears("nobody else said anything")


@slow
@pytest.mark.parametrize("door", DOORS)
def test_a_pipe_goes_through_and_ends_once_the_right_server_is_there(
    start: Start, start_keyed: StartKeyed, chat_key: Path, tmp_path: Path, door: str
) -> None:
    """What was turned away before does not keep the client from ending."""
    has_key, name = DOORS[door]
    wrong = start_keyed(chat_key if has_key else None)
    key = client_key(name, tmp_path)
    options = [*port_options(wrong.ports), "--user", "k", *(["--key", key] if key else [])]
    pipe = start("client.py", *options, stdin=subprocess.PIPE)
    write(pipe, b"one\n")
    pipe.wait_said("one whose --key differs")
    wrong.process.kill()
    wrong.wait()
    start_keyed(key, wrong.ports)
    close(pipe, b"two\n")
    assert read_all(pipe) == b"k> one\nk> two\n"
    assert pipe.wait() == 0


# On the wire.


class Relay:
    """A relay to a TCP port, which records what it carries each way. It takes one connection."""

    def __init__(self, target: int) -> None:
        self.there, self.back = bytearray(), bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._target = target
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        self._listener.close()
        far = socket.create_connection(("127.0.0.1", self._target))
        for ends in ((near, far, self.there), (far, near, self.back)):
            threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, record: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                record += data
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


def through_relays(
    server: Script, run_client: RunClient, typed: bytes, *options: str
) -> tuple[bytes, bytes, bytes, bytes]:
    """Have a client say something; return what went to PULL and back, and to PUB and back."""
    relays = [Relay(port) for port in server.ports]
    ports = relays[0].port, relays[1].port
    done = run_client(ports, typed, "--user", "kenneth", *options)
    assert (done.stderr, done.returncode) == (b"", 0)
    assert done.stdout == b"kenneth> " + typed
    pull, pub = relays
    return bytes(pull.there), bytes(pull.back), bytes(pub.there), bytes(pub.back)


def test_the_wire_holds_no_word_of_what_was_said(
    keyed: Script, chat_key: Path, run_client: RunClient
) -> None:
    ways = through_relays(keyed, run_client, b"the password is swordfish\n", "--key", str(chat_key))
    secrets = [b"kenneth", b"swordfish", b"password", b"user", b"message", b"\x1b[36m"]
    secrets += [key for key in zmq.auth.load_certificate(f"{chat_key}_secret") if key]
    for way in ways:
        assert way.startswith(greeting(b"CURVE"))
        assert len(way) > 200
        for secret in secrets:
            assert secret not in way


def test_without_a_key_the_wire_is_as_it_always_was(
    start_keyed: StartKeyed, run_client: RunClient
) -> None:
    ways = through_relays(start_keyed(None), run_client, b"hello\n")
    line = b'{"user": "kenneth", "message": "hello"}'
    hello = greeting(b"NULL")
    assert ways == (
        hello + ready(b"PUSH") + frame(line),
        hello + ready(b"PULL"),
        hello + ready(b"SUB") + command(b"SUBSCRIBE"),
        hello + ready(b"PUB") + frame(b"kenneth> \x1b[36mhello\x1b[0m"),
    )


# Strangers who mean harm.


def command(name: bytes, body: bytes = b"") -> bytes:
    """Return the frame of a command."""
    content = bytes([len(name)]) + name + body
    if len(content) < 256:
        return bytes([4, len(content)]) + content
    return b"\6" + struct.pack(">Q", len(content)) + content


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


CURVE = greeting(b"CURVE")
HARM = {
    "nothing": b"",
    "half a greeting": GREETING[:11],
    "a greeting": GREETING,
    "subscriptions": GREETING + ready(b"SUB") + SUBSCRIBED * 3_000,
    "subscriptions and their ends": GREETING + ready(b"SUB") + b"\0\2\1x\0\2\0x" * 3_000,
    "pings": GREETING + ready(b"SUB") + command(b"PING", b"\0\1context") * 1_000,
    "lines": GREETING + ready(b"PUSH") + frame(WORDS) * 1_000,
    "parts without end": GREETING + ready(b"PUSH") + b"\1\1x" * 3_000,
    "noise": noise(3_000),
    "CURVE, half": CURVE[:40],
    "CURVE, nothing": CURVE,
    "CURVE, noise": CURVE + noise(3_001),
    "CURVE, as a server": greeting(b"CURVE", as_server=1) + command(b"WELCOME", noise(160)),
    "CURVE, HELLO of noise": CURVE + command(b"HELLO", b"\1\0" + bytes(72) + noise(120)),
    "CURVE, HELLO of nothing": CURVE + command(b"HELLO"),
    "CURVE, INITIATE": CURVE + command(b"INITIATE", noise(249)),
    "CURVE, MESSAGE": CURVE + command(b"MESSAGE", noise(60)) * 1_000,
    "CURVE, READY": CURVE + ready(b"SUB") + SUBSCRIBED * 3_000,
    "CURVE, ERROR": CURVE + command(b"ERROR", b"\0"),
    "CURVE, pings": CURVE + command(b"PING", b"\0\1context") * 1_000,
    "CURVE, half a frame": CURVE + b"\6" + struct.pack(">Q", 200) + noise(100),
    "CURVE, a frame without end": CURVE + b"\6" + struct.pack(">Q", (1 << 63) - 1) + noise(100),
    "CURVE, a size below nothing": CURVE + b"\6" + b"\xff" * 8 + noise(100),
    "CURVE, empty frames": CURVE + b"\4\0" * 1_000 + b"\0\0" * 1_000,
    "PLAIN": greeting(b"PLAIN") + command(b"HELLO", b"\1a\1b"),
    "GSSAPI": greeting(b"GSSAPI") + command(b"INITIATE", noise(100)),
    "no mechanism": greeting(b"") + ready(b"SUB"),
    **{name: said[2] + said[3] for name, said in DIALECTS.items()},
}


def do_harm(ports: tuple[int, int], harm: list[bytes], seconds: float) -> int:
    """Connect, send, and close, reset, or stay, again and again; return how often."""
    dice, staying = random.Random(0), list[socket.socket]()
    until, times = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        for data in harm:
            times += 1
            sock = socket.create_connection(("127.0.0.1", ports[times % 2]), timeout=TIMEOUT)
            sock.settimeout(0.02)
            with contextlib.suppress(OSError):
                sock.sendall(data)
            with contextlib.suppress(OSError):
                if dice.random() < 0.3:
                    sock.recv(1_000)
            match dice.randrange(3):
                case 0:
                    staying.append(sock)
                case 1:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if sock not in staying:
                sock.close()
            elif len(staying) > 100:
                staying.pop(0).close()
    for sock in staying:
        sock.close()
    return times


def replayed(keyed: Script, chat_key: Path, run_client: RunClient) -> list[bytes]:
    """Return what an invited client sent to PULL and to PUB, for strangers to send again."""
    ways = through_relays(keyed, run_client, b"hello\n", "--key", str(chat_key))
    return [ways[0], ways[2]]


@pytest.mark.parametrize(
    ("load", "seconds"), [(False, 1), (True, 1), pytest.param(True, 20, marks=slow)]
)
def test_strangers_cannot_abort_it(
    keyed: Script,
    chat_key: Path,
    context: Context,
    run_client: RunClient,
    load: bool,
    seconds: int,
) -> None:
    """Neither idle nor under load, and what the invited say arrives in order, and nothing else."""
    harm = [*HARM.values(), *replayed(keyed, chat_key, run_client)]
    guest = Guest(context, keyed.ports, chat_key)
    files = keyed.open_files()
    times = []
    stranger = threading.Thread(
        target=lambda: times.append(do_harm(keyed.ports, harm, seconds)), daemon=True
    )
    stranger.start()
    said = 0
    while load and stranger.is_alive():
        for number in range(said, said + 200):
            guest.push.send(chat_body(str(number)))
        for number in range(said, said + 200):
            assert guest.receive() == published("k", str(number))
        said += 200
    stranger.join(seconds + TIMEOUT)
    assert keyed.process.poll() is None, keyed.said
    assert times and times[0] >= len(harm), "not even once each"
    guest.says_and_hears("I am still here")
    wait_for(lambda: keyed.open_files() <= files, keyed.open_files)
    assert keyed.said.count("\n") == 2, keyed.said
    keyed.process.terminate()
    assert keyed.wait() == 0


def test_what_the_invited_sent_is_of_no_use_to_who_sends_it_again(
    keyed: Script, chat_key: Path, context: Context, run_client: RunClient
) -> None:
    guest = Guest(context, keyed.ports, chat_key)
    sent = replayed(keyed, chat_key, run_client)
    assert guest.receive() == published("kenneth", "hello")
    for data, port in zip(sent, keyed.ports, strict=True):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(data)
            assert heard_by(sock)[1], "it did not hang up"
    guest.says_and_hears("nobody said hello again")
