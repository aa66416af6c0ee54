"""What pytest loads: the modules that hold the fixtures."""

import sys

sys.dont_write_bytecode = True  # Importing the scripts leaves nothing beside them.

pytest_plugins = ["processes", "peers", "network", "terminal"]
