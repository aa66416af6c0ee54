"""Draw the picture on top of the README: `python tests/picture.py` writes .github/picture.svg.

The real server and two real clients play a short session on two terminals. The picture shows what
both screens hold at its end: characters, colours and cursors.
"""

import contextlib
import itertools
import signal
from collections.abc import Iterator, Mapping
from html import escape

import pyte
from processes import ROOT, free_port, port_options, python, server_options
from terminal import CONNECTED, Terminal

COLUMNS, ROWS = 58, 14  # of each terminal

# Pixels. A cell is as wide as the characters of most monospace fonts: 0.6 times the font size.
FONT_SIZE, WIDE_FONT_SIZE, CELL, LINE = 15, 17, 9, 21
PADDING, BAR, RADIUS, GAP, MARGIN = 15, 34, 10, 18, 1
WIDTH, HEIGHT = COLUMNS * CELL + 2 * PADDING, BAR + ROWS * LINE + 2 * PADDING

# The window is lighter than a dark page, and has a border.
FILL, BAR_FILL, BORDER, BUTTON, TITLE = "#1c212b", "#2a303c", "#444c5a", "#596273", "#aab3c0"
COLORS = {"default": "#dde2e9", "cyan": "#4fd3dc"}
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

TYPED_MEANWHILE = "did you miss anything?"
HALF_TYPED = "and what if you write to me while I am typ"


def play() -> dict[str, pyte.Screen]:
    """Have two people chat, and the server restart meanwhile. Return their screens."""
    ports = free_port(), free_port()
    with contextlib.ExitStack() as stack:

        def start(script: str, *options: str) -> Terminal:
            window = stack.enter_context(contextlib.closing(Terminal(*python(script, *options))))
            window.resize(COLUMNS, ROWS)
            return window

        def say(user: str, text: str, *typed: str) -> None:
            windows[user].type(f"{text}\r")
            ken.wait_rows(f"{user}> {text}", *typed)
            ann.wait_rows(f"{user}> {text}")

        server = start("server.py", *server_options(ports))
        options = [*port_options(ports), "--color", "always"]
        windows = {user: start("client.py", "--user", user, *options) for user in ("ken", "ann")}
        ken, ann = windows.values()
        for window in (ken, ann):
            window.wait_rows(CONNECTED)
        say("ken", "good morning, anyone up?")
        say("ann", "おはよう、ken 👋")
        say("ken", "и по-русски можно?")
        say("ann", "конечно, всё дойдёт")
        say("ken", "great! restarting the server, hold on")

        server.close()
        for window in (ken, ann):
            window.wait_text("no server at localhost.*when it is back$")
        ken.type(f"{TYPED_MEANWHILE}\r")
        ken.wait_rows(TYPED_MEANWHILE)
        # A message reaches only connected clients: ann has to be the first to come back.
        ken.process.send_signal(signal.SIGSTOP)

        start("server.py", *server_options(ports))
        ann.wait_rows(CONNECTED)
        ken.process.send_signal(signal.SIGCONT)
        for window in (ken, ann):
            window.wait_rows(CONNECTED, f"ken> {TYPED_MEANWHILE}")
        say("ann", "not a line: yours came once the server was back")
        ken.type(HALF_TYPED)
        ken.wait_rows(HALF_TYPED)
        say("ann", "don't mind me, just keep typing", HALF_TYPED)
        ken.wait_cursor(HALF_TYPED, len(HALF_TYPED))
        ann.wait_cursor("", 0)
        return {user: window.look() for user, window in windows.items()}


def draw(screens: dict[str, pyte.Screen]) -> str:
    """Draw titled windows side by side, as SVG."""
    width, height = len(screens) * (WIDTH + GAP) - GAP + 2 * MARGIN, HEIGHT + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="{FONTS}" font-size="{FONT_SIZE}">',
        f"<title>The terminals of {' and '.join(screens)}, who chat</title>",
    ]
    for n, (title, screen) in enumerate(screens.items()):
        lines.append(f'<g transform="translate({MARGIN + n * (WIDTH + GAP)} {MARGIN})">')
        lines += [*draw_window(title, screen), "</g>"]
    return "\n".join([*lines, "</svg>\n"])


def draw_window(title: str, screen: pyte.Screen) -> Iterator[str]:
    """Draw the frame, the cursor and the rows."""
    frame = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="{RADIUS}"'
    corner = f"A{RADIUS} {RADIUS} 0 0 1"
    bar = f"M0 {BAR}V{RADIUS}{corner} {RADIUS} 0H{WIDTH - RADIUS}{corner} {WIDTH} {RADIUS}V{BAR}Z"
    yield f'{frame} fill="{FILL}"/>'
    yield f'<path d="{bar}" fill="{BAR_FILL}"/>'
    yield f'{frame} fill="none" stroke="{BORDER}"/>'
    for n in range(3):
        yield f'<circle cx="{PADDING + 6 + n * 20}" cy="{BAR // 2}" r="6" fill="{BUTTON}"/>'
    style = f'text-anchor="middle" font-weight="bold" fill="{TITLE}"'
    yield f'<text x="{WIDTH // 2}" y="{BAR // 2 + 5}" {style}>{escape(title)}</text>'
    top = BAR + PADDING
    place = f'x="{PADDING + screen.cursor.x * CELL}" y="{top + screen.cursor.y * LINE + 1}"'
    yield f'<rect {place} width="{CELL}" height="{LINE - 2}" fill="{COLORS["default"]}"/>'
    for y in range(ROWS):
        yield from draw_row(screen.buffer[y], top + y * LINE + FONT_SIZE)


def draw_row(row: Mapping[int, pyte.screens.Char], baseline: int) -> Iterator[str]:
    """Draw a row word by word: its columns stay aligned in a font of any width.

    A wide character, which has an empty cell behind it, is a word, drawn in the middle of both.
    """

    def word(x: int) -> tuple[str, bool, int]:
        return row[x].fg, row[x].data == " ", 0 if row[x + 1].data else x + 1

    columns = [x for x in range(COLUMNS) if row[x].data]
    for (color, is_space, middle), cells in itertools.groupby(columns, word):
        first, *others = cells
        place = f'x="{PADDING + first * CELL}" textLength="{(1 + len(others)) * CELL}"'
        if middle:
            x = PADDING + middle * CELL
            place = f'x="{x}" text-anchor="middle" font-size="{WIDE_FONT_SIZE}"'
        if not is_space:
            text = escape("".join(row[x].data for x in (first, *others)))
            yield f'<text {place} y="{baseline}" fill="{COLORS[color]}">{text}</text>'


if __name__ == "__main__":
    (ROOT / ".github" / "picture.svg").write_text(draw(play()), encoding="utf-8")
