"""One model over several processes, one GPU each: tensor parallelism by transformers' own plan.

    torchrun --nproc-per-node 4 -m std_decode generate --tp ...

starts four processes that all run the same command. Each holds a share of every layer's heads and
of its MLP; they add up what their shares come to, and all choose the same tokens. In a script of
your own, started by torchrun in the same way, `patch` and `generate` stay as they are:

    def ask(place):
        model = load_model("Qwen/Qwen2-VL-72B-Instruct", place, dtype="bfloat16")
        std_decode.patch(model)
        output = model.generate(**inputs.to(model.device))  # inputs: of the processor, as ever
        if place.first:
            print(std_decode.last_stats(model))
        return 0

    sys.exit(run(ask))
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from std_decode.errors import BadInput, drop_output
from std_decode.inputs import InputError, auto_class, one_line
from std_decode.inputs import load_model as load_whole

_START = "start it as: torchrun --nproc-per-node GPUS -m std_decode generate --tp ..."
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = 600.0  # seconds
SILENCE = 10.0  # seconds of waiting before it is said


@dataclass(frozen=True)
class Place:
    """Which of the processes this is.

    Attributes:
        rank: among all, 0 to size - 1; the first one prints.
        local_rank: among those of this machine, and so the number of its GPU.
        size: how many share the model.
    """

    rank: int
    local_rank: int
    size: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> str:
        import torch

        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"


def find_place() -> Place:
    """This process's place, as torchrun tells it by environment variables.

    Raises:
        InputError: torchrun (or a like program) has not started it, or there are fewer GPUs.
    """
    import torch

    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise InputError(f"--tp needs processes to share the model, but {missing[0]} is not set: "
                         f"torchrun sets it; {_START}")  # fmt: skip
    try:
        rank, local_rank, size = (int(os.environ[name]) for name in _VARIABLES[:3])
    except ValueError as error:
        raise InputError(f"--tp: RANK, LOCAL_RANK and WORLD_SIZE: {error}; {_START}") from None
    gpus = torch.cuda.device_count()
    if gpus and local_rank >= gpus:
        raise InputError(
            f"--tp: there are {gpus} GPUs and a process for GPU {local_rank}; give torchrun "
            f"--nproc-per-node {gpus} or less"
        )
    return Place(rank, local_rank, size)


def run(command: Callable[[Place], int], patience: float = PATIENCE) -> int:
    """Join the other processes, run `command` as they do, and part from them.

    A process that another one no longer answers ends with an error and exit status 1; so does the
    whole group then, process by process, torchrun or not.

    Args:
        command: gets this process's place and returns the exit status.
        patience: seconds to wait for the others in any one step, loading included.

    Returns:
        The exit status. Does not return if the command fails: nobody is left to part from.

    Raises:
        InputError: see `find_place`.
    """
    import torch
    import torch.distributed as dist

    place = find_place()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(place.local_rank)
    waiting = threading.Timer(SILENCE, _tell_waiting, (place, patience))
    waiting.daemon = True
    try:
        waiting.start()
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=timedelta(seconds=patience),
            device_id=torch.device(place.device) if cuda else None,
        )
        waiting.cancel()
        status = command(place)
        dist.barrier()
    except BaseException as error:
        # To tear down, or just to let Python end, could wait for processes that are gone or stuck.
        _quit(_tell(error, place))
    dist.destroy_process_group()
    return status


def _tell_waiting(place: Place, patience: float) -> None:
    print(
        f"std-decode, process {place.rank} of {place.size}: waiting for the others, "
        f"for at most {patience:g} s",
        file=sys.stderr,
    )


def _tell(error: BaseException, place: Place) -> int:
    """Say what went wrong; returns the exit status."""
    import torch.distributed as dist

    where = f"std-decode, process {place.rank} of {place.size}"
    if isinstance(error, (BadInput, InputError)):
        if place.first or place.local_rank == 0:  # all find the same
            print(f"std-decode: {error}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print(f"{where}: interrupted", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):  # nobody reads the answer any more
        drop_output()
        return 1
    first = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, dist.DistError) or "gloo" in first or "NCCL" in first:
        print(f"{where}: another process has died or does not answer: {first}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def _quit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def load_model(
    name: str, place: Place, *, dtype: str = "auto", trust_remote_code: bool = False
) -> Any:
    """This process's share of the model of a folder or hub id, ready to generate.

    Args:
        dtype: "auto" (as it was saved), "float32", "bfloat16", "float16".

    Raises:
        InputError: there is none that generates text, transformers has no plan to share it, or
            its KV heads cannot be shared by so many.
    """
    from transformers import AutoConfig
    from transformers.distributed import DistributedConfig

    loading: dict[str, Any] = dict(dtype=dtype, trust_remote_code=trust_remote_code)
    if place.size == 1:
        return load_whole(name, device=place.device, **loading)
    with one_line(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    _check_plan(name, config.get_text_config(decoder=True), place.size)
    with one_line(name):
        model = auto_class(config).from_pretrained(
            name, distributed_config=DistributedConfig(tp_plan="auto"), **loading
        )
    return model.eval()


def _check_plan(name: str, text: Any, size: int) -> None:
    if not getattr(text, "base_model_tp_plan", None):
        raise InputError(
            f"{name}: transformers has no tensor-parallel plan for {text.model_type}; share its "
            'layers instead: from_pretrained(..., device_map="auto")'
        )
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if heads % size:
        fit = [count for count in range(2, heads + 1) if heads % count == 0]
        raise InputError(
            f"{name}: its {heads} KV heads cannot be shared by {size} processes alike; give "
            f"torchrun --nproc-per-node {' or '.join(map(str, fit)) if fit else 1}"
        )
