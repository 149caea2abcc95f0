"""``std-decode batch``: many videos, one question, a file of answers."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)  # fmt: skip

from std_decode.app.batch.answers import Answers
from std_decode.app.batch.videos import batches, estimate, find_videos
from std_decode.app.batch.worker import Job, Row, Settings, Worker, demo_tag
from std_decode.app.question import said_of_loading
from std_decode.errors import BadInput

SHOWN_ERRORS = 3


def batch(options: argparse.Namespace) -> int:
    """Run ``std-decode batch``. Returns 0 if each video has an answer, else 1."""
    job = _job(options)
    console = Console(stderr=True)
    videos = find_videos(options.videos)
    with Answers(options.out, asdict(job.settings), options.retry_errors) as answers:
        left = [video for video in videos if (video, job.prompt) not in answers.done]
        if len(left) < len(videos):
            console.print(f"[dim]{len(videos) - len(left)} of {len(videos)} done before[/dim]")
        with console.status("looking at the videos"):
            lengths = [estimate(video, job.settings.frames) for video in left]
        if left:
            _answer(job, batches(left, lengths, options.batch_size), answers, console, options)
        wrong = sum((video, job.prompt) in answers.wrong for video in videos)
    told = f"{len(videos) - wrong} of {len(videos)} videos have an answer: {options.out}"
    if wrong:
        told += f"; {wrong} an error (its line says which; --retry-errors asks again)"
    console.print(told, highlight=False, soft_wrap=True)
    return 1 if wrong else 0


def _job(options: argparse.Namespace) -> Job:
    """What is asked for, checked as far as it can be without loading a model."""
    own = options.model is not None
    if own and options.prompt is None:
        raise BadInput('--model needs a question: --prompt "What happens?"')
    if not own:
        for name in ("frames", "dtype", "device", "trust_remote_code"):
            if getattr(options, name):
                raise BadInput(
                    f"--{name.replace('_', '-')} is for a model of yours; give --model too"
                )
        demo_tag(options.prompt)
    if options.workers is not None and not options.ray:
        raise BadInput("--workers is for --ray; give --ray too, or drop it")
    if own:
        from std_decode.inputs import check_packages

        check_packages()
    if options.ray:
        from std_decode.app.batch.on_ray import check_ray

        check_ray()
    from std_decode.demo.camera import TAGS

    settings = Settings(
        model=options.model if own else "demo",
        frames=(options.frames or 32) if own else None,
        max_new_tokens=options.max_new_tokens or (128 if own else 5 * TAGS + 8),
        dtype=(options.dtype or "auto") if own else "float32",
    )
    patch = dict(top_k_keys=options.top_k_keys, draft_length=options.draft_length)
    return Job(
        options.prompt, settings, own, patch, options.device, bool(options.trust_remote_code)
    )


def _answer(
    job: Job,
    work: Sequence[Sequence[str]],
    answers: Answers,
    console: Console,
    options: argparse.Namespace,
) -> None:
    rows: Iterable[list[Row]]
    if options.ray:
        from std_decode.app.batch.on_ray import answer_on_ray

        rows = answer_on_ray(job, work, options.workers)
    else:
        with said_of_loading(job.settings.model, console) if job.own_model else nullcontext():
            worker = Worker(job)
        rows = answer_here(worker, work)
    with _progress(console) as progress:
        task = progress.add_task("answering", total=sum(map(len, work)))
        told = 0
        try:
            for some in rows:
                answers.append(some)
                progress.advance(task, len(some))
                told = _tell_errors(some, told, console)
        except OSError as error:
            raise BadInput(
                f"--out: {answers.path}: {error.strerror}; the same command goes on"
            ) from error


def _tell_errors(rows: Sequence[Row], told: int, console: Console) -> int:
    """Show the first errors as they come: all may be alike. Returns how many there were."""
    for row in rows:
        if "error" not in row:
            continue
        told += 1
        error = row["error"] if row["video"] in row["error"] else f"{row['video']}: {row['error']}"
        if told <= SHOWN_ERRORS:
            # A name that is no UTF-8 cannot be printed as it is.
            line = error.encode(errors="backslashreplace").decode()
            console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
        elif told == SHOWN_ERRORS + 1:
            console.print("[yellow]more errors are in the file[/yellow]")
    return told


def answer_here(worker: Worker, work: Sequence[Sequence[str]]) -> Iterator[list[Row]]:
    """Rows of each batch in turn; the videos of the next one are read meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(worker.read, work[0])
        try:
            for following in (*work[1:], None):
                read = ahead.result()
                if following is not None:
                    ahead = reader.submit(worker.read, following)
                yield worker.answer(read)
        except BaseException:  # Ctrl-C: whoever waits for the reader waits for one video, not all
            worker.stopped = True
            raise


def _progress(console: Console) -> Progress:
    columns: list[Any] = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(),
    ]  # fmt: skip
    # A batch may take minutes: the time left goes by the last hour, not by the last 30 s.
    return Progress(*columns, console=console, speed_estimate_period=3600)
