"""README, "Keys": --key of both scripts: the files, and who gets in with them."""

import re
import stat
import sys
from pathlib import Path

import pytest
import zmq.auth
from peers import Join
from processes import POSIX, Start, StartClient, StartServer, after, close, read_line, write


def contents(directory: Path) -> dict[Path, bytes | bool]:
    """Return the files and directories in a directory, and what is in the files."""
    return {file: file.is_file() and file.read_bytes() for file in directory.rglob("*")}


# README, Keys: The server creates `chat.key` and `chat.key_secret`, in the current directory, if
# neither exists.
# README, Keys: Other programs use CURVE
@POSIX
@pytest.mark.parametrize("umask", ["000", "777"])
def test_only_the_owner_reads_keys(start_server: StartServer, tmp_path: Path, umask: str) -> None:
    start_server("--key", "chat", before=after(f"umask {umask}"), cwd=tmp_path)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {"chat.key": 0o600, "chat.key_secret": 0o600}


CODE_PAGE = pytest.mark.skipif(sys.platform == "win32", reason="the log is in Windows' code page")


@pytest.mark.parametrize(
    "name", ["chat.key", "sub/chat.v2", pytest.param("größe {0} %s", marks=CODE_PAGE)]
)
def test_keys_are_reused(start_server: StartServer, join: Join, tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    start_server("--key", name, cwd=tmp_path)
    made = contents(tmp_path)
    server = start_server("--key", name, cwd=tmp_path)
    assert contents(tmp_path) == made
    public_file = f"{name.removesuffix('.key')}.key"
    server.wait_stderr(rf" {re.escape(public_file)}\n")
    public_key, _ = zmq.auth.load_certificate(tmp_path / public_file)
    join(server.ports, public_key).chat("hello")


# README, Keys: Files that are damaged, or not a pair, are refused and left as they are.

DAMAGE = {  # what is replaced in a file, and by what; if nothing is, the file is removed
    "missing": ("", ""),
    "empty": (".+", ""),
    "without a sign": ("-key = .*", "-key"),
    "cut short": (r'-key = "(.{20}).*', r'-key = "\1'),
    "not Z85": (r'-key = ".{5}(.{35}"\n)$', r'-key = "~~~~~\1'),
    "another's": (r'(.*-key = ").{5}', r"\1aaaaa"),  # the last key in the file
}
REFUSED = [
    *(("server.py", suffix, name) for suffix in (".key", ".key_secret") for name in DAMAGE),
    *(("client.py", ".key", name) for name in DAMAGE if name != "another's"),
]


@pytest.mark.parametrize(("script", "suffix", "name"), REFUSED)
def test_damaged_keys_are_refused_and_left(
    start: Start, tmp_path: Path, script: str, suffix: str, name: str
) -> None:
    key, _ = zmq.auth.create_certificates(tmp_path, "{0} %s")
    file = Path(key).with_suffix(suffix)
    pattern, new = DAMAGE[name]
    if pattern:
        file.write_text(re.sub(pattern, new, file.read_text(), count=1, flags=re.DOTALL))
    else:
        file.unlink()
    before = contents(tmp_path)
    process = start(script, "--key", key)
    assert process.wait() == 1
    problem = rf"--key: cannot use {re.escape(key)}: .+"
    if script == "server.py":
        files = re.escape(f"{key} and {key}_secret")
        problem = rf"cannot start: --key: cannot use {files}: .+; see --help"
    assert re.fullmatch(rf"{script}: {problem}\n", process.stderr)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["missing/chat", "x" * 300])
def test_a_name_that_cannot_be_used_is_refused(start: Start, tmp_path: Path, name: str) -> None:
    process = start("server.py", f"--key={name}", cwd=tmp_path)
    assert process.wait() == 1
    problem = r"server\.py: cannot start: --key: cannot use .+; see --help\n"
    assert re.fullmatch(problem, process.stderr)
    assert contents(tmp_path) == {}


# README, Keys: Somebody who has no `chat.key` can neither read nor post, nor crash the server
@pytest.mark.parametrize("served", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("of_server", "of_client"),
    [("--key=chat", ""), ("--key=chat", "--key=another.key"), ("", "--key=chat.key")],
    ids=["no key", "another key", "a key where there is none"],
)
def test_a_client_whose_key_does_not_fit_waits_for_a_server(
    start_server: StartServer,
    start_client: StartClient,
    join: Join,
    tmp_path: Path,
    of_server: str,
    of_client: str,
    served: bool,
) -> None:
    for name in ("chat", "another"):
        zmq.auth.create_certificates(tmp_path, name)
    public_key, _ = zmq.auth.load_certificate(tmp_path / "chat.key")
    server = start_server(*of_server.split(), cwd=tmp_path)
    member = join(server.ports, public_key if of_server else None)
    client = start_client(server.ports, *of_client.split(), cwd=tmp_path)
    write(client, b"hello\n")
    client.wait_stderr(r"no server at .*--key")
    member.chat("nobody else said anything")
    assert "connected to" not in client.stderr
    server.kill()
    if served:
        start_server(*of_client.split(), ports=server.ports, cwd=tmp_path)
        assert read_line(client) == b"k> hello\n"
        close(client)
        assert client.wait() == 0
    else:
        client.kill()
        assert read_line(client) == b""
