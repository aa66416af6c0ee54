"""What pytest loads: the modules that hold the fixtures."""

import signal
import sys

import hypothesis
import pytest

hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")  # A slow machine fails no test.
sys.dont_write_bytecode = True  # Importing the scripts leaves nothing beside them.
for name in ("SIGINT", "SIGQUIT", "SIGHUP"):  # A shell ignores them for `pytest &`, nohup SIGHUP.
    if getattr(signal, name, None) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
pytest.register_assert_rewrite("processes")  # which terminal imports
pytest_plugins = ["processes", "peers", "network"]

# As a plugin, "terminal" would be pytest's own module.
from terminal import open_terminal  # noqa: E402

__all__ = ["open_terminal"]
