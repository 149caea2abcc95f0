"""Prints the table of tested models; with --write, puts it into docs/models.md."""

import sys
from pathlib import Path

from tests.decode.families.table import table, written

if sys.argv[1:] == ["--write"]:
    page = Path(__file__).parents[3] / "docs" / "models.md"
    page.write_text(written(page.read_text()))
elif sys.argv[1:]:
    sys.exit(f"{sys.argv[1]} is unknown, expected nothing or --write")
else:
    print(table())
