"""What is promised of the project as a whole."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from processes import ROOT, TIMEOUT

SCRIPTS = ("server.py", "client.py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copied_script_says_what_it_needs(script: str) -> None:
    """Its inline metadata (PEP 723) is the project's."""
    block = re.search(
        r"^# /// script\n((?:#.*\n)+?)# ///\n", (ROOT / script).read_text(), re.MULTILINE
    )
    assert block
    metadata = tomllib.loads(re.sub("^# ?", "", block[1], flags=re.MULTILINE))
    assert metadata == {key: PROJECT[key] for key in ("requires-python", "dependencies")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_stands_alone(script: str, tmp_path: Path) -> None:
    (tmp_path / script).write_text((ROOT / script).read_text())
    shown = subprocess.run(
        [sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, timeout=TIMEOUT
    )
    assert shown.returncode == 0
    assert re.search(rf"^example: python {script} ", shown.stdout.decode(), re.MULTILINE)
    assert len(shown.stdout.splitlines()) < 25


def test_nothing_of_the_project_can_be_imported_by_accident(tmp_path: Path) -> None:
    code = "import importlib.util as i; print(*map(i.find_spec, ['server', 'client', 'tests']))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert found.stdout.split() == [b"None"] * 3


def test_the_top_level_holds_the_two_scripts_and_little_else() -> None:
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert names == {"server.py", "client.py", "tests", "README.md", "pyproject.toml"}
