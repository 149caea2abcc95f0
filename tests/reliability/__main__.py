"""The command line: `python -m tests.reliability COMMAND`, from the root of the repository."""

import argparse
import sys
from importlib import import_module

COMMANDS = ("lossless", "pretrained", "soak", "fuzz", "draws", "replaced")

_EPILOG = """\
examples:
  python -m tests.reliability lossless --cases 2000 --state lossless.jsonl
  python -m tests.reliability lossless --cases 2000 --shard 2/4   one of four processes
  python -m tests.reliability pretrained --prompts 100 --state pretrained.jsonl
  python -m tests.reliability soak --rounds 10000
  python -m tests.reliability fuzz --cases 500
  python -m tests.reliability draws
  python -m tests.reliability replaced --cases 1000

With --out bench/results each writes its section of reliability.md."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability",
        description="The long runs of tests/reliability, of which CI takes a small part.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    for command in [name for name in COMMANDS if name in argv[:1]] or COMMANDS:
        import_module(f"tests.reliability.{command}").add_parser(commands)
    options = parser.parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
