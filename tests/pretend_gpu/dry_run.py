"""`bench gpu` on the pretend GPU: ``python -m tests.pretend_gpu.dry_run --out DIR``.

Every part at sizes of a CPU, in its share of the time: what options are called, which files come
about, that it ends. All but the figures. Options are those of `bench gpu`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from tests.pretend_gpu.install import install, missing, surroundings

SMALL = {"qwen2-vl-7b": "tiny", "25000": "200", "4096": "100", "32": "3", "8": "2", "41": "9"}
MORE = {"decode": ["--context", "400"], "kernels": ["--quick", "--context", "512"]}


def small(part: Any) -> Any:
    options = [SMALL.get(option, option) for option in part.options]
    if part.runs == "kernels":
        options = []
    return part._replace(options=[*options, *MORE.get(part.runs, [])])


def main() -> int:
    if missing() is not None:
        print(f"no pretend GPU: {missing()}", file=sys.stderr)
        return 2
    os.environ.update(surroundings())  # of the parts, which are processes
    install()
    from bench.__main__ import main as bench
    from bench.gpu import parts

    parts.PARTS[:] = [small(part) for part in parts.PARTS]
    return bench(["gpu", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
