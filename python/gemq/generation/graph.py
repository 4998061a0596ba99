"""A whole step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class GraphedStep:
    """A function without arguments or result, captured once and replayed.

    ``state`` are the tensors that the function reads and moves on in place: warming up runs the function, so they are
    put back afterwards. ``generator`` is the random generator it draws from.
    """

    def __init__(self, function: Callable[[], None], state: list[Tensor], generator: torch.Generator | None):
        saved = [t.clone() for t in state]
        saved_generator = None if generator is None else generator.get_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # kernels compile and libraries allocate here, which a capture cannot hold
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)
        self.graph = torch.cuda.CUDAGraph()
        if generator is not None and saved_generator is not None:
            generator.set_state(saved_generator)
            self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            function()

    def __call__(self) -> None:
        self.graph.replay()
