"""The promises of README.md: `python tests/promises.py` prints each one with its tests.

A group of tests begins with a comment that quotes the page, and names the heading above the text:

    # README, Terminal: Pasting several lines sends each of them.

The tests up to the next such comment are those of the promise. Several comments in a row share
their tests.
"""

import re
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text(encoding="utf-8")
SECTIONS: dict[str, str] = dict(re.findall(r"^#+ (.+)\n((?:(?!#).*\n?)*)", README, re.MULTILINE))
COMMENTS = re.compile(r"^(# README, .+\n(?:# .+\n)*)", re.MULTILINE)


class Promise(NamedTuple):
    """What a comment quotes, and the tests that follow it."""

    section: str
    quote: str
    tests: list[str]


def one_line(text: str) -> str:
    """Return text in which only the words count, and not where its lines end."""
    return " ".join(text.split())


def read() -> list[Promise]:
    """Return all promises in the tests."""
    promises = []
    for file in sorted(TESTS.glob("test_*.py")):
        head, *groups = COMMENTS.split(file.read_text(encoding="utf-8"))
        assert "\ndef test_" not in head, f"{file.name} begins with a test that is under no quote"
        for comments, code in zip(groups[::2], groups[1::2], strict=True):
            tests = re.findall(r"^def (test_\w+)", code, re.MULTILINE)
            comments = re.sub(r"\n# (?!README, )", " ", comments)
            for section, quote in re.findall(r"^# README, (.+?): (.+)", comments, re.MULTILINE):
                promises.append(Promise(section, quote, [f"{file.name}::{test}" for test in tests]))
    return promises


if __name__ == "__main__":
    for promise in sorted(read(), key=lambda promise: list(SECTIONS).index(promise.section)):
        print(f"{promise.section}: {promise.quote}", *promise.tests, sep="\n    ")
