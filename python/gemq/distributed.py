"""Share one run among several processes: assign the parts, and exchange the results.

Started by ``torchrun``, over gloo on CPUs and NCCL on GPUs. Without it there is one process, rank 0 of 1, and every
function here gives back what it was given.

Results do not depend on the number of processes: batches are dealt out like cards, and :func:`exchange` hands each
round's tensors to everyone in the order of the batches, so whoever sums them sums in the order of a single process.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from gemq.errors import DistributedError, FailedElsewhereError, first_line
from gemq.launch import World as World
from gemq.launch import environment_number, launched
from gemq.launch import leave as leave
from gemq.launch import place_to_report as place_to_report
from gemq.launch import processes_here as processes_here

T = TypeVar("T")
# a process that is silent for longer counts as lost; rank 0 writes checkpoints while the others wait
PATIENCE = datetime.timedelta(minutes=60)
# True while rank 0 works inside on_first
_alone = False


def world() -> World:
    """This process's place; rank 0 of 1 where no job was started, and inside the work of :func:`on_first`."""
    if _alone:
        return World(0, 1)
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World(0, 1)


def own_device() -> str | None:
    """The GPU of this process where a job was launched on a machine with GPUs, else None."""
    if launched().size > 1 and torch.cuda.is_available():
        return f"cuda:{environment_number('LOCAL_RANK', 0, 0) % torch.cuda.device_count()}"
    return None


@contextmanager
def job(device: torch.device, patience: datetime.timedelta = PATIENCE) -> Iterator[World]:
    """Join the job that ``torchrun`` launched; without one, nothing happens.

    Raises :class:`gemq.errors.DistributedError` if the other processes cannot be reached.
    """
    if launched().size == 1:
        yield World(0, 1)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _reaching():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    yield world()
    # after an error the process ends, and with it its connections: the others notice
    dist.destroy_process_group()


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        place = launched()
        raise DistributedError(
            f"rank {place.rank} of {place.size} lost the other processes of this job: one of them ended or does not "
            f"answer; see its own message above or below ({first_line(error)[:200]})"
        ) from error


def share(count: int) -> range:
    """The contiguous part of ``range(count)`` that is this process's."""
    here = world()
    return range(count * here.rank // here.size, count * (here.rank + 1) // here.size)


def batches(windows: Tensor, size: int) -> list[Tensor]:
    """This process's batches of ``windows [N, T]``, ``size`` windows each: every R-th of R processes."""
    here = world()
    return [windows[at : at + size] for at in range(0, len(windows), size)][here.rank :: here.size]


def rounds(windows: Tensor, size: int) -> int:
    """Number of batches of the process that has the most. All processes exchange that many times."""
    return -(-len(windows) // (size * world().size))


def _send(tensor: Tensor, source: int) -> None:
    # as bytes: not every backend knows every dtype
    if tensor.numel():
        dist.broadcast(tensor.view(-1).view(torch.uint8), source)


def exchange(tensors: dict[str, Tensor] | None, device: torch.device) -> list[dict[str, Tensor]]:
    """The named tensors of every process that has some, in the order of ranks, on ``device``.

    All processes must call it equally often; one without tensors gives None. A tensor that stands under several
    names travels once.
    """
    here = world()
    if here.size == 1:
        return [] if tensors is None else [tensors]
    unique: dict[int, Tensor] = {}
    names: dict[str, int] = {}
    for name, tensor in (tensors or {}).items():
        unique.setdefault(id(tensor), tensor)
        names[name] = list(unique).index(id(tensor))
    mine = [t.detach().to(device).contiguous() for t in unique.values()]
    about = None if tensors is None else (names, [(tuple(t.shape), t.dtype) for t in mine])
    found = []
    for rank, told in enumerate(gather(about)):
        if told is None:
            continue
        labels, shapes = told
        held = mine if rank == here.rank else [torch.empty(s, dtype=d, device=device) for s, d in shapes]
        with _reaching():
            for tensor in held:
                _send(tensor, rank)
        found.append({name: held[index] for name, index in labels.items()})
    return found


def merged(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Merge the tensors of all processes, whose names differ."""
    return {name: tensor for part in exchange(tensors, device) for name, tensor in part.items()}


def gather(value: T) -> list[T]:
    """The values of all processes in the order of ranks; small ones, they are pickled."""
    here = world()
    if here.size == 1:
        return [value]
    found: list[Any] = [None] * here.size
    with _reaching():
        dist.all_gather_object(found, value)
    return found


def on_first(work: Callable[[], T]) -> T:
    """Run ``work()`` on rank 0 alone and return its result on every rank. During the call rank 0 acts as a job of one
    process. An error of ``work()`` is raised on all ranks."""
    global _alone
    here = world()
    if here.size == 1:
        return work()
    outcome: list[Any] = [None, None]
    caught = None
    if here.first:
        _alone = True
        try:
            outcome[0] = work()
        except Exception as error:
            caught = error
            outcome[1] = f"{type(error).__name__}: {error}"
        finally:
            _alone = False
    with _reaching():
        dist.broadcast_object_list(outcome, 0)
    if caught is not None:
        raise caught
    if outcome[1] is not None:
        raise FailedElsewhereError(f"rank 0 failed, and with it the job: {outcome[1]}")
    return outcome[0]
