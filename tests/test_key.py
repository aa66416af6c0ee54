"""README, "Keys": --key of both scripts: the files, the chat with them, and strangers without."""

import contextlib
import itertools
import os
import random
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
import zmq.auth
import zmtp
from peers import Join, Peer, line_of, message_of
from processes import (
    POSIX,
    ROOT,
    RunClient,
    Script,
    Start,
    StartServer,
    close,
    port_options,
    read_line,
    server_options,
    two_people_chat,
    write,
)

import server as server_script

slow = pytest.mark.slow


def make_keys(directory: Path, name: str = "chat") -> Path:
    """Make a pair of keys; return the public one's file."""
    return Path(zmq.auth.create_certificates(directory, name)[0])


def public_key(file: Path) -> bytes:
    """Return the public key in a file."""
    return zmq.auth.load_certificate(file)[0]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """Make a pair of keys; give the public one's file."""
    return make_keys(tmp_path)


@pytest.fixture
def keyed(start_server: StartServer, key: Path) -> Script:
    """Give a server with a key."""
    return start_server("--key", key)


@pytest.fixture
def member(keyed: Script, key: Path, join: Join) -> Peer:
    """Give a Peer that has the key of this server."""
    return join(keyed.ports, server_key=public_key(key))


def contents(directory: Path) -> dict[str, bytes | None]:
    """Return the files of a directory, and what is in them."""
    return {
        file.name: file.read_bytes() if file.is_file() else None for file in directory.iterdir()
    }


# The server makes the two files of a name if there are none, for its owner alone, and uses them
# from then on.


@POSIX
@pytest.mark.parametrize("umask", ["000", "777"])
def test_keys_are_made_for_their_owner_alone(
    start_server: StartServer, join: Join, tmp_path: Path, umask: str
) -> None:
    before = ["sh", "-c", f'umask {umask}; exec "$@"', "sh"]
    server = start_server("--key", "chat", before=before, cwd=tmp_path)
    server.wait_stderr(r" chat\.key\b")
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {
        "chat.key": 0o600,
        "chat.key_secret": 0o600,
    }
    join(server.ports, server_key=public_key(tmp_path / "chat.key")).chat("hello")


@pytest.mark.parametrize("name", ["chat", "chat.key", "sub/chat", "./chat", "chat.v2", "größe 1"])
def test_keys_are_used_again(
    start_server: StartServer, join: Join, tmp_path: Path, name: str
) -> None:
    (tmp_path / "sub").mkdir()
    file = make_keys((tmp_path / name).parent, Path(name.removesuffix(".key")).name)
    before = contents(file.parent)
    server = start_server(f"--key={name}", cwd=tmp_path)
    server.wait_stderr(rf" {re.escape(name.removesuffix('.key'))}\.key\b")
    join(server.ports, server_key=public_key(file)).chat("hello")
    assert contents(file.parent) == before


# Keys that cannot be used are refused in one line, with status 1, and stay as they are.


def edit(file: Path, pattern: str, new: str) -> None:
    """Replace what matches a pattern."""
    text, count = re.subn(pattern, new, file.read_text(), flags=re.DOTALL)
    assert count == 1
    file.write_text(text)


def make_directory(file: Path) -> None:
    """Put a directory in a file's place."""
    file.unlink()
    file.mkdir()


def replace(file: Path, other: str) -> None:
    """Replace a file by that of another pair of keys."""
    pair = file.with_name("other")
    pair.mkdir()
    make_keys(pair)
    (pair / other).replace(file)
    shutil.rmtree(pair)


Damage = Callable[[Path], object]
DAMAGE: dict[str, Damage] = {  # of either file
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "noise": lambda file: file.write_bytes(random.Random(1).randbytes(300)),
    "cut short": lambda file: edit(file, r'-key = "(.{20}).*', r'-key = "\1'),
    "a directory": make_directory,
    "without a sign": lambda file: edit(file, "-key = .*", "-key"),
    "without keys": lambda file: edit(file, "(public|secret)-key =.*", ""),
    "not Z85": lambda file: edit(file, r'-key = ".{5}(.{35}"\n)$', r'-key = "~~~~~\1'),
}
SERVER_DAMAGE = {
    f"{suffix} {name}": (suffix, damage)
    for suffix in ("key", "key_secret")
    for name, damage in DAMAGE.items()
} | {
    "key of another": ("key", lambda file: replace(file, "chat.key")),
    "key_secret of another": ("key_secret", lambda file: replace(file, "chat.key_secret")),
    "key_secret is public": ("key_secret", lambda file: replace(file, "chat.key")),
}
CLIENT_DAMAGE = {name: DAMAGE[name] for name in ("missing", "noise", "without keys", "not Z85")} | {
    "not ASCII": lambda file: edit(file, r'c-key = ".{5}', 'c-key = "äöüßÿ'),
    "too long": lambda file: edit(file, r'c-key = "', 'c-key = "aaaaa'),
}


@pytest.mark.parametrize(("suffix", "damage"), SERVER_DAMAGE.values(), ids=SERVER_DAMAGE)
def test_damaged_keys_are_refused(key: Path, suffix: str, damage: Damage) -> None:
    damage(key.with_suffix(f".{suffix}"))
    before = contents(key.parent)
    files = re.escape(f"{key} and {key}_secret")
    with pytest.raises(ValueError, match=f"^--key: cannot use {files}: .+$"):
        server_script.load_keys(str(key.with_suffix("")))
    assert contents(key.parent) == before


@pytest.mark.parametrize("name", ["", "missing/chat", "file/chat", "sub/", "x" * 300])
def test_a_name_that_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "umask", lambda mask: mask)
    with pytest.raises(ValueError, match=r"^--key: cannot use .+$"):
        server_script.load_keys(name)
    assert {file.name for file in tmp_path.rglob("*")} == {"sub", "file"}


def test_the_server_refuses_keys_in_one_line(start: Start, key: Path) -> None:
    key.unlink()
    script = start("server.py", "--key", key, *server_options((0, 0)))
    assert script.wait() == 1
    assert re.fullmatch(r"server\.py: --key: cannot use .+\n", script.stderr)


@pytest.mark.parametrize("damage", CLIENT_DAMAGE.values(), ids=CLIENT_DAMAGE)
def test_the_client_refuses_a_damaged_key(
    server: Script, run_client: RunClient, key: Path, damage: Damage
) -> None:
    damage(key)
    done = run_client(server.ports, b"hello\n", "--user", "k", "--key", key)
    assert (done.stdout, done.returncode) == (b"", 1)
    assert re.fullmatch(rb"client\.py: --key: .*chat\.key.*\n", done.stderr)


@pytest.mark.skipif(sys.flags.ignore_environment, reason="this Python ignores PYTHONPATH")
def test_a_libzmq_without_curve_is_reported(start: Start, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import zmq\n"
        "def refuse(*_):\n    raise zmq.ZMQError(zmq.ENOTSUP)\n"
        "zmq.curve_keypair = zmq.curve_public = refuse\n"
    )
    options = ["--key", tmp_path / "chat", *server_options((0, 0))]
    script = start("server.py", *options, PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert script.wait() == 1
    assert re.fullmatch(r"server\.py: --key: cannot use .+\n", script.stderr)
    assert list(contents(tmp_path)) == ["sitecustomize.py"]


@pytest.mark.parametrize("script", ["server", "client"])
def test_without_a_key_what_it_needs_is_not_imported(script: str) -> None:
    code = f"import sys; sys.path[:0] = ['']; import {script}; print('zmq.auth' in sys.modules)"
    done = subprocess.run([sys.executable, "-Bc", code], cwd=ROOT, capture_output=True)
    assert done.stdout.split() == [b"False"]


# With the key, the chat and its limits are the same. Encryption adds 33 bytes to each frame.


def test_two_people_with_the_key_see_each_other_live(
    start: Start, keyed: Script, key: Path
) -> None:
    two_people_chat(start, keyed.ports, "--key", key)


def test_many_piped_lines_come_back_in_order(
    keyed: Script, key: Path, run_client: RunClient
) -> None:
    lines = [b"%d" % number for number in range(20_000)]
    done = run_client(keyed.ports, b"\n".join(lines), "--user", "k", "--key", key)
    assert done.stdout == b"".join(b"k> " + line + b"\n" for line in lines)
    assert (done.stderr, done.returncode) == (b"", 0)


@pytest.mark.parametrize(
    ("socket_type", "fits", "too_long"), [("PUSH", 16_384, 16_385), ("SUB", 500, 513)]
)
def test_the_limits_of_a_line_and_a_subscription_are_the_same(
    member: Peer, socket_type: str, fits: int, too_long: int
) -> None:
    sock = member.push if socket_type == "PUSH" else member.sub
    monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def send(size: int) -> None:
        """Send a line, or a subscription, of some bytes."""
        if socket_type == "PUSH":
            member.push.send(b'{"user":"k","message":"%s"}' % (b"x" * (size - 25)))
        else:
            member.sub.set(zmq.SUBSCRIBE, b"s" * size)

    send(fits)
    if socket_type == "PUSH":
        assert member.receive() == message_of("k", "x" * (fits - 25))
    member.chat("still connected")
    assert not monitor.poll(100)
    send(too_long)
    assert monitor.poll(10_000)


# A client without the key, or with another one, cannot read, write, or abort the server. Its
# notice names --key, and it connects once there is a server that fits.

DOORS = {  # whether the server has the key, and the name of the key that the client has
    "no key": (True, None),
    "another key": (True, "other"),
    "a key where there is none": (False, "chat"),
}


@pytest.mark.parametrize("served", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize(("has_key", "name"), DOORS.values(), ids=DOORS)
def test_a_client_whose_key_does_not_fit_waits_for_a_server(
    start: Start,
    start_server: StartServer,
    join: Join,
    key: Path,
    has_key: bool,
    name: str | None,
    served: bool,
) -> None:
    server = start_server(*(["--key", key] if has_key else []))
    peer = join(server.ports, server_key=public_key(key) if has_key else None)
    client_key = make_keys(key.parent, name) if name == "other" else key
    keys = ["--key", client_key] if name else []
    user = ["--user", "stranger", *keys]
    client = start("client.py", *port_options(server.ports), *user, stdin=subprocess.PIPE)
    write(client, b"hello\n")
    assert "--key" in client.wait_stderr(r"no server at.*\n")[0]
    peer.chat("nobody else said anything")
    assert "connected to" not in client.stderr
    if served:
        server.kill()
        start_server(*keys, ports=server.ports)
        assert read_line(client) == b"stranger> hello\n"
        close(client)
        assert client.wait() == 0


def data_of_strangers() -> list[bytes]:
    """Return what strangers may send. Some of it aborts a server without a key."""
    noise = random.Random(1).randbytes
    line, ping = line_of("stranger", "hello"), zmtp.command(b"PING", b"\0\1context")
    curve = zmtp.greeting(b"CURVE")
    push, sub, _ = zmtp.DIALECTS["ZMTP 3.1"]
    return [
        *(push + to_frame(line) for push, _, to_frame in zmtp.DIALECTS.values()),
        *(sub + to_frame(b"\1") for _, sub, to_frame in zmtp.DIALECTS.values()),
        curve + zmtp.ready(b"PUSH") + zmtp.frame(line),
        curve + zmtp.ready(b"SUB") + zmtp.SUBSCRIBE_ALL,
        sub + zmtp.SUBSCRIBE_ALL * 3_000,
        sub + ping * 1_000,
        curve + ping * 1_000,
        push + b"\1\1x" * 3_000,  # a message of endlessly many frames
        curve + zmtp.command(b"HELLO", b"\1\0" + bytes(72) + noise(120)),
        curve + zmtp.command(b"MESSAGE", noise(60)) * 1_000,
        curve + b"\6\x7f" + b"\xff" * 7 + noise(100),  # a frame without end
        noise(3_000),
    ]


@pytest.mark.parametrize("seconds", [1, pytest.param(20, marks=slow)])
def test_strangers_cannot_read_write_or_abort_the_server(
    keyed: Script, member: Peer, seconds: float
) -> None:
    received = bytearray()
    table = data_of_strangers()
    rounds = 0

    def attack() -> None:
        nonlocal rounds, received
        until = time.monotonic() + seconds
        while not rounds or time.monotonic() < until:
            for number, (data, port) in enumerate(itertools.product(table, keyed.ports)):
                sock = socket.create_connection(("127.0.0.1", port))
                with sock, contextlib.suppress(OSError):
                    sock.sendall(data)
                    received += zmtp.receive_until_quiet(sock, 0.02)[0]
                    if (number + rounds) % 2:
                        zmtp.reset(sock)
            rounds += 1

    stranger = threading.Thread(target=attack)
    stranger.start()
    while stranger.is_alive():
        member.chat("swordfish")
    stranger.join()
    assert rounds
    assert received
    assert b"swordfish" not in received
    assert keyed.stderr.count("\n") == 2
    assert keyed.terminate() == 0
