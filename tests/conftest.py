"""What pytest loads: the modules that hold the fixtures."""

import sys

import pytest

sys.dont_write_bytecode = True  # Importing the scripts leaves nothing beside them.
pytest.register_assert_rewrite("processes")  # which terminal imports
pytest_plugins = ["processes", "peers", "network"]

# As a plugin, "terminal" would be pytest's own module.
from terminal import open_terminal  # noqa: E402

__all__ = ["open_terminal"]
