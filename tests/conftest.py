"""What pytest loads: the modules that hold the fixtures."""

import signal
import sys
from pathlib import Path

# Compile the tests, and hypothesis, once for all workers. Nothing is written beside the scripts.
sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "pycache")
sys.dont_write_bytecode = False

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")  # A slow machine fails no test.
for name in ("SIGINT", "SIGQUIT", "SIGHUP"):  # A shell ignores them for `pytest &`, nohup SIGHUP.
    if getattr(signal, name, None) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
pytest.register_assert_rewrite("processes")  # which terminal imports
pytest_plugins = ["processes", "peers", "network"]

# As a plugin, "terminal" would be pytest's own module.
from terminal import open_terminal  # noqa: E402

__all__ = ["open_terminal"]
