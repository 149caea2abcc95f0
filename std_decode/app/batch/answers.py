"""The file of answers: a JSON line a video, written so that a kill loses and doubles nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from std_decode.app.output import check_file, replace_file
from std_decode.errors import BadInput

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs from one file
    fcntl = None  # type: ignore[assignment]

Key = tuple[str, "str | None"]  # video and prompt
_BEGINNING = b'{"video": '


class Answers:
    """The answers that are there, and the place for more.

    A line is written in one piece and synced. Only the last one can be cut off, by a kill or a
    crash, and it is taken away when the file is opened again: its video is asked once more.

    Args:
        path: JSON lines; need not be there.
        settings: what the answers depend on besides the prompt.
        retry: whether lines with an error are dropped.

    Attributes:
        done: video and prompt of each line,
        wrong: and of those with an error.

    Raises:
        BadInput: no place for a file, no file of answers, other settings, or in use.
    """

    def __init__(self, path: Path, settings: dict[str, Any], retry: bool = False):
        check_file("--out", path)
        if path.exists() and not path.is_file():
            raise BadInput(f"--out: {path} is a device or a pipe, expected a file to go on from")
        self.path, self.settings = path, settings
        self.done: set[Key] = set()
        self.wrong: set[Key] = set()
        self.file = self._open()
        try:
            kept, whole = self._read()
            if self.wrong and retry:
                self.done -= self.wrong
                self.wrong.clear()
                replace_file(path, b"".join(kept))
                self.file.close()
                self.file = self._open()
            else:
                self.file.truncate(whole)
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add lines, but none for a video and prompt that has one.

        Raises:
            BadInput: there is another file by the name now, and nobody would find these lines.
            OSError: the disk is full, for example.
        """
        if not self._is_there():
            raise BadInput(
                f"--out: {self.path} was removed or replaced while answers were written to it, as "
                "an editor does that saves it; the same command goes on from what is there"
            )
        for row in rows:
            key = row["video"], row["prompt"]
            if key not in self.done:
                text = json.dumps({**row, "settings": self.settings}, ensure_ascii=False)
                # A path that is no UTF-8 has lone surrogates; so replaced they are JSON's own.
                line = text.encode(errors="backslashreplace") + b"\n"
                if self.file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.done.add(key)
                if "error" in row:
                    self.wrong.add(key)
        os.fsync(self.file.fileno())

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False

    def _open(self) -> Any:
        try:
            file = open(self.path, "ab+", buffering=0)
        except OSError as error:
            raise BadInput(f"--out: {self.path}: {error.strerror}") from error
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                raise BadInput(f"--out: {self.path} is being written by another run") from None
        return file

    def _read(self) -> tuple[list[bytes], int]:
        """The lines with an answer, and how many bytes all whole lines are."""
        kept, whole = [], 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n") and not line.strip():  # left by an editor
                    whole += len(line)
                    continue
                if not line.endswith(b"\n"):
                    if line[: len(_BEGINNING)] != _BEGINNING[: len(line)]:
                        raise self._foreign(number)
                    break
                row = self._row(line, number)
                whole += len(line)
                self.done.add((row["video"], row["prompt"]))
                if "error" in row:
                    self.wrong.add((row["video"], row["prompt"]))
                else:
                    kept.append(line)
        return kept, whole

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
            row["video"], row["prompt"]
            settings = dict(row["settings"])
        except (ValueError, TypeError, KeyError):
            raise self._foreign(number) from None
        names = [*self.settings, *(name for name in settings if name not in self.settings)]
        other = [name for name in names if settings.get(name) != self.settings.get(name)]
        if other:
            told = ", ".join(
                f"--{name.replace('_', '-')} {settings.get(name)}, now {self.settings.get(name)}"
                for name in other
            )
            raise BadInput(
                f"--out: {self.path} has answers by other settings: {told}; give these again, or "
                "a new file"
            )
        return row

    def _foreign(self, number: int) -> BadInput:
        return BadInput(
            f"--out: {self.path}, line {number}, is no line of std-decode batch; give a new file"
        )
