"""Prints the table of tested models; with --write, puts it into README.md."""

import sys
from pathlib import Path

from tests.decode.families.table import table, written

if sys.argv[1:] == ["--write"]:
    readme = Path(__file__).parents[3] / "README.md"
    readme.write_text(written(readme.read_text()))
elif sys.argv[1:]:
    sys.exit(f"{sys.argv[1]} is unknown, expected nothing or --write")
else:
    print(table())
