"""The command line: `python -m bench COMMAND`."""

import argparse
import sys

from bench import compile as compile_command
from bench import decode as decode_command
from bench import gpu as gpu_command

_EPILOG = """\
examples:
  python -m bench compile                       compile every kernel for five GPUs, without one
  python -m bench compile --arch sm_90 --op select_topk
  python -m bench decode --quick                 a whole model's decoding, here a tiny one's
  python -m bench gpu --out round1              on a GPU: test, then time, in under 9 minutes
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures and inspects the kernels of std_kernels, and decoding with them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (compile_command, decode_command, gpu_command):
        command.add_parser(commands)
    options = parser.parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
