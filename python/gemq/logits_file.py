"""Keep a reference's logits in a file, so that a model that does not fit beside it can be compared with it.

A safetensors file with ``windows`` int64 ``[N, T]`` and ``logits [N, P, V]`` in the dtype that the model gave, of the
positions that :func:`gemq.algorithms.divergence.counted` names. It takes ``N P V`` numbers: 100 windows of 512 tokens
of a vocabulary of 150,000 are 15 GB in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gemq import durable
from gemq.algorithms.divergence import Logits, counted, window_logits
from gemq.errors import CheckpointError
from gemq.integrity import read_header
from gemq.tensor_files import file_head


@torch.no_grad()
def save_logits(
    model: nn.Module, windows: Tensor, file: Path, batch_size: int = 4, second_half: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the logits of ``windows`` int64 ``[N, T]`` to ``file``, which appears when it is whole."""
    where = counted(windows.shape[1], second_half)
    part = file.with_name(f".{file.name}.part")
    try:
        with durable.explained(file), part.open("wb") as out:
            for start in range(0, len(windows), batch_size):
                logits = window_logits(model, windows[start : start + batch_size], where).cpu().contiguous()
                if not start:
                    whole = torch.empty(len(windows), *logits.shape[1:], dtype=logits.dtype, device="meta")
                    head, at = file_head({"windows": windows, "logits": whole})
                    out.write(head)
                    out.seek(at["windows"])
                    out.write(windows.contiguous().view(-1).view(torch.uint8).numpy().data)
                    out.seek(at["logits"])
                out.write(logits.view(-1).view(torch.uint8).numpy().data)
                if progress:
                    progress(min(start + batch_size, len(windows)), len(windows))
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def stored_logits(file: Path, windows: Tensor, second_half: bool = False) -> Logits:
    """Reader of a file of :func:`save_logits` that was made of the same ``windows`` and positions.

    Raises :class:`CheckpointError` for a file that is none, or of other windows.
    """
    header = read_header(file)
    if set(header) != {"windows", "logits"}:
        raise CheckpointError(
            f"{file} holds no logits of gemq eval --save-logits: its tensors are {sorted(header)[:4]}"
        )
    with safe_open(file, framework="pt") as handle:
        held = handle.get_tensor("windows")
    if held.shape != windows.shape or not torch.equal(held, windows):
        raise CheckpointError(
            f"{file} was made of other windows: {list(held.shape)} tokens there, {list(windows.shape)} here, or the "
            f"same sizes of another text or tokenizer"
        )
    where = counted(windows.shape[1], second_half)
    there, here = header["logits"].shape[1], len(range(windows.shape[1])[where])
    if there != here:
        raise CheckpointError(f"{file} holds {there} positions of a window, {here} are compared: give --second-half to "
                              "both or to none")

    def read(start: int, end: int) -> Tensor:
        with safe_open(file, framework="pt") as handle:
            return handle.get_slice("logits")[start:end]

    return read
