"""The batches of ``std-decode batch`` on Ray Data: workers on many GPUs and machines."""

from __future__ import annotations

import json
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from std_decode.app.batch.worker import Job, Row, Worker
from std_decode.errors import BadInput
from std_decode.inputs import InputError

OBJECTS = 128 * 2**20  # bytes for paths and answers: nothing else goes between processes
RETRIES = 2  # of a batch whose worker died; then each of its videos by itself


def check_ray() -> None:
    """Raise BadInput where Ray Data cannot be imported."""
    # It would report to its makers how it is used.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise BadInput(
            f'--ray needs Ray Data ({error}): pip install "sparse-to-dense[ray]"'
        ) from None


class _OnRay:
    """A worker in a process of its own.

    Paths and rows go as JSON: of dictionaries Ray Data would make columns. Two calls run at a
    time, so that the videos of one batch are read while another is answered.
    """

    def __init__(self, job: Job):
        self.reading, self.answering = threading.Lock(), threading.Lock()
        self.refused: str | None = None
        try:
            self.worker = Worker(job)
        except (BadInput, InputError) as error:  # raised here, it would be tried again
            self.refused = str(error)

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        if self.refused is not None:
            return {"row": [json.dumps({"refused": self.refused})]}
        rows: list[Row] = []
        for videos in block["videos"]:
            with self.reading:
                read = self.worker.read(json.loads(videos))
            with self.answering:
                rows += self.worker.answer(read)
        return {"row": [json.dumps(row) for row in rows]}


def answer_on_ray(
    job: Job, work: Sequence[Sequence[str]], workers: int | None
) -> Iterator[list[Row]]:
    """Rows of the batches as they come, in any order.

    Where a batch has taken down `RETRIES` + 1 workers, its videos are asked one by one, and those
    that do so too get an error.

    Raises:
        BadInput: the workers cannot load the model, or Ray gives up.
    """
    import ray

    begun = _join(workers)
    try:
        workers = workers or max(1, int(ray.cluster_resources().get("GPU", 0)))
        left = {video for videos in work for video in videos}
        for some in (work, [[video] for videos in work for video in videos]):
            some = [videos for videos in some if left.issuperset(videos)]
            for rows in _answer(job, some, workers):
                left -= {row["video"] for row in rows}
                yield rows
        for video in left:
            error = f"the worker that was to answer it died, each of {RETRIES + 1} times"
            yield [{"video": video, "prompt": job.prompt, "error": error}]
    except ray.exceptions.RayError as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadInput(f"--ray: {line}; the same command goes on") from error
    finally:
        if begun:
            ray.shutdown()


def _join(workers: int | None) -> bool:
    """Connect to the cluster that RAY_ADDRESS names, or else begin one here.

    Returns:
        Whether it is to be left again: not where this process was in one already.
    """
    import ray

    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = dict(log_to_driver=False, logging_level=logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, **quiet)
            return True
    except (ConnectionError, ValueError) as error:
        raise BadInput(f"--ray: RAY_ADDRESS is {address}, but no cluster is there") from error
    cpus = max(os.cpu_count() or 1, workers or 1)
    ray.init("local", num_cpus=cpus, object_store_memory=OBJECTS, include_dashboard=False, **quiet)
    return True


def _answer(job: Job, work: Sequence[Sequence[str]], workers: int) -> Iterator[list[Row]]:
    import ray.data

    if not work:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # what is missing in the end is asked again
    size = min(workers, len(work))
    pool = ray.data.ActorPoolStrategy(
        size=size,
        max_tasks_in_flight_per_actor=2,
        max_concurrent_calls_per_actor=2,
        enable_true_multi_threading=True,
    )
    items = [{"videos": json.dumps(list(videos))} for videos in work]
    with warnings.catch_warnings():
        # The one way to say it in the versions of Ray that pyproject allows goes in 2.64.
        warnings.simplefilter("ignore", DeprecationWarning)
        blocks = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _OnRay,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=pool,
            num_cpus=1,
            num_gpus=1 if ray.cluster_resources().get("GPU", 0) >= size else 0,
            max_task_retries=RETRIES,
        )
    for block in blocks.iter_batches(batch_size=None, prefetch_batches=0):
        rows = [json.loads(row) for row in block["row"]]
        refused = [row["refused"] for row in rows if "refused" in row]
        if refused:
            raise BadInput(refused[0])
        yield rows
