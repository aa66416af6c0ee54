"""README, "Keys": --key of both scripts: the files, the chat with them, and strangers without."""

import contextlib
import itertools
import os
import random
import re
import socket
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
import zmq.auth
import zmtp
from peers import Join, line_of
from processes import (
    POSIX,
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


def contents(directory: Path) -> dict[str, bytes | None]:
    """Return the files and directories in a directory, and what is in the files."""
    return {
        str(file.relative_to(directory)): file.read_bytes() if file.is_file() else None
        for file in directory.rglob("*")
    }


# README, Keys: The server creates `chat.key` and `chat.key_secret` if neither exists.


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


@pytest.mark.parametrize("name", ["chat.key", "sub/chat", "chat.v2", "größe 1", "{0} %s"])
def test_keys_are_used_again(
    start_server: StartServer, join: Join, tmp_path: Path, name: str
) -> None:
    (tmp_path / "sub").mkdir()
    file = make_keys((tmp_path / name).parent, Path(name.removesuffix(".key")).name)
    before = contents(tmp_path)
    server = start_server(f"--key={name}", cwd=tmp_path)
    server.wait_stderr(rf" {re.escape(name.removesuffix('.key'))}\.key\n")
    join(server.ports, server_key=public_key(file)).chat("hello")
    assert contents(tmp_path) == before


DAMAGE = {  # what is replaced in a file, and by what; if nothing is, the file is removed
    "missing": ("", ""),
    "empty": (".+", ""),
    "noise": (".+", "\xff\0\x1b" * 99),
    "cut short": (r'-key = "(.{20}).*', r'-key = "\1'),
    "without a sign": ("-key = .*", "-key"),
    "without keys": ("(public|secret)-key =.*", ""),
    "not Z85": (r'-key = ".{5}(.{35}"\n)$', r'-key = "~~~~~\1'),
    "not ASCII": ('c-key = ".{5}', 'c-key = "\xe4\xf6\xfc\xdf\xff'),
    "too long": ('c-key = "', 'c-key = "aaaaa'),
    "another's": ('c-key = ".{5}', 'c-key = "aaaaa'),
}


def damage(file: Path, name: str) -> None:
    """Damage a key's file."""
    pattern, new = DAMAGE[name]
    text, count = re.subn(pattern, new, file.read_text("latin-1"), count=1, flags=re.DOTALL)
    assert count == 1
    if pattern:
        file.write_text(text, "latin-1")
    else:
        file.unlink()


@pytest.mark.parametrize("suffix", [".key", ".key_secret"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_keys_are_refused(key: Path, suffix: str, name: str) -> None:
    damage(key.with_suffix(suffix), name)
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
    assert contents(tmp_path).keys() == {"sub", "file"}


def test_the_server_refuses_keys_in_one_line(start: Start, tmp_path: Path) -> None:
    key = make_keys(tmp_path, "{0} %s")
    key.unlink()
    script = start("server.py", "--key", key, *server_options((0, 0)))
    assert script.wait() == 1
    assert script.stderr.startswith(f"server.py: --key: cannot use {key} and {key}_secret: ")
    assert script.stderr.count("\n") == 1


# README, The wire: the same over CURVE


def test_two_people_with_the_key_see_each_other_live(
    start: Start, keyed: Script, key: Path
) -> None:
    two_people_chat(start, keyed.ports, "--key", key)


@pytest.mark.parametrize("name", ["missing", "noise", "not Z85", "not ASCII"])
def test_the_client_refuses_a_damaged_key(
    server: Script, run_client: RunClient, key: Path, name: str
) -> None:
    damage(key, name)
    done = run_client(server.ports, b"hello\n", "--user", "k", "--key", key)
    assert (done.stdout, done.returncode) == (b"", 1)
    assert re.fullmatch(rb"client\.py: --key: .*chat\.key.*\n", done.stderr)


# README, Keys: Without `chat.key`, nobody can read, post, or crash the server.
# README, Differences from the original: can read and post, unless there is a key
# README, Limits: A [key](#keys) or [ssh](#ssh) keeps strangers out


@pytest.mark.parametrize("served", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize(
    ("server_has_it", "client_has"),
    [(True, None), (True, "another"), (False, "chat")],
    ids=["no key", "another key", "a key where there is none"],
)
def test_a_client_whose_key_does_not_fit_waits_for_a_server(
    start: Start,
    start_server: StartServer,
    join: Join,
    key: Path,
    server_has_it: bool,
    client_has: str | None,
    served: bool,
) -> None:
    server = start_server(*(["--key", key] if server_has_it else []))
    peer = join(server.ports, server_key=public_key(key) if server_has_it else None)
    make_keys(key.parent, "another")
    keys = ["--key", key.with_stem(client_has)] if client_has else []
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
    keyed: Script, key: Path, join: Join, seconds: float
) -> None:
    member = join(keyed.ports, server_key=public_key(key))
    received = bytearray()
    began = time.monotonic()

    def attack() -> None:
        attempts = itertools.product(data_of_strangers(), keyed.ports, (True, False))
        for data, port, broken in itertools.cycle(attempts):
            sock = socket.create_connection(("127.0.0.1", port))
            with sock, contextlib.suppress(OSError):
                sock.sendall(data)
                received.extend(zmtp.receive_until_quiet(sock, 0.02)[0])
                if broken:
                    zmtp.reset(sock)
            if received and time.monotonic() - began > seconds:
                break

    stranger = threading.Thread(target=attack)
    stranger.start()
    while stranger.is_alive():
        member.chat("swordfish")
    assert received
    assert b"swordfish" not in received
    assert keyed.stderr.count("\n") == 2
    assert keyed.process.poll() is None
