"""The command line: `python -m tests.decode.survey`, from the root of the repository."""

from __future__ import annotations

import argparse
import difflib
import sys
import warnings
from collections import Counter
from multiprocessing import get_context
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from tests.decode.survey.ask import FAULT, NOT_BUILT, Outcome, ask, told
from tests.decode.survey.build import NotBuilt, built
from tests.decode.survey.page import PAGE, line, written

SECONDS = 120  # that a class may take

_HELP = """\
Goes through every class that AutoModelForCausalLM and AutoModelForImageTextToText load: makes its
default configuration small, builds a model of random weights, patches it, and compares what it
generates, greedy and sampled, with what it generates unpatched. A line for each:
  identical            every token is that of the unpatched model
  runs as unpatched    accepted, and each call falls back
  refused              by NotImplementedError, with the model as it was
  not built            no small model of the default configuration; not asked
  FAULT                anything else, which is a bug of std_decode
A class whose configuration does not become small by itself gets its fields in
tests/decode/survey/build.py.
Exit status: 0, 1 if any is a FAULT."""

_EPILOG = """\
examples:
  python -m tests.decode.survey                             all, 10 minutes
  python -m tests.decode.survey Qwen3ForCausalLM GPT2LMHeadModel
  python -m tests.decode.survey --write                     after an update of transformers"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.decode.survey",
        description=_HELP,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a class (all)")
    parser.add_argument(
        "--write", action="store_true", help="write the list of docs/causal-lms.md"
    )
    options = parser.parse_args(argv)
    known = names()
    for name in options.names:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known)) or "the name of a class"
            parser.error(f"{name} is unknown, expected one that the mappings have: {near}")
    if options.write and options.names:
        parser.error("--write is for the whole list, expected no NAME with it")
    outcomes = {}
    for name in options.names or known:
        outcomes[name] = outcome_of(name)
        print(f"{name}: {line(outcomes[name])}", flush=True)
    count = Counter(outcome.kind for outcome in outcomes.values())
    print("; ".join(f"{kind} {count[kind]}" for kind in sorted(count)))
    if count[FAULT]:
        return 1
    if options.write:
        PAGE.write_text(written(outcomes, transformers.__version__))
    return 0


def names() -> list[str]:
    """Of all classes, in order."""
    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    found: set[str] = set()
    for mapping in mappings:
        for value in mapping.values():
            found.update([value] if isinstance(value, str) else value)
    return sorted(found, key=str.lower)


def outcome_of(name: str, seconds: float = SECONDS) -> Outcome:
    """Of one class, in a process of its own, which may hang or be killed for its memory."""
    context = get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, sending), daemon=True)
    process.start()
    sending.close()
    try:
        if not receiving.poll(seconds):
            return Outcome(FAULT, f"took more than {seconds:g} seconds")
        return receiving.recv()
    except EOFError:
        process.join()
        return Outcome(FAULT, f"ended its process with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _work(name: str, sending: Any) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    try:
        outcome = ask(*built(getattr(transformers, name)))
    except NotBuilt as obstacle:
        outcome = Outcome(NOT_BUILT, str(obstacle))
    except Exception as error:
        outcome = Outcome(FAULT, f"the survey failed by {told(error)}")
    sending.send(outcome)


if __name__ == "__main__":
    sys.exit(main())
