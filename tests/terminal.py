"""A program on a pseudo-terminal, and the screen that a person would see."""

import contextlib
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pyte
import pytest
from processes import TIMEOUT, wait_for

if sys.platform != "win32":
    import termios

COLUMNS, ROWS = 120, 10  # wide enough for each notice
CONNECTED = "client.py: connected to localhost"


class Screen(pyte.Screen):
    """A screen, and the rows that have scrolled off it. (pyte.HistoryScreen is slow.)"""

    def __init__(self, columns: int, rows: int) -> None:
        self.past: list[str] = []
        super().__init__(columns, rows)

    def index(self) -> None:
        if self.cursor.y == self.lines - 1:
            self.past.append("".join(self.buffer[0][x].data for x in range(self.columns)).rstrip())
        super().index()


class Terminal:
    """A program on a pseudo-terminal, which an emulator reads back.

    A thread receives what the program writes. The emulator reads it when the test looks: it is
    slow, and would hold up a program that writes much.
    """

    def __init__(self, *command: str, environment: dict[str, str] | None = None) -> None:
        self.received = b""  # all that the program has written to the terminal
        self.paused = False  # The terminal takes no output now, as a slow one.
        self._hung_up = False
        self._screen = Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)
        self._emulated = 0  # bytes that the emulator has read
        self._keyboard, self._tty = os.openpty()
        self.resize(COLUMNS, ROWS)
        self.first_settings = self.settings()
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"TERM": "xterm"} | (environment or {}),
            preexec_fn=lambda: os.login_tty(self._tty),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while not self._hung_up:
                ready, _, _ = select.select([] if self.paused else [self._keyboard], [], [], 0.02)
                if ready:
                    self.received += os.read(self._keyboard, 65_536)

    def is_behind(self) -> bool:
        """Return whether the program has written what the terminal has not taken yet."""
        return bool(select.select([self._keyboard], [], [], 0)[0])

    def look(self) -> Screen:
        """Return the screen as it is now."""
        news = self.received[self._emulated :]
        self._stream.feed(news)
        self._emulated += len(news)
        return self._screen

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size, as dragging its corner does."""
        self.look().resize(rows, columns)
        termios.tcsetwinsize(self._tty, (rows, columns))

    def settings(self) -> list[Any]:
        """Return the terminal's settings; `first_settings` are those before the program began."""
        return termios.tcgetattr(self._tty)

    def type(self, text: str) -> None:
        """Press keys, or paste."""
        data = text.encode()
        while data:
            data = data[os.write(self._keyboard, data) :]

    def rows(self) -> list[str]:
        """Return all rows that are or were on the screen, but not the blank ones at the end."""
        screen = self.look()
        return "\n".join([*screen.past, *map(str.rstrip, screen.display)]).rstrip("\n").split("\n")

    def wait_rows(self, *last: str) -> None:
        """Wait until the last rows are these."""
        count = len(last)
        wait_for(lambda: tuple(self.rows()[-count:]) == last, lambda: (last, self.rows()[-ROWS:]))

    def wait_text(self, pattern: str) -> None:
        """Wait until the rows, put together, have what matches a pattern. Spaces do not count."""
        wait_for(
            lambda: re.search(pattern.replace(" ", ""), "".join(self.rows()).replace(" ", "")),
            lambda: (pattern, self.rows()[-ROWS:]),
        )

    def wait_cursor(self, row: str, column: int) -> None:
        """Wait until the cursor is in this row, in this column."""

        def place() -> tuple[str, int]:
            screen = self.look()
            return screen.display[screen.cursor.y].rstrip(), screen.cursor.x

        wait_for(lambda: place() == (row, column), lambda: (row, column, place()))

    def hang_up(self) -> None:
        """Take the terminal away, as closing its window does."""
        if not self._hung_up:
            self._hung_up = True
            self._reader.join(TIMEOUT)
            os.close(self._tty)
            os.close(self._keyboard)

    def close(self) -> None:
        """Kill the program if it still runs."""
        self.process.kill()
        self.process.wait(TIMEOUT)
        self.hang_up()


Open = Callable[..., Terminal]


@pytest.fixture
def open_terminal() -> Iterator[Open]:
    """Give a function that starts a command on a terminal, and takes what Terminal takes."""
    if sys.platform == "win32":
        pytest.skip("needs pseudo-terminals, which Windows has not")
    with contextlib.ExitStack() as stack:
        yield lambda *args, **how: stack.enter_context(contextlib.closing(Terminal(*args, **how)))
