"""What ends a command with one line for its user, not with a traceback."""

from __future__ import annotations

import os
import sys


class BadInput(Exception):
    """What the user gave cannot be used; the message is one line."""


class InputError(ValueError):
    """A model or a video that cannot be used; the message is one line, for a user."""


def drop_output() -> None:
    """What is left of stdout goes nowhere, or Python would fail to write it in the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
