"""README, "Terminal": the line editor alone, its typed row read back through an emulator."""

import re

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import CLEAR, UNSAFE_PART, Editor

UP, DOWN, RIGHT, LEFT, HOME, END = (f"\x1b[{letter}" for letter in "ABCDHF")
WORD_LEFT, WORD_RIGHT, DELETE = "\x1b[1;5D", "\x1b[1;5C", "\x1b[3~"


def press(editor: Editor, keys: str) -> list[str]:
    """Press keys that do not end the input; return the lines that were sent."""
    lines, ended = editor.feed(keys.encode())
    assert not ended
    return [line.decode() for line in lines]


def state(editor: Editor) -> str:
    """Return the line with a bar where the cursor is."""
    return "".join([*editor.line[: editor.cursor], "|", *editor.line[editor.cursor :]])


def typed(line: str) -> Editor:
    """Return an editor in which a line was typed, with the cursor at the bar."""
    editor = Editor()
    before, _, after = line.partition("|")
    press(editor, after + "\x01" + before)
    return editor


# README, Terminal: Arrows, Home, End, Delete, Ctrl-Left, Ctrl-Right, and the usual Emacs keys edit
# the line: Ctrl-A, B, D, E, F, H, K, N, P, U, W, Y, and Alt-B, D, F.
# README, Terminal: TAB inserts a tab.
# README, Terminal: Up and Down recall earlier lines.

SENT = "one\rtwo\rnew|"
KEYS = {  # the forms of a key, what was typed before it, and the line after it
    "Left": (f"{LEFT} \x1bOD \x02", "one two|", "one tw|o"),
    "Left, at the start": (LEFT, "|one", "|one"),
    "Right": (f"{RIGHT} \x1bOC \x06", "one| two", "one |two"),
    "Right, at the end": (RIGHT + LEFT, "one|", "on|e"),
    "Home": (f"{HOME} \x1bOH \x1b[1~ \x1b[7~ \x01", "one two|", "|one two"),
    "End": (f"{END} \x1bOF \x1b[4~ \x1b[8~ \x05", "|one two", "one two|"),
    "word left": (f"{WORD_LEFT} \x1bOd \x1bb", "один two-три|", "один two-|три"),
    "word left, behind a space": (WORD_LEFT, "e\u0301te\u0301 |two", "|e\u0301te\u0301 two"),
    "word right": (f"{WORD_RIGHT} \x1bOc \x1bf", "|один two", "один| two"),
    "word right, in front of a space": (WORD_RIGHT, "один| two-", "один two|-"),
    "Backspace": ("\x7f \x08", "one| two", "on| two"),
    "Backspace, at the start": ("\x7f", "|one", "|one"),
    "Delete": (f"{DELETE} \x04", "on|e two", "on| two"),
    "Delete, at the end": (f"{DELETE} \x04", "one|", "one|"),
    "to the start": ("\x15", "one| two", "| two"),
    "to the end": ("\x0b", "one| two", "one|"),
    "word before": ("\x17", "one two-three |four", "one |four"),
    "word behind": ("\x1bd", "one| two-three", "one|-three"),
    "insert again": ("\x15\x19 \x15\x19\x15\x19", "one| two", "one| two"),
    "insert again, twice": ("\x17\x17\x19\x01\x19 \x0b\x15\x19\x01\x19", "one|", "one|one"),
    "insert again, nothing": ("\x19", "one|", "one|"),
    "an accent, which joins the letter": ("\u0301\x7f", "one|two", "on|two"),
    "TAB": ("\t \t\x02\x06", "a|b", "a\t|b"),
    "Up": (f"{UP} \x1bOA \x10", SENT, "two|"),
    "Up, no further than the first": (UP * 3, SENT, "one|"),
    "Down": (f"{UP * 2}{DOWN} {UP * 2}\x1bOB {UP * 2}\x0e", SENT, "two|"),
    "Down, to the line that was being typed, and no further": (UP * 2 + DOWN * 5, SENT, "new|"),
    "an edited old line": (f"{UP}!{UP}{DOWN}", SENT, "two|"),
    "the line being typed, beside an edited one": (f"{UP}!{DOWN}", SENT, "new|"),
    "what was sent of an edited old line": (f"{UP}!\r{UP}", SENT, "two!|"),
    "an edited old line stays as it was": (f"{UP}!\r{UP * 2}", SENT, "two|"),
    "old letters keep their accents": (f"\x15e\u0301\r{UP}\x7f", SENT, "|"),
    "empty lines are not kept": (f"\x15\r\r{UP}", SENT, "two|"),
    "the line being typed is not kept": (f"{UP}\r{DOWN}{UP * 3}", SENT, "one|"),
}

# Backspace and the arrows take what a person sees as one character: a letter with its accents, an
# emoji with its modifiers, a joined emoji.
CHARACTERS = "é e\u0302\u0323 漢 か\u3099 ক\u09bf 👍🏽 1\ufe0f\u20e3 👩‍👩‍👧 🏳\ufe0f‍🌈 👩🏽‍💻"
KEYS |= {
    f"one character: {one}": (f"\x7f {LEFT}{DELETE} {LEFT}{RIGHT}\x08", f"x{one}|y", "x|y")
    for one in CHARACTERS.split(" ")
}


@pytest.mark.parametrize(("keys", "before", "after"), KEYS.values(), ids=KEYS)
def test_keys(keys: str, before: str, after: str) -> None:
    for key in keys.split(" "):
        editor = typed(before)
        press(editor, key)
        assert state(editor) == after, repr(key)


@pytest.mark.parametrize("enter", ["\r", "\n", "\x1b\r", "\x1b\n"])
def test_enter_sends_all_of_the_line_wherever_the_cursor_is(enter: str) -> None:
    assert press(Editor(), f"a line\t{LEFT}{enter}two{HOME}{enter}") == ["a line\t", "two"]


@given(st.binary().map(lambda data: re.sub(rb"[\x00-\x08\x0a-\x1f\x7f]", b"", data)))
def test_a_line_is_sent_as_it_was_typed_byte_for_byte(line: bytes) -> None:
    assert Editor().feed(line + b"\r") == ([line], False)


def test_ctrl_d_ends_the_input_where_the_line_is_empty() -> None:
    assert Editor().feed(b"one\r\x04two\r") == ([b"one"], True)
    assert Editor().feed(b"one\x7f\x7f\x7f\x04") == ([], True)
    assert Editor().feed(b"one\x04") == ([], False)
    assert Editor().feed(b"") == ([], True)


# README, Terminal: Other keys do nothing.

OTHERS = {
    "control keys": "".join(map(chr, {*range(32)} - {*b"\1\2\4\5\6\b\t\n\v\r\16\20\25\27\31\33"})),
    "function keys": "\x1bOP\x1bOS\x1b[15~\x1b[24~\x1b[[A\x1b[1;2P\x1bO2P",
    "Page Up, Page Down, Insert": "\x1b[5~\x1b[6~\x1b[2~",
    "keypad": "\x1bOj\x1bOM\x1bOp",
    "with Shift, Alt or Ctrl": "\x1b[Z\x1b[1;2D\x1b[1;3C\x1b[1;5A\x1b[3;5~\x1b[1;10H\x1b\x1b[D",
    "with Alt, letters": "\x1bx\x1bé\x1b漢\x1b\x7f\x1b\t\x1b1\x1b ",
    "mouse": "\x1b[<0;10;20M\x1b[<0;10;20m\x1b[32;10;20M",
    "bracketed paste": "\x1b[200~\x1b[201~",
    "answers": "\x1b[?62;22c\x1b[12;40R\x1b[?1;2$y\x1b[I",
    "incomplete": "\x1b[1\x00\x1b[ \x00\x1b[\x07",
    # The start of these is a key with Alt.
    "in one piece: a colour": "\x1b]11;rgb:0/0/0\x1b\\\x1b]11;rgb:0/0/0\x07",
    "in one piece: a name": "\x1bP>|xterm(380)\x1b\\",
}


@pytest.mark.parametrize(("name", "keys"), OTHERS.items(), ids=OTHERS)
def test_other_keys_do_nothing(name: str, keys: str) -> None:
    for pieces in ([keys], [keys] if "in one piece" in name else list(keys)):
        editor = typed("one| two")
        for piece in pieces:
            assert press(editor, piece) == []
        press(editor, "!")
        assert state(editor) == "one!| two"


@given(st.binary() | st.text().map(str.encode), st.integers(1, 8))
def test_any_bytes_however_they_are_cut(data: bytes, size: int) -> None:
    data = data.replace(b"\x04", b"")  # Ctrl-D could end the input.
    whole, cut = Editor(), Editor()
    lines, _ = whole.feed(data)
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    assert [line for part in parts for line in cut.feed(part)[0]] == lines
    assert (cut.line, cut.cursor) == (whole.line, whole.cursor)
    drawn = re.fullmatch(r"\x1b\[\?7l(.*)\x1b7(.*)\x1b8\x1b\[\?7h", whole.draw(30))
    assert drawn and not UNSAFE_PART.search("".join(drawn.groups()))


# README, Terminal: and scrolls sideways
def draw(editor: Editor, columns: int) -> tuple[str, str]:
    """Return the typed row, before the cursor and behind it. The row above it stays as it is."""
    screen = pyte.Screen(columns, 2)
    stream = pyte.Stream(screen)
    stream.feed("m" * columns + "\r\n" + 2 * (CLEAR + editor.draw(columns)))
    assert screen.display[0] == "m" * columns
    assert screen.cursor.y == 1
    assert pyte.modes.DECAWM in screen.mode
    cells = [screen.buffer[1][column].data for column in range(columns)]
    return "".join(cells[: screen.cursor.x]), "".join(cells[screen.cursor.x :]).rstrip()


ROWS = [  # the columns, the line, and what is shown of it
    (40, "a\tb|", "a b|"),
    (40, "a\x85\u202eb|", "a\ufffd\ufffdb|"),
    (10, "Привет, как дела?|", "как дела?|"),
    (10, "Привет, как |дела?", "т, как |дел"),
    (10, "|Привет, как дела?", "|Привет, ка"),
    (10, "один| два три", "один| два т"),
    (10, "漢字|漢字漢字", "漢字|漢字漢"),
    (10, "x漢字漢字漢字|漢字", "字漢字|漢字"),
    (10, "e\u0301" * 12 + "|", "é" * 9 + "|"),
    (10, "Hello 🎉🎉🎉|!", "o 🎉🎉🎉|!"),
    (3, "漢字|", "字|"),
    (2, "漢|字", "|字"),
    (1, "а|бв", "|б"),
    (1, "漢|字", "|"),
    (500, "я" * 498 + "|яяя", "я" * 496 + "|яяя"),
]


@pytest.mark.parametrize(("columns", "line", "row"), ROWS)
def test_the_typed_row(columns: int, line: str, row: str) -> None:
    assert "|".join(draw(typed(line), columns)) == row
