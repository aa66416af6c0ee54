"""The promises of README.md: `python tests/promises.py` prints each one with its tests.

A group of tests begins with a comment that quotes the page, and names the heading above the text:

    # README, Terminal: Pasting several lines sends each of them.

The tests up to the next such comment are those of the promise. Several comments in a row share
their tests.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text(encoding="utf-8")
SECTIONS: dict[str, str] = dict(re.findall(r"^#+ (.+)\n((?:(?!#).*\n?)*)", README, re.MULTILINE))
MARK = re.compile(
    r"^# README, (?P<section>[^:\n]+): (?P<quote>.+(?:\n#(?! README, ).*)*)"
    r"|^def (?P<test>test_\w+)",
    re.MULTILINE,
)


@dataclass
class Promise:
    """What a comment quotes, and the tests that follow it."""

    section: str
    quote: str
    tests: list[str] = field(default_factory=list)

    def place(self) -> tuple[int, int]:
        """Return the section's place on the page, and the quote's place in it: -1 if it is not."""
        text = one_line(SECTIONS.get(self.section, ""))
        return [*SECTIONS, self.section].index(self.section), text.find(self.quote)


def one_line(text: str) -> str:
    """Return text in which only the words count, and not where its lines end."""
    return " ".join(text.split())


def read() -> tuple[list[Promise], list[str]]:
    """Return all promises in the tests, and the tests that are under none."""
    promises: list[Promise] = []
    strays: list[str] = []
    for file in sorted(TESTS.glob("test_*.py")):
        group: list[Promise] = []
        for found in MARK.finditer(file.read_text(encoding="utf-8")):
            test = f"{file.name}::{found['test']}"
            if not found["test"]:
                group = [] if group and group[-1].tests else group
                quote = re.sub(r"^#", "", found["quote"], flags=re.MULTILINE)
                group.append(Promise(found["section"], one_line(quote)))
                promises.append(group[-1])
            elif not group:
                strays.append(test)
            for promise in group if found["test"] else []:
                promise.tests.append(test)
    return promises, strays


def main() -> None:
    """Print all promises, in the order of the page."""
    for promise in sorted(read()[0], key=Promise.place):
        print(f"{promise.section}: {promise.quote}", *promise.tests, sep="\n    ")


if __name__ == "__main__":
    main()
