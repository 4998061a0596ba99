"""Base of packed modules: their buffers follow the device, never a change of dtype."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from gemq.ops import layout_for


def profiled(name: str):
    """A record of torch's profiler where it runs, so that kernels called without the dispatcher show up in it."""
    return torch.profiler.record_function(name) if torch.autograd._profiler_enabled() else _NO_RECORD


_NO_RECORD = nullcontext()


class PackedModule(nn.Module):
    """Base of modules with packed buffers in ``self.layout``."""

    layout: str

    def packed_device(self) -> torch.device:
        """The device of the packed buffers."""
        return next(self.buffers(recurse=False)).device

    def prepare(self, layout: str | None = None) -> None:
        """Repack the buffers for their device's kernels, or to ``layout``."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict, prefix, *args):
        layout, device = self.layout, self.packed_device()
        if layout == "canonical":
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        # the state dict is canonical; a tile layout can have the same size, so it would be taken silently
        self.prepare("canonical")
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.prepare(layout if self.packed_device() == device else None)

    def _apply(self, fn, recurse=True):
        before_move = self.packed_device()
        metadata = {n: b for n, b in self.named_buffers(recurse=False) if b.dtype == torch.float16}
        super()._apply(fn, recurse)
        for name, before in metadata.items():
            now = getattr(self, name)
            if now.dtype != before.dtype:
                # model.float() or .to(bfloat16) must not touch the format's float16 metadata
                setattr(self, name, before.to(now.device))
        device = self.packed_device()
        moved = device.type not in ("meta", before_move.type)
        if moved and self.layout != "canonical" and layout_for(device) != self.layout:
            self.prepare()
        return self
