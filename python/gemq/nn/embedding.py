"""An embedding over one packed matrix, and the head of a model whose embedding and head are one matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemq import format as fmt
from gemq.nn.base import PackedMatrix
from gemq.nn.linear import LowBitLinear
from gemq.ops import backends, checks
from gemq.ops.rows import cpu_rows, dequantized_rows


class LowBitEmbedding(PackedMatrix):
    """Rows of a matrix ``[num_embeddings, embedding_dim]`` packed at ``bits``, 4 to 8, times ``scale``.

    On every device the canonical layout is the one to run in: its rows lie together. With ``tied``, a
    :class:`TiedHead` multiplies by the same buffers, and they are in the layout of its kernels.

    Rows come out in ``dtype``, which ``model.to(torch.bfloat16)`` changes as it does that of parameters.
    ``padding_idx`` is kept for those who ask for it; it names a row like any other.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, bits: int, group_size: int = 128,
        padding_idx: int | None = None, scale: float = 1.0, tied: bool = False, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if bits not in fmt.END_BITS:
            raise ValueError(f"bits of an embedding must be in {fmt.END_BITS[0]}..{fmt.END_BITS[-1]}, got {bits!r}")
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        self.group_size = fmt.default_group_size(embedding_dim, group_size)
        self.padding_idx, self.scale, self.tied = padding_idx, scale, tied
        self.dtype = dtype or torch.get_default_dtype()
        self._register(device)

    @classmethod
    def from_codes(
        cls, codes: Tensor, meta: Tensor, bits: int, group_size: int, padding_idx: int | None = None,
        scale: float = 1.0, tied: bool = False, dtype: torch.dtype | None = None,
    ) -> LowBitEmbedding:
        """Build an embedding from uint8 codes ``[rows, columns]`` and float16 metadata ``[rows, columns // group_size,
        2]``.

        Raises ``TypeError`` or ``ValueError`` for metadata of another dtype or shape.
        """
        n, k = codes.shape
        module = cls(n, k, bits, group_size, padding_idx, scale, tied, dtype, codes.device)
        module._fill(codes, meta)
        return module

    @property
    def matrix(self) -> tuple[int, int, int, int]:
        """Bits, rows, columns and group size."""
        return self.bits, self.num_embeddings, self.embedding_dim, self.group_size

    def own_layout(self) -> str:
        """The head's, where it reads the same buffers."""
        return super().own_layout() if self.tied else "canonical"

    def _apply(self, fn, recurse=True):
        # what a change of the model's dtype does to a number
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    @property
    def weight(self) -> Tensor:
        """No weights ``[0, embedding_dim]``, of the dtype and on the device of what comes out: models ask for these."""
        return torch.empty(0, self.embedding_dim, dtype=self.dtype, device=self.weight_codes.device)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized weights ``[num_embeddings, embedding_dim]``, without the scale."""
        return backends.dense_weight(self.weight_codes, self.weight_meta, *self.matrix, self.layout, dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Rows ``[..., embedding_dim]`` in ``dtype`` of int64 or int32 ``input_ids [...]``.

        Raises ``IndexError`` on a CPU for a number outside the table; on CUDA it is the caller's to keep inside.
        """
        ids = input_ids.reshape(-1).long()
        bits, n, k, group_size = self.matrix
        if ids.is_cpu and self.layout != "gpu_tile" and checks.unwatched(self.weight_meta):
            self._check(ids)
            rows = cpu_rows(self.weight_codes, self.weight_meta, ids, bits, n, k, group_size, self.layout)
            rows = rows.to(self.dtype)
        else:
            rows = dequantized_rows(
                self.weight_codes, self.weight_meta, ids, bits, k, group_size, self.layout, self.dtype
            )
        if self.scale != 1.0:
            # the scale in the rows' dtype, as transformers' scaled embeddings multiply
            rows = rows * torch.tensor(self.scale).to(self.dtype)
        return rows.view(*input_ids.shape, k)

    def _check(self, ids: Tensor) -> None:
        low, high = (int(bound) for bound in ids.aminmax()) if ids.numel() else (0, 0)
        if low < 0 or high >= self.num_embeddings:
            raise IndexError(f"input_ids must be in 0..{self.num_embeddings - 1}, got {low}..{high}")

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group_size={self.group_size}, " \
               f"layout={self.layout}"


class TiedHead(LowBitLinear):
    """``x @ W.T (+ bias)`` with the packed matrix of ``embedding``, which alone stores and moves it."""

    def __init__(
        self, embedding: LowBitEmbedding, bias: bool = False, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)
        # in a tuple: as a submodule its buffers would be stored twice
        self._tied = (embedding,)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bits, self.group_size = embedding.bits, embedding.group_size
        self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device)) if bias else None

    @property
    def layout(self) -> str:  # type: ignore[override]
        """The embedding's."""
        return self._tied[0].layout

    @property
    def weight_codes(self) -> Tensor:  # type: ignore[override]
        """The embedding's."""
        return self._tied[0].weight_codes

    @property
    def weight_meta(self) -> Tensor:  # type: ignore[override]
        """The embedding's."""
        return self._tied[0].weight_meta

    def packed_device(self) -> torch.device:
        """The device of the embedding."""
        return self._tied[0].packed_device()

    def prepare(self, layout: str | None = None) -> None:
        """Repack the embedding, for both."""
        self._tied[0].prepare(layout)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
