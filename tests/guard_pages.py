"""Memory that ends, or begins, at a page which may not be touched: an access one byte outside ends the process."""

from __future__ import annotations

import ctypes
import mmap

PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_KEPT: list[mmap.mmap] = []


def protected(size: int, *, at_end: bool) -> int:
    """The address of ``size`` bytes between two forbidden pages: right before the second one, or right behind the
    first. Stays until the process ends."""
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    _KEPT.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + (pages + 1) * PAGE):
        if _LIBC.mprotect(page, PAGE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    return start + PAGE + (pages * PAGE - size if at_end else 0)


def placed(tensor, *, at_end: bool):
    """A copy of a tensor in protected memory."""
    import torch

    if tensor.numel() == 0:
        return tensor.clone()
    where = (ctypes.c_uint8 * tensor.nbytes).from_address(protected(tensor.nbytes, at_end=at_end))
    copy = torch.frombuffer(where, dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
