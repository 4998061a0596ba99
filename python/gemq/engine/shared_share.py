"""Find by how much less a layer's shared expert counts than its routed ones, from the gradients at their outputs.

Most families add the two outputs. Laguna multiplies the sum of the routed ones by a number first: the gradient at the
routed output, which Eq. 6 takes, is then so many times the one at the shared output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gemq.errors import UnsupportedModelError
from gemq.models import MoeLayer

if TYPE_CHECKING:
    from gemq.engine.layers import Trace

_SAME, _ROUNDED = 0.01, 0.02  # 16-bit gradients are rounded to 8 bits


class SharedShare:
    """Compare the gradients of each call of a block; the factor between them goes to ``trace.shared_share``."""

    def __init__(self, layer: MoeLayer, trace: Trace):
        # a gate between the shared expert and the block's output is known, and applied where costs are summed
        self.needed = layer.shared is not None and layer.shared_gate is None and not layer.latent
        self._path, self._trace = layer.path, trace
        self._found: dict[str, Tensor] = {}

    def called(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Watch one call of the shared expert: a forward hook."""
        if output.requires_grad:
            output.register_hook(lambda g: self.add("shared", g))

    def add(self, name: str, gradient: Tensor) -> None:
        """Take the gradient at the ``routed`` or ``shared`` output, and compare the two once both are there.

        Raises :class:`UnsupportedModelError` if they differ by more than one factor.
        """
        self._found[name] = gradient.detach().flatten(0, -2)
        if len(self._found) < 2:
            return
        routed, shared = self._found["routed"].float(), self._found["shared"].float()
        self._found.clear()
        share = float((routed * shared).sum() / routed.square().sum().clamp_min(1e-38))
        if float((shared - share * routed).norm()) > _ROUNDED * float(shared.norm()):
            raise UnsupportedModelError(
                f"{self._path} is not supported yet: its shared expert's output is not added to the routed experts'"
            )
        self._trace.shared_share = 1.0 if abs(share - 1) < _SAME else share
