"""The two scripts as processes, and what a test does with them."""

import contextlib
import itertools
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TIMEOUT = 30  # seconds until a condition counts as failed, on however busy a machine
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# Systems give none of these to connections, and no other worker has them.
PORTS = itertools.cycle(random.sample(range(10_000 + WORKER, 32_000, 20), 1_100))

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: it reads /proc")
WINDOWS = pytest.mark.skipif(sys.platform != "win32", reason="needs Windows")
REBINDS = pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps a killed server's port")
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX: its signals, shell or files")


def wait_for(condition: Callable[[], object], state: Callable[[], object]) -> None:
    """Wait until condition() is true; fail, and show state(), if that takes longer than TIMEOUT."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"timeout; the state is: {state()}"
        time.sleep(0.005)


def free_port() -> int:
    """Return a TCP port that nothing uses."""
    while True:
        number = next(PORTS)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", number))
            return number


def port_options(ports: tuple[int, int]) -> list[str]:
    """Return the options that make client.py use a server's (PULL, PUB) ports."""
    return ["--push-port", str(ports[0]), "--sub-port", str(ports[1])]


def server_options(ports: tuple[int, int]) -> list[str]:
    """Return the options that make server.py use these (PULL, PUB) ports."""
    return ["--pull-port", str(ports[0]), "--pub-port", str(ports[1])]


def python(script: str, *args: object) -> list[str]:
    """Return the command that runs a script: one of the two, or one with an absolute path."""
    return [sys.executable, str(ROOT / script), *map(str, args)]


def unix_line_ends(data: bytes) -> bytes:
    """Return what a script printed, with LF for the line ends, which are the platform's."""
    assert data.count(b"\n") == data.count(os.linesep.encode()), data
    return data.replace(os.linesep.encode(), b"\n")


class Script:
    """A script as a process. What it writes to stderr is collected as it comes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.stderr = ""
        self.ports = (0, 0)  # of a server: start_server sets them
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.stderr += unix_line_ends(line).decode()

    def wait_stderr(self, pattern: str) -> re.Match[str]:
        """Wait until stderr has what matches pattern; fail if the script ends without it."""
        wait_for(
            lambda: not self.reader.is_alive() or re.search(pattern, self.stderr),
            lambda: (pattern, self.stderr),
        )
        match = re.search(pattern, self.stderr)
        assert match, (pattern, self.stderr)
        return match

    def wait(self) -> int:
        """Wait for the end; return the exit status, with all of stderr in `stderr`."""
        status = self.process.wait(TIMEOUT)
        self.reader.join(TIMEOUT)
        return status

    def terminate(self) -> int:
        """Ask it to end; return the exit status."""
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def status(self, name: str) -> str:
        """Return a field of /proc/PID/status."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return re.findall(rf"^{name}:\s+(.*)", text, re.MULTILINE)[0]  # type: ignore[no-any-return]

    def memory(self, name: str = "VmHWM") -> float:
        """Return the memory that it uses (VmRSS), or used at most (VmHWM), in MB."""
        return int(self.status(name).removesuffix(" kB")) / 1_000

    def catches(self, signum: int) -> bool:
        """Return whether it handles a signal by now."""
        return bool(int(self.status("SigCgt"), 16) & 1 << signum - 1)

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def open_files(self) -> int:
        """Return how many files it has open. Each connection is one."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


# What a script reads, and what it prints.


def write(script: Script, data: bytes) -> None:
    """Write to a script's stdin."""
    assert script.process.stdin
    script.process.stdin.write(data)
    script.process.stdin.flush()


def close(script: Script, data: bytes = b"") -> None:
    """Write the last of a script's stdin. The script may have ended."""
    assert script.process.stdin
    with contextlib.suppress(BrokenPipeError):
        script.process.stdin.write(data)
        script.process.stdin.close()


def read_line(script: Script) -> bytes:
    """Return the next line of a script's stdout; kill the script if none comes."""
    assert script.process.stdout
    timeout = threading.Timer(TIMEOUT, script.process.kill)
    timeout.start()
    line = script.process.stdout.readline()
    timeout.cancel()
    return unix_line_ends(line)


def read_all(script: Script) -> bytes:
    """Return the rest of a script's stdout."""
    assert script.process.stdout
    return unix_line_ends(script.process.stdout.read())


def after(command: str) -> list[str]:
    """Return the command that runs another one after a command of the shell."""
    return ["sh", "-c", f'{command}; exec "$@"', "sh"]


# Fixtures, and the types of the functions that they give.

Start = Callable[..., Script]
StartServer = Callable[..., Script]
StartClient = Callable[..., Script]
Done = subprocess.CompletedProcess[bytes]
RunClient = Callable[..., Done]


@pytest.fixture
def start() -> Iterator[Start]:
    """Give a function that starts a script; it is killed at the end of the test.

    `before` is a command that runs the command that follows it. The rest is for Popen.
    """
    scripts: list[Script] = []

    def start_it(name: str, *args: object, before: Sequence[str] = (), **how: Any) -> Script:
        how = {"stdin": DEVNULL, "stdout": PIPE, "stderr": PIPE} | how
        process: subprocess.Popen[Any] = subprocess.Popen([*before, *python(name, *args)], **how)
        scripts.append(Script(process))
        return scripts[-1]

    yield start_it
    for script in scripts:
        with contextlib.suppress(BrokenPipeError), script.process:  # which closes its pipes
            script.kill()


@pytest.fixture
def start_server(start: Start) -> StartServer:
    """Give a function that starts server.py, on free ports or on those given, by `start`."""

    def start_it(*options: object, ports: tuple[int, int] | None = None, **how: Any) -> Script:
        args = server_options(ports or (free_port(), free_port()))
        script = start("server.py", *args, *options, **how)
        bound = script.wait_stderr(r"PULL is bound to tcp://\S+:(\d+), PUB to tcp://\S+:(\d+)\n")
        script.ports = int(bound[1]), int(bound[2])
        return script

    return start_it


@pytest.fixture
def server(start_server: StartServer) -> Script:
    return start_server()


@pytest.fixture
def start_client(start: Start) -> StartClient:
    """Give a function that starts a client, which speaks as k, at a server's ports."""
    return lambda ports, *options, **how: start(
        "client.py", *port_options(ports), "--user", "k", *options, **{"stdin": PIPE} | how
    )


@pytest.fixture
def run_client() -> RunClient:
    """Give a function that runs client.py with bytes on stdin until it ends."""

    def run(ports: tuple[int, int], typed: bytes, *args: object, **how: Any) -> Done:
        how |= {"input": typed, "capture_output": True, "timeout": 2 * TIMEOUT}
        done = subprocess.run(python("client.py", *port_options(ports), *args), **how)
        done.stdout, done.stderr = unix_line_ends(done.stdout), unix_line_ends(done.stderr)
        return done

    return run
