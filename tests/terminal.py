"""A program on a pseudo-terminal, and the screen that a person would see."""

import contextlib
import os
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pyte
import pytest
from processes import TIMEOUT, wait_for

if sys.platform != "win32":
    import fcntl
    import termios

COLUMNS, ROWS = 40, 10


class Terminal:
    """A program on a pseudo-terminal, which an emulator reads back."""

    def __init__(
        self,
        *command: str,
        environment: dict[str, str] | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        columns: int = COLUMNS,
        rows: int = ROWS,
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=100_000, ratio=1)
        self.received = b""  # all bytes that the program has written to the terminal
        self._stream = pyte.ByteStream(self.screen)
        self._lock = threading.Lock()
        self._keyboard, self._tty = os.openpty()
        self._set_size(columns, rows)
        self.first_settings = self.settings()
        self.process = subprocess.Popen(
            command,
            stdin=self._tty,
            stdout=self._tty if stdout is None else stdout,
            stderr=self._tty if stderr is None else stderr,
            env=os.environ | {"TERM": "xterm"} | (environment or {}),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._keyboard, 65_536):
                with self._lock:
                    self.received += data
                    self._stream.feed(data)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._tty, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size, as dragging its corner does."""
        with self._lock:
            self.screen.resize(rows, columns)
        self._set_size(columns, rows)

    def settings(self) -> list[Any]:
        """Return the terminal's settings; `first_settings` are those before the program began."""
        return termios.tcgetattr(self._tty)

    def keys_are_taken(self) -> bool:
        """Return whether the program gets each key, and not whole lines that the kernel edits."""
        return not self.settings()[3] & termios.ICANON

    def pause_output(self, paused: bool) -> None:
        """Hold up what the program writes, as Ctrl-S does, or let it go on."""
        termios.tcflow(self._tty, termios.TCOOFF if paused else termios.TCOON)

    def type(self, text: str) -> None:
        """Press keys."""
        data = text.encode(errors="surrogateescape")
        while data:
            data = data[os.write(self._keyboard, data) :]

    def rows(self) -> list[str]:
        """Return all rows that are or were on the screen, but not the blank ones at the end."""
        with self._lock:
            past = [
                "".join(row[n].data for n in range(len(row))) for row in self.screen.history.top
            ]
            rows = [row.rstrip() for row in [*past, *self.screen.display]]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def cursor(self) -> tuple[str, int]:
        """Return the text of the cursor's row, and the cursor's column."""
        with self._lock:
            return self.screen.display[self.screen.cursor.y].rstrip(), self.screen.cursor.x

    def wait_rows(self, *last: str) -> None:
        """Wait until the last rows are these."""
        wait_for(
            lambda: self.rows()[-len(last) :] == list(last), lambda: (last, self.rows()[-ROWS:])
        )

    def wait_text(self, pattern: str) -> None:
        """Wait until the rows, put together without their spaces, have what matches a pattern."""
        wait_for(
            lambda: re.search(pattern, "".join(self.rows()).replace(" ", "")),
            lambda: (pattern, self.rows()[-ROWS:]),
        )

    def wait_cursor(self, row: str, column: int) -> None:
        """Wait until the cursor is in this row, in this column."""
        wait_for(lambda: self.cursor() == (row, column), lambda: (row, column, self.cursor()))

    def close(self) -> None:
        """Kill the program if it still runs."""
        self.process.kill()
        self.process.wait(TIMEOUT)
        os.close(self._tty)
        self._reader.join(TIMEOUT)  # It must not read from the next file with this number.
        os.close(self._keyboard)


Open = Callable[..., Terminal]


@pytest.fixture
def open_terminal() -> Iterator[Open]:
    """Give a function that starts a command on a terminal, and takes what Terminal takes."""
    if sys.platform == "win32":
        pytest.skip("needs pseudo-terminals, which Windows has not")
    terminals: list[Terminal] = []

    def open_it(*command: str, **how: Any) -> Terminal:
        terminals.append(Terminal(*command, **how))
        return terminals[-1]

    yield open_it
    for terminal in terminals:
        terminal.close()
