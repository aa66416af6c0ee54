"""README, "Terminal": the line editor alone, its typed row read back through an emulator."""

import re
import unicodedata

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import CLEAR, NO_WRAP, RESTORE_CURSOR, SAVE_CURSOR, UNSAFE_CHARACTER, WRAP, Editor

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
# the line: Ctrl-A, B, D, E, F, H, K, N, P, U, W, Y, Alt-B, D, F.

KEYS = {
    "Left": (f"{LEFT} \x1bOD \x02", "one two|", "one tw|o"),
    "Left, at the start": (f"{LEFT} \x1bOD \x02", "|one", "|one"),
    "Right": (f"{RIGHT} \x1bOC \x06", "one| two", "one |two"),
    "Right, at the end": (f"{RIGHT} \x1bOC \x06", "one|", "one|"),
    "Home": (f"{HOME} \x1bOH \x1b[1~ \x1b[7~ \x01", "one two|", "|one two"),
    "End": (f"{END} \x1bOF \x1b[4~ \x1b[8~ \x05", "|one two", "one two|"),
    "word left": (f"{WORD_LEFT} \x1bOd \x1bb", "один two-три|", "один two-|три"),
    "word left, behind a space": (f"{WORD_LEFT} \x1bb", "один |two", "|один two"),
    "word right": (f"{WORD_RIGHT} \x1bOc \x1bf", "|один two", "один| two"),
    "word right, in front of a space": (f"{WORD_RIGHT} \x1bf", "один| two-", "один two|-"),
    "Backspace": ("\x7f \x08", "one| two", "on| two"),
    "Backspace, at the start": ("\x7f \x08", "|one", "|one"),
    "Delete": (f"{DELETE} \x04", "on|e two", "on| two"),
    "Delete, at the end": (f"{DELETE} \x04", "one|", "one|"),
    "to the start": ("\x15", "one| two", "| two"),
    "to the end": ("\x0b", "one| two", "one|"),
    "word before": ("\x17", "one two-three |four", "one |four"),
    "word behind": ("\x1bd", "one| two-three", "one|-three"),
    "insert again": ("\x15\x19 \x15\x19\x15\x19", "one| two", "one| two"),
    "insert again, twice": ("\x17\x17\x19\x01\x19 \x0b\x15\x19\x01\x19", "one|", "one|one"),
    "insert again, nothing": ("\x19 \x01\x15\x05\x19", "one|", "one|"),
    "TAB is text": ("\t \t\x02\x06", "a|b", "a\t|b"),
}


@pytest.mark.parametrize(("keys", "before", "after"), KEYS.values(), ids=KEYS)
def test_keys(keys: str, before: str, after: str) -> None:
    for key in keys.split(" "):
        editor = typed(before)
        press(editor, key)
        assert state(editor) == after, repr(key)


@pytest.mark.parametrize("enter", ["\r", "\n", "\x1b\r", "\x1b\n"])
def test_enter_sends_all_of_the_line_wherever_the_cursor_is(enter: str) -> None:
    for keys in ("", HOME, LEFT):
        assert press(Editor(), f"a line\t{keys}{enter}two{enter}") == ["a line\t", "two"]


def test_ctrl_d_ends_the_input_where_the_line_is_empty() -> None:
    assert Editor().feed(b"\x04") == ([], True)
    assert Editor().feed(b"one\r\x04two\r") == ([b"one"], True)
    assert Editor().feed(b"one\x7f\x7f\x7f\x04") == ([], True)
    assert Editor().feed(b"one\x04") == ([], False)
    assert Editor().feed(b"") == ([], True)


# Backspace and the arrows take what a person sees as one character: a letter with its accents, an
# emoji with its modifiers, a joined emoji.


@pytest.mark.parametrize(
    "character",
    ["é", "e\u0301", "e\u0302\u0323", "и\u0306", "漢", "か\u3099", "ক\u09bf", "🎉", "👍🏽",
     "❤\ufe0f", "1\ufe0f\u20e3", "👩‍👩‍👧", "🏳\ufe0f‍🌈", "👩🏽‍💻"],
)  # fmt: skip
def test_one_character(character: str) -> None:
    before = state(typed("x|y"))
    for keys in ("\x7f", f"{LEFT}{DELETE}", f"{LEFT}{RIGHT}\x08", f"\x02\x04{RIGHT}{LEFT}"):
        editor = typed(f"x{character}|y")
        press(editor, keys)
        assert state(editor) == before


def test_a_mark_joins_the_letter_before_the_cursor() -> None:
    editor = typed("one|two")
    press(editor, "\u0301")
    assert editor.line == ["o", "n", "e\u0301", *"two"]
    press(editor, "\x7f")
    assert state(editor) == "on|two"


# README, Terminal: Other keys do nothing.

OTHERS = {
    "control keys": "".join(map(chr, {*range(32)} - {*b"\1\2\4\5\6\b\t\n\v\r\16\20\25\27\31\33"})),
    "function keys": "\x1bOP\x1bOS\x1b[15~\x1b[24~\x1b[[A\x1b[1;2P",
    "Page Up, Page Down, Insert": "\x1b[5~\x1b[6~\x1b[2~",
    "keypad": "\x1bOj\x1bOM\x1bOp",
    "with Shift, Alt or Ctrl": "\x1b[Z\x1b[1;2D\x1b[1;3C\x1b[1;5A\x1b[3;5~\x1b[1;10H\x1b\x1b[D",
    "with Alt, letters": "\x1bx\x1bé\x1b漢\x1b\x7f\x1b\t\x1b1\x1b ",
    "mouse": "\x1b[M !!\x1b[M#@@\x1b[<0;10;20M\x1b[<0;10;20m\x1b[32;10;20M",
    "focus": "\x1b[I\x1b[O",
    "bracketed paste": "\x1b[200~\x1b[201~",
    "kitty": "\x1b[97;5u\x1b[57441;2u",
    "answers": "\x1b[?62;22c\x1b[12;40R\x1b[?1;2$y",
    "incomplete": "\x1b[1\x00\x1b[ \x00\x1b[\x07",
    "Shift-F1 of Konsole": "\x1bO2P",
}
ANSWERS = {  # These have to come in one piece: the start of each is a key with Alt.
    "a colour": "\x1b]11;rgb:0000/0000/0000\x1b\\",
    "a colour, BEL": "\x1b]11;rgb:0000/0000/0000\x07",
    "name of the terminal": "\x1bP>|xterm(380)\x1b\\",
}


@pytest.mark.parametrize("keys", [*OTHERS.values(), *ANSWERS.values()], ids=[*OTHERS, *ANSWERS])
def test_other_keys_do_nothing(keys: str) -> None:
    for size in (len(keys), 1 if keys in OTHERS.values() else len(keys)):
        editor = typed("one| two")
        for start in range(0, len(keys), size):
            assert press(editor, keys[start : start + size]) == []
        press(editor, "!")
        assert state(editor) == "one!| two"


# README, Terminal: Up and Down recall earlier lines.

HISTORY = {
    "the last one": (UP, "two|"),
    "those before": (UP * 2, "one|"),
    "no further": (UP * 5, "one|"),
    "back": (UP * 2 + DOWN, "two|"),
    "to the line that was being typed": (UP * 2 + DOWN * 2, "new|"),
    "not beyond it": (DOWN * 3, "new|"),
    "all forms of the keys": ("\x1bOA\x10\x1bOB\x0e\x10", "two|"),
    "an edited old line": (f"{UP}!{UP}{DOWN}", "two|"),
    "the line being typed, beside an edited one": (f"{UP}!{DOWN}", "new|"),
    "what was sent of an edited old line": (f"{UP}!\r{UP}", "two!|"),
    "it stays as it was": (f"{UP}!\r{UP * 2}", "two|"),
    "empty lines are not kept": (f"\x15\r\r{UP}", "two|"),
    "the line being typed is not kept": (f"{UP}\r{DOWN}{UP * 3}", "one|"),
    "it can be empty": (f"\x15{UP}{DOWN}", "|"),
}


@pytest.mark.parametrize(("keys", "expected"), HISTORY.values(), ids=HISTORY)
def test_history(keys: str, expected: str) -> None:
    editor = Editor()
    press(editor, f"one\rtwo\rnew{keys}")
    assert state(editor) == expected


# README, Terminal: and scrolls sideways


def draw(editor: Editor, columns: int) -> tuple[str, str]:
    """Return the typed row, before the cursor and behind it. The row above it stays as it is."""
    screen = pyte.Screen(columns, 2)
    stream = pyte.Stream(screen)
    stream.feed("m" * columns + "\r\n" + 2 * (CLEAR + editor.row(columns)))
    assert screen.display[0] == "m" * columns
    assert screen.cursor.y == 1
    assert pyte.modes.DECAWM in screen.mode
    cells = [screen.buffer[1][column].data for column in range(columns)]
    place = screen.cursor.x
    return "".join(cells[:place]), "".join(cells[place:]).rstrip()


ROWS = [
    (40, "Ça va, le cœur ?|", "Ça va, le cœur ?|"),
    (40, "|Ελληνικά", "|Ελληνικά"),
    (40, "漢字|かな", "漢字|かな"),
    (40, "e\u0301te\u0301|", "été|"),
    (40, "a\tb|", "a b|"),
    (40, "", "|"),
    (10, "Привет, как дела?|", "как дела?|"),
    (10, "Привет, как |дела?", "т, как |дел"),
    (10, "|Привет, как дела?", "|Привет, ка"),
    (10, "один| два три", "один| два т"),
    (10, "漢字漢字漢字|", "漢字漢字|"),
    (10, "漢字|漢字漢字", "漢字|漢字漢"),
    (10, "x漢字漢字漢字|漢字", "字漢字|漢字"),
    (10, "e\u0301" * 12 + "|", "é" * 9 + "|"),
    (10, "Hello 🎉🎉🎉|!", "o 🎉🎉🎉|!"),
    (3, "абв|", "бв|"),
    (3, "漢字|", "字|"),
    (2, "аб|в", "б|в"),
    (2, "漢|字", "|字"),
    (1, "а|бв", "|б"),
    (1, "漢|字", "|"),
    (500, "я" * 498 + "|яяя", "я" * 496 + "|яяя"),
]


@pytest.mark.parametrize(("columns", "line", "row"), ROWS)
def test_the_typed_row(columns: int, line: str, row: str) -> None:
    before, after = draw(typed(line), columns)
    assert f"{before}|{after}" == row


LETTERS = ["a", "é", "e\u0301", "Я", "Ω", "漢", "🎉", " "]


@settings(deadline=None)
@given(st.lists(st.sampled_from(LETTERS)), st.lists(st.sampled_from(LETTERS)), st.integers(1, 20))
def test_any_part_of_a_line_is_shown_as_it_is(
    before: list[str], after: list[str], columns: int
) -> None:
    shown_before, shown_after = draw(typed("".join([*before, "|", *after])), columns)
    all_before, all_after = (
        unicodedata.normalize("NFC", "".join(part)) for part in (before, after)
    )
    assert all_before.endswith(shown_before)
    assert all_after.startswith(shown_after)
    widths = [2 if letter in "漢🎉" else 1 for letter in [*before, *after]]
    if sum(widths) < columns:
        assert (shown_before, shown_after) == (all_before, all_after.rstrip())
    elif columns > 2:
        assert not all_before or shown_before
        assert len(shown_before + shown_after) >= min(columns // 2 - 1, len(all_before.rstrip()))


# README, Terminal: TAB is text.


@settings(deadline=None, max_examples=150)
@given(st.binary() | st.text().map(lambda text: text.encode(errors="surrogatepass")), st.data())
def test_any_bytes_however_they_are_cut(data: bytes, choice: st.DataObject) -> None:
    whole, cut = Editor(), Editor()
    expected = whole.feed(data) if data else ([], False)
    lines: list[bytes] = []
    rest, ended = data, False
    while rest and not ended:
        size = choice.draw(st.integers(1, len(rest)))
        more, ended = cut.feed(rest[:size])
        lines += more
        rest = rest[size:]
    assert (lines, ended, cut.line, cut.cursor) == (*expected, whole.line, whole.cursor)
    row = whole.row(choice.draw(st.integers(1, 30)))
    own = "|".join(map(re.escape, (NO_WRAP, SAVE_CURSOR, RESTORE_CURSOR, WRAP)))
    assert row.startswith(NO_WRAP)
    assert row.endswith(WRAP)
    assert not UNSAFE_CHARACTER.search(re.sub(own, "", row))
    assert row.count("\x1b") == 4


@settings(deadline=None)
@given(st.binary().map(lambda data: re.sub(rb"[\x00-\x08\x0a-\x1f\x7f]", b"", data)))
def test_a_line_is_sent_as_it_was_typed_byte_for_byte(line: bytes) -> None:
    assert Editor().feed(line + b"\r") == ([line], False)
