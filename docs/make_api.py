"""Write docs/api.md from the docstrings: ``python docs/make_api.py``."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "api.md"
HEAD = """\
# API

Made from the docstrings by `python docs/make_api.py`; change those, not this page.
"""
MODULES = {
    "std_decode": ["patch", "unpatch", "patched", "is_patched", "last_stats", "DecodeStats"],
    "std_decode.frames": ["read_video", "Video"],
    "std_decode.inputs": [
        "read_image",
        "load_processor",
        "load_model",
        "make_inputs",
        "to_model",
        "InputError",
    ],
    "std_kernels": None,  # all of it
}
_ITEM = re.compile(r"^(\*{0,2}[\w, ]+?): +(.*)", re.DOTALL)


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    for name, members in MODULES.items():
        module = importlib.import_module(name)
        members = list(module.__all__) if members is None else members
        links = ", ".join(f"[`{member}`](#{member.lower()})" for member in members)
        parts += [f"## {name}\n", f"{_text(module.__doc__)}\n", f"{links}\n"]
        parts += [_entry(member, getattr(module, member)) for member in members]
    return "\n".join(parts)


def _entry(name: str, thing: Any) -> str:
    kind = "class " if inspect.isclass(thing) else ""
    call = "" if kind else _signature(thing)
    return f"### {name}\n\n```python\n{kind}{name}{call}\n```\n\n{_docstring(thing)}\n"


def _signature(function: Any) -> str:
    """As in the source: one line where it fits, else an argument a line."""
    signature = inspect.signature(function)
    arguments, star = [], False
    for argument in signature.parameters.values():
        if argument.kind is argument.KEYWORD_ONLY and not star:
            arguments.append("*")
        star = star or argument.kind in (argument.KEYWORD_ONLY, argument.VAR_POSITIONAL)
        stars = {argument.VAR_POSITIONAL: "*", argument.VAR_KEYWORD: "**"}.get(argument.kind, "")
        text = f"{stars}{argument.name}"
        if argument.annotation is not argument.empty:
            text += f": {_type(argument.annotation)}"
        if argument.default is not argument.empty:
            text += f" = {argument.default!r}".replace("'", '"')
        arguments.append(text)
    returned = signature.return_annotation
    arrow = "" if returned is signature.empty else f" -> {_type(returned)}"
    line = f"({', '.join(arguments)}){arrow}"
    if len(line) <= 80:
        return line
    return "(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){arrow}"


def _type(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.replace("torch.", "").replace("'", '"')


def _docstring(thing: Any) -> str:
    """Markdown of a docstring with sections such as ``Args:``."""
    done: list[str] = []
    for block in re.split(r"\n\n(?=\w+:\n)", inspect.getdoc(thing) or ""):
        title, _, body = block.partition(":\n")
        if not re.fullmatch(r"\w+", title) or not body.startswith("    "):
            done.append(_text(block))
            continue
        body = textwrap.dedent(body)
        listed = title in ("Args", "Attributes", "Raises")
        done.append(f"**{title}**\n\n{_list(body) if listed else _text(body)}")
    return "\n\n".join(done)


def _list(body: str) -> str:
    """Items "name: text", the text going on in indented lines."""
    items = re.split(r"\n(?=\S)", body.strip("\n"))
    lines = []
    for item in items:
        text = " ".join(line.strip() for line in item.splitlines())
        found = _ITEM.match(text)
        lines.append(f"- `{found[1]}`: {_text(found[2])}" if found else f"- {_text(text)}")
    return "\n".join(lines)


def _text(text: str | None) -> str:
    """Paragraphs; ``code`` as `code`, and ``>>>`` or indented lines as a block."""
    blocks = re.split(r"\n\n(?! )", inspect.cleandoc(text or ""))
    return "\n\n".join(_paragraph(part) for block in blocks for part in _parts(block))


def _parts(block: str) -> list[str]:
    """A block, with indented code after it apart."""
    before, _, code = block.partition("\n\n    ")
    return [before, "    " + code] if code else [block]


def _paragraph(text: str) -> str:
    if not text.startswith((">>>", "    ")):
        return text.replace("``", "`")
    code = re.sub(r"^(>>>|\.\.\.) ?", "", textwrap.dedent(text), flags=re.MULTILINE)
    is_code = text.startswith(">>>") or "import " in code
    return f"```{'python' if is_code else 'text'}\n{code}\n```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
