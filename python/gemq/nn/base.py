"""What packed modules share: their buffers follow the device, never a change of dtype."""

from __future__ import annotations

import torch
from torch import nn

from gemq.ops import layout_for


class PackedModule(nn.Module):
    """Base of modules with packed buffers in ``self.layout``."""

    layout: str

    def packed_device(self) -> torch.device:
        """The device of the packed buffers."""
        return next(self.buffers(recurse=False)).device

    def prepare(self, layout: str | None = None) -> None:
        """Repack the buffers for their device's kernels, or to ``layout``."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        metadata = {n: b for n, b in self.named_buffers(recurse=False) if b.dtype == torch.float16}
        super()._apply(fn, recurse)
        for name, before in metadata.items():
            now = getattr(self, name)
            if now.dtype != before.dtype:
                # model.float() or .to(bfloat16) must not touch the format's float16 metadata
                setattr(self, name, before.to(now.device))
        device = self.packed_device()
        if self.layout != "canonical" and device.type != "meta" and layout_for(device) != self.layout:
            self.prepare()
        return self
