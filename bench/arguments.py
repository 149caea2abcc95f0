"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def between(kind: Callable[[str], Any], least: float, most: float) -> Callable[[str], Any]:
    """The type of an argument that is a number in a range."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            wanted = f"{least:g} to {most:g}" if most < 2**31 else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"is {text}, expected {wanted}")
        return value

    return parse


def new_parser(
    commands: Any, name: str, help: str, description: str, examples: str | None = None
) -> argparse.ArgumentParser:
    """A command's parser, which shows its texts as they are."""
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
