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
COMMENTS_OR_TEST = re.compile(r"^(# README, .+\n(?:# .+\n)*)|^def (test_\w+)", re.MULTILINE)


class Promise(NamedTuple):
    """What a comment quotes, and the tests that follow it."""

    section: str
    quote: str
    tests: list[str]


def one_line(text: str) -> str:
    """Return text in which only the words count, and not where its lines end."""
    return " ".join(text.split())


def read() -> tuple[list[Promise], list[str]]:
    """Return all promises in the tests, and the tests that are under none."""
    promises: list[Promise] = []
    strays: list[str] = []
    for file in sorted(TESTS.glob("test_*.py")):
        tests = strays
        for comments, test in COMMENTS_OR_TEST.findall(file.read_text(encoding="utf-8")):
            if test:
                tests.append(f"{file.name}::{test}")
                continue
            tests = []
            comments = re.sub(r"\n# (?!README, )", " ", comments)
            for section, quote in re.findall(r"^# README, (.+?): (.+)", comments, re.MULTILINE):
                promises.append(Promise(section, quote, tests))
    return promises, strays


def place(promise: Promise) -> tuple[int, int]:
    """Return which section of the page has a promise, and where in it."""
    section = list(SECTIONS).index(promise.section)
    return section, one_line(SECTIONS[promise.section]).find(promise.quote)


if __name__ == "__main__":
    for promise in sorted(read()[0], key=place):
        print(f"{promise.section}: {promise.quote}", *promise.tests, sep="\n    ")
