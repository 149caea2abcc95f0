"""A plugin of pytest that notes each test as it ends, and leaves out those noted as passed.

A test run that is cut off says nothing of what failed before, and would begin anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench.records import line_of, read

JOURNAL = "STD_TEST_JOURNAL"  # the file, in the environment
MOST = 6000  # characters of a traceback that are kept: its end
_notes = True  # of the processes of pytest-xdist only the one that the others report to


def tests_of(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last record of each test."""
    return {record["test"]: record for record in records if record.get("kind") == "test"}


def pytest_configure(config: Any) -> None:
    global _notes
    _notes = not hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    path = Path(os.environ[JOURNAL])
    known = tests_of(read(path)) if path.exists() else {}
    done = [item for item in items if known.get(item.nodeid, {}).get("status") == "passed"]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item not in done]


def pytest_runtest_logreport(report: Any) -> None:
    if _notes and (report.when == "call" or not report.passed):
        _note(report.nodeid, report.outcome, report)


def pytest_collectreport(report: Any) -> None:
    if _notes and report.failed:
        _note(report.nodeid, "failed", report)


def _note(name: str, status: str, report: Any) -> None:
    text = report.longreprtext
    record = {
        "kind": "test",
        "test": name,
        "status": status,
        "seconds": round(getattr(report, "duration", 0.0), 2),
        "text": text[-MOST:],
        "properties": dict(getattr(report, "user_properties", ())),
    }
    with open(os.environ[JOURNAL], "a", encoding="utf-8") as file:
        file.write(line_of(record))
    if status == "failed":
        # At once: pytest tells it at the end, which may not come.
        print(f"\n{name} failed:\n{text}\n", flush=True)
