"""The command line: `python -m bench COMMAND`."""

import argparse
import sys
from importlib import import_module

# Where each is.
COMMANDS = {
    "acceptance": "bench.acceptance",
    "batch": "bench.batch",
    "compile": "bench.compile",
    "decode": "bench.decode.command",
    "demo": "bench.demo",
    "exactness": "bench.exactness.command",
    "kernels": "bench.kernels.command",
    "offload": "bench.offload",
    "prefill": "bench.prefill",
    "promises": "bench.promises",
    "quantizing": "bench.quantizing",
    "real": "bench.real.command",
    "report": "bench.report.command",
    "roofline": "bench.roofline.command",
    "selection": "bench.selection.command",
    "tune": "bench.tune.command",
    "gpu": "bench.gpu.command",
}

_EPILOG = """\
examples:
  python -m bench acceptance                    with and without 4-bit drafts, demo model
  python -m bench batch                         videos together and one at a time, demo model
  python -m bench compile                       compile every kernel for five GPUs, without one
  python -m bench compile --arch sm_90 --op select_topk
  python -m bench decode --quick                 decoding, of a tiny model and the demo's
  python -m bench demo --out bench/results       the figures of the demo, for docs/pays.md
  python -m bench exactness                      how many tokens differ in bfloat16, demo model
  python -m bench kernels --quick --out quick    each op beside its rivals, also on the CPU
  python -m bench offload                        weights on a disk, 4-bit drafts in memory
  python -m bench prefill                        time to the first token, patched and unpatched
  python -m bench promises                       what passes take under each promise, in bfloat16
  python -m bench quantizing                     how long 4-bit copies take to make
  python -m bench real --quick                   a pretrained model on real texts
  python -m bench report --check                 do the pages' tables say what the results do?
  python -m bench roofline --model qwen2-vl-7b --gpu h200 --batch 8 --context 25000
  python -m bench selection --out trial           rules of re-selection, on the demo model
  python -m bench tune --out tune               on a GPU: launch configurations for the table
  python -m bench gpu --out round1              on a GPU: test, then time, in under 10 minutes
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Inspects and measures the kernels of std_kernels and decoding with them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    # One that is named is imported alone: some commands need torch to say what they take.
    named = [command for command in COMMANDS if command in argv[:1]]
    for command in named or COMMANDS:
        import_module(COMMANDS[command]).add_parser(commands)
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print(f"python -m bench {options.command}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        from std_decode.app.output import NotWritten

        if not isinstance(error, NotWritten):
            raise
        print(f"python -m bench {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
