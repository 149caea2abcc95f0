"""Prompts of four kinds, from what Python itself carries: help, source, tables, and a chat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

KINDS = ("prose", "code", "table", "dialogue")
# How an answer is timed, besides unpatched.
DENSE, AUTO = "dense path", "auto"
LOOKUP = "prompt lookup"  # transformers' own way to draft without a model
WAYS = (DENSE, "4 drafts", "4 drafts, int4", "look-ups", "look-ups or 4 drafts", AUTO, LOOKUP)
TASKS = ("summary", "question", "continuation")
_MODULES = (
    "textwrap", "heapq", "statistics", "argparse", "fractions", "json.decoder", "tokenize",
    "csv", "shlex", "configparser", "queue", "string", "zipfile", "tarfile", "logging",
    "threading", "calendar", "datetime", "difflib", "inspect", "pickle", "subprocess",
)  # fmt: skip
_TURN = 10  # tokens of a chat's template for a question and its answer
_ASKED = {
    ("prose", "summary"): "Summarise the text in a few sentences.",
    ("prose", "question"): "Which things does the text explain? List them, with a sentence each.",
    ("code", "summary"): "Summarise what this module does in a few sentences.",
    ("code", "question"): "Which functions and classes does this module define? List them.",
    ("table", "summary"): "Summarise in a few sentences what this table contains.",
    ("table", "question"): "Repeat the first ten rows of the table as a list.",
    ("dialogue", "summary"): "Summarise what we have talked about so far.",
    ("dialogue", "question"): "What did I ask you about first, and what did you answer?",
    ("dialogue", "continuation"): "Please tell me more about the last one.",
}


def prompt(tokenizer: Any, kind: str, task: str, tokens: int, number: int = 0) -> dict[str, Any]:
    """A text of a kind, and what to do with it; a continuation goes on where the text ends.

    Args:
        kind: one of `KINDS`.
        task: one of `TASKS`.
        tokens: of the text.
        number: of the text; each begins elsewhere.

    Returns:
        `input_ids` and `attention_mask`, int64 ``[1, S]``, S being at most 100 more than `tokens`.
    """
    if kind == "dialogue":
        chat = _turns(tokenizer, tokens, number)
        return _chat(tokenizer, [*chat, {"role": "user", "content": _ASKED[kind, task]}])
    text = _first(tokenizer, "".join(_SOURCES[kind](number, 8 * tokens)), tokens)
    if task == "continuation":
        return dict(tokenizer(text, return_tensors="pt"))
    asked = f"{text}\n\n{_ASKED[kind, task]}"
    return _chat(tokenizer, [{"role": "user", "content": asked}])


def _chat(tokenizer: Any, turns: list[dict[str, str]]) -> dict[str, Any]:
    return dict(
        tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    )


def _first(tokenizer: Any, text: str, tokens: int) -> str:
    return tokenizer.decode(tokenizer(text).input_ids[:tokens])


def _topics(number: int) -> Iterator[tuple[str, str]]:
    """All of Python's help, name and text, from the `number`-th topic on."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    first = 7 * number % len(names)
    yield from ((name, topics[name].strip()) for name in names[first:] + names[:first])


def _prose(number: int, characters: int) -> Iterator[str]:
    for _, text in _topics(number):
        yield f"{text}\n\n"
        characters -= len(text)
        if characters < 0:
            return


def _code(number: int, characters: int) -> Iterator[str]:
    import importlib
    import inspect

    for step in range(len(_MODULES)):
        module = importlib.import_module(_MODULES[(number + step) % len(_MODULES)])
        source = inspect.getsource(module)
        yield f"# {module.__name__}.py\n{source}\n"
        characters -= len(source)
        if characters < 0:
            return


def _table(number: int, characters: int) -> Iterator[str]:
    import unicodedata
    from html.entities import html5

    yield "| entity | code point | character | name |\n|---|---|---|---|\n"
    rows = [(name, text) for name, text in sorted(html5.items()) if name[-1] == ";"]
    rows = [(name[:-1], text) for name, text in rows if len(text) == 1 and text.isprintable()]
    first = 40 * number % len(rows)
    for name, text in rows[first:] + rows[:first]:
        row = f"| {name} | {ord(text)} | {text} | {unicodedata.name(text).lower()} |\n"
        yield row
        characters -= len(row)
        if characters < 0:
            return


_SOURCES = {"prose": _prose, "code": _code, "table": _table}


def _turns(tokenizer: Any, tokens: int, number: int) -> list[dict[str, str]]:
    """A chat about topics of Python's help, a paragraph or two of each, of so many tokens."""
    turns: list[dict[str, str]] = []
    left = tokens
    for name, text in _topics(number):
        asked = f"What can you tell me about {name.lower()} in Python?"
        answer = "\n\n".join(text.split("\n\n")[1:3]) or text
        left -= len(tokenizer(asked).input_ids) + _TURN
        answer = _first(tokenizer, answer, min(200, max(1, left)))
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        left -= len(tokenizer(answer).input_ids)
        if left <= _TURN:
            break
    return turns
