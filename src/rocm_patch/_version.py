"""The version, alone in a file so that the build backend and `--version` read it without importing anything."""

__version__ = "1.2.0"
