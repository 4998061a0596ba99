"""Base of packed modules: their buffers follow the device, never a change of dtype."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from gemq import format as fmt
from gemq.ops import checks, layout_for, pack, repack


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


class PackedMatrix(PackedModule):
    """Base of modules over one packed matrix, whose flat buffers are ``weight_codes`` uint8 and ``weight_meta``
    float16.

    The state dict always holds the canonical layout; :meth:`prepare` moves the buffers to that of the kernels.
    """

    weight_codes: Tensor
    weight_meta: Tensor

    @property
    def matrix(self) -> tuple[int, int, int, int]:
        """Bits, rows, columns and group size."""
        raise NotImplementedError

    def own_layout(self) -> str:
        """The layout to run in on the buffers' device."""
        return layout_for(self.weight_codes.device)

    def prepare(self, layout: str | None = None) -> None:
        """Repack the buffers for their device's kernels, or to ``layout``; in place, no second copy is kept."""
        layout = layout or self.own_layout()
        if layout != self.layout:
            self.weight_codes, self.weight_meta = self._converted(layout)
            self.layout = layout

    def _converted(self, layout: str) -> tuple[Tensor, Tensor]:
        return repack(self.weight_codes, self.weight_meta, *self.matrix, source=self.layout, target=layout)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "canonical":
            destination[prefix + "weight_codes"], destination[prefix + "weight_meta"] = self._converted("canonical")

    def _register(self, device: torch.device | str | None) -> None:
        """Make zeroed canonical buffers."""
        bits, n, k, group_size = self.matrix
        size, pairs = fmt.codes_bytes(n, k, bits), fmt.meta_elements(n, k, bits, group_size)
        self.layout = "canonical"
        self.register_buffer("weight_codes", torch.zeros(size, dtype=torch.uint8, device=device))
        self.register_buffer("weight_meta", torch.zeros(pairs, dtype=torch.float16, device=device))

    def _fill(self, codes: Tensor, meta: Tensor) -> None:
        """Take codes uint8 ``[rows, columns]`` and metadata. Raises ``TypeError`` or ``ValueError`` for metadata of
        another dtype or shape."""
        bits, n, k, group_size = self.matrix
        checks.metadata("meta", meta, n, k, group_size)
        self.weight_codes = pack(codes, bits).flatten()
        self.weight_meta = meta.contiguous().flatten()
