"""Code shared by the plug-ins: the width of each layer, parameters that load a checkpoint's buffers, layers that run.

A serving runtime makes its own model and asks a plug-in for the weights of each layer. Here the parameters are flat
canonical buffers, filled by name; after loading they become gemq's own modules on the device's kernels.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemq import format as fmt
from gemq.errors import CheckpointError
from gemq.format import UNQUANTIZED
from gemq.nn import LowBitExperts, LowBitLinear
from gemq.nn.experts import PROJECTIONS, stored_name
from gemq.ops import dequantize
from gemq.packed_config import PackedConfig
from gemq.serving.splits import Matrix, Rank, ServingError, check_columns, own_rows

_PLACE = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa")
_ATTENTION = ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", *_LATENT)
_MLP = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_PACKED_ENDINGS = ("_proj", "_proj_with_mqa")
_MERGED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
_SHARDS: dict[str | int, int] = {"q": 0, "k": 1, "v": 2}


def check_ends(config: PackedConfig) -> None:
    """Raise :class:`ServingError` for a checkpoint whose head or embedding is packed."""
    widths = config.widths
    if min(widths.head, widths.embedding) < UNQUANTIZED:
        raise ServingError(
            f"a head of {widths.head} bits and an embedding of {widths.embedding} are not served; quantize with "
            f"--head-bits 16 --embedding-bits 16, or run the checkpoint with gemq generate"
        )


def read_dense(prefix: str) -> bool:
    """Return True if a runtime reads the numbers of the linear ``prefix`` itself.

    Both absorb latent attention's ``kv_b_proj`` into queries and outputs when they decode, from a dense ``weight``.
    """
    return prefix.rpartition(".")[2] == "kv_b_proj"


def width_of(config: PackedConfig, prefix: str) -> int:
    """The width of the linear that a runtime calls ``prefix``; 16 for one that is not quantized.

    Raises :class:`ServingError` for attention whose linears the plug-ins do not know, and for matrices that the runtime
    merges but the checkpoint gives different widths.
    """
    place = _PLACE.search(prefix)
    if place is None:
        return UNQUANTIZED
    layer, path = int(place[1]), place[2].split(".")
    common = _width_by_kind(config, prefix, layer, path)
    *above, leaf = path
    names = [".".join(["model.layers", str(layer), *above, part]) for part in _MERGED.get(leaf, (leaf,))]
    found = {name: config.widths.linears.get(name, common) for name in names}
    if len(set(found.values())) > 1:
        raise ServingError(f"{prefix} merges matrices of different widths ({found}), which is not served")
    return found[names[0]]


def _width_by_kind(config: PackedConfig, prefix: str, layer: int, path: list[str]) -> int:
    """Width that the configuration gives to the linear's kind: attention, shared expert, dense MLP. Raises
    :class:`ServingError` for a kind of attention that is not served from packed weights."""
    known = path[0] == "self_attn" and (path[-1] in _ATTENTION or not path[-1].endswith(_PACKED_ENDINGS))
    if path[0] in ("self_attn", "linear_attn") and not known:
        own = any(name.startswith(f"model.layers.{layer}.{path[0]}.") for name in config.widths.linears)
        if config.widths.attention == UNQUANTIZED and not own:
            return UNQUANTIZED
        raise ServingError(
            f"{prefix}: this kind of attention is not served from packed weights; quantize with --attention-bits 16"
        )
    if path[0] == "self_attn" and len(path) == 2 and path[1] in _ATTENTION:
        return config.widths.attention
    if len(path) == 3 and path[1] in ("shared_expert", "shared_experts") and path[2] in _MLP:
        return config.widths.shared.get(layer, UNQUANTIZED)
    if len(path) == 2 and path[0] == "mlp" and path[1] in _MLP and layer not in config.widths.experts:
        return config.widths.dense
    return UNQUANTIZED


def expert_widths(config: PackedConfig, prefix: str) -> dict[str, list[int]]:
    """The widths of all experts of the layer that a runtime calls ``prefix``, by projection.

    Raises :class:`ServingError` if it has none.
    """
    place = _PLACE.search(prefix)
    if place is None or int(place[1]) not in config.widths.experts:
        raise ServingError(f"quantization_config.expert_bits names no widths for {prefix}")
    return dict(zip(PROJECTIONS, config.widths.of_experts(int(place[1])), strict=True))


def _buffer(size: int, dtype: torch.dtype, loader: Callable[..., Any]) -> nn.Parameter:
    parameter: Any = nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad=False)
    parameter.weight_loader = loader
    return parameter


class LinearParts:
    """The packed buffers of one linear layer: of one matrix, or several with the same input (q, k and v; gate and up).

    Rows of the parts follow each other, so the canonical buffers of the parts do too. ``k`` and ``rows`` are those of
    this rank. The checkpoint's matrices have ``whole_k`` columns, and ``pieces`` times the rows; each is cut as it is
    loaded.
    """

    def __init__(
        self, prefix: str, k: int, rows: Sequence[int], bits: int, group_size: int, whole_k: int | None = None,
        pieces: int = 1, rank: Rank = Rank(),  # noqa: B008  (immutable)
    ):
        self.prefix, self.k, self.rows, self.bits = prefix, k, list(rows), bits
        self.whole_k, self.pieces, self.rank = whole_k or k, pieces, rank
        if self.whole_k != k:
            check_columns(prefix, self.whole_k, rank.size)
        self.preferred, self.group_size = group_size, fmt.default_group_size(k, group_size)
        self._missing = {(kind, part) for kind in ("codes", "meta") for part in range(len(self.rows))}
        # SGLang loads from several threads
        self._lock = threading.Lock()
        self.when_complete: Callable[[], None] | None = None

    def _sizes(self, kind: str) -> list[int]:
        return [Matrix(n, self.k, self.bits, self.preferred).elements(kind) for n in self.rows]

    def _cut(self, kind: str, loaded: Tensor, shard: str | int | None) -> Tensor:
        """This rank's rows or columns of one of the checkpoint's matrices."""
        if (self.pieces == 1 and self.whole_k == self.k) or self.bits == 0:
            return loaded
        part: Any = _SHARDS.get(shard, shard) if shard is not None else 0
        if (shard is None and len(self.rows) > 1) or part not in range(len(self.rows)):
            raise ServingError(f"{self.prefix}.weight_{kind} was loaded without saying which of its parts it is")
        stored, over = divmod(loaded.numel(), Matrix(1, self.whole_k, self.bits, self.preferred).elements(kind))
        if over or loaded.dim() != 1:
            return loaded  # of another shape, which the check that follows names
        whole = Matrix(stored, self.whole_k, self.bits, self.preferred)
        rows = slice(0, stored)
        if self.pieces > 1:
            rows = own_rows(self.prefix, stored, self.rows[part], self.rank, shard in ("k", "v"))
        start = self.rank.index * self.k if self.whole_k != self.k else 0
        return whole.cut(kind, loaded, [rows], slice(start, start + self.k))

    def parameters(self) -> dict[str, nn.Parameter]:
        """``weight_codes`` uint8 and ``weight_meta`` float16, flat, with loaders that take a part at a time."""
        return {
            f"weight_{kind}": _buffer(sum(self._sizes(kind)), dtype, partial(self._load, kind))
            for kind, dtype in (("codes", torch.uint8), ("meta", torch.float16))
        }

    def _load(self, kind: str, param: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        sizes, loaded = self._sizes(kind), self._cut(kind, loaded, shard)
        parts: Sequence[int]
        if shard is None:
            if len(sizes) > 1 and loaded.numel() != sum(sizes):
                raise ServingError(f"{self.prefix}.weight_{kind} was loaded without saying which of its parts it is")
            parts, start = range(len(sizes)), 0
        else:
            part: Any = _SHARDS.get(shard, shard)
            if part not in range(len(sizes)):
                raise ServingError(f"{self.prefix}.weight_{kind} has no part {shard!r}")
            parts, start = [part], sum(sizes[:part])
        expected = sum(sizes[part] for part in parts)
        _check_loaded(f"{self.prefix}.weight_{kind}", param, loaded, expected)
        param.data[start : start + expected].copy_(loaded)
        with self._lock:
            self._missing -= {(kind, part) for part in parts}
            if not self._missing and self.when_complete is not None:
                self.when_complete()

    def check_complete(self) -> None:
        """Raise :class:`CheckpointError` if a part was not loaded."""
        _check_complete(self.prefix, {f"weight_{kind} (part {part})" for kind, part in self._missing})

    def dense(self, codes: Tensor, meta: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers ``[sum of rows, k]`` of loaded buffers."""
        n = sum(self.rows)
        return dequantize(
            codes.view(n, -1), meta.view(n, self.k // self.group_size, 2), self.bits, self.k, self.group_size, dtype
        )

    def module(self, codes: Tensor, meta: Tensor) -> LowBitLinear:
        """The layer, ready for its device's kernels. Raises :class:`CheckpointError` if a part was not loaded."""
        self.check_complete()
        module = LowBitLinear(self.k, sum(self.rows), self.bits, self.preferred, device="meta")
        module.weight_codes, module.weight_meta = codes, meta
        module.prepare()
        return module.requires_grad_(False)


class ExpertParts:
    """The packed buffers of the experts of one layer that are kept on this rank.

    The checkpoint holds all experts of a layer in one buffer; its loader keeps the slices of ``kept``, in that order.
    Of each expert this rank has ``intermediate`` of ``rank.size`` times as many rows of gate and up, and columns of
    down.
    """

    def __init__(
        self, prefix: str, hidden: int, intermediate: int, bits: dict[str, list[int]], kept: Sequence[int],
        group_size: int, rank: Rank = Rank(),  # noqa: B008  (immutable)
    ):
        check_columns(f"{prefix}: down_proj", intermediate * rank.size, rank.size)
        self.prefix, self.hidden, self.intermediate, self.rank = prefix, hidden, intermediate, rank
        self.bits, self.kept, self.group_size = bits, list(kept), group_size
        self._missing = {(name, kind) for name in PROJECTIONS for kind in ("codes", "meta")}

    def _matrices(self, name: str, parts: int = 1) -> list[Matrix]:
        """Every expert of the layer, with ``parts`` times this rank's intermediate size."""
        inner = parts * self.intermediate
        n, k = (2 * inner, self.hidden) if name == "gate_up_proj" else (self.hidden, inner)
        return [Matrix(n, k, width, self.group_size) for width in self.bits[name]]

    def _cut(self, name: str, kind: str, whole: Matrix, stored: Tensor) -> Tensor:
        """This rank's part of one expert's buffer."""
        if self.rank.size == 1:
            return stored
        inner = self.intermediate
        own = slice(self.rank.index * inner, (self.rank.index + 1) * inner)
        if name == "down_proj":
            return whole.cut(kind, stored, [slice(0, self.hidden)], own)
        # gate first, then up
        up = self.rank.size * inner
        return whole.cut(kind, stored, [own, slice(up + own.start, up + own.stop)], slice(0, self.hidden))

    def parameter(self, name: str, kind: str) -> nn.Parameter:
        """The flat buffer of a projection's codes (uint8) or metadata (float16) for the experts that are kept."""
        sizes = [matrix.elements(kind) for matrix in self._matrices(name)]
        dtype = torch.uint8 if kind == "codes" else torch.float16
        return _buffer(sum(sizes[e] for e in self.kept), dtype, partial(self._load, name, kind))

    def _load(
        self, name: str, kind: str, param: nn.Parameter, loaded_weight: Tensor, *_: Any, **named: Any
    ) -> bool | None:
        whole = self._matrices(name, self.rank.size)
        sizes = [matrix.elements(kind) for matrix in whole]
        _check_loaded(f"{self.prefix}.{stored_name(name, kind)}", param, loaded_weight, sum(sizes))
        pieces = loaded_weight.split(sizes)
        at = 0
        for expert in self.kept:
            own = self._cut(name, kind, whole[expert], pieces[expert])
            param.data[at : at + own.numel()].copy_(own)
            at += own.numel()
        self._missing.discard((name, kind))
        return True if named.get("return_success") else None

    def module(self, buffers: dict[str, Tensor]) -> LowBitExperts:
        """The experts, ready for their device's kernels; ``buffers`` by ``gate_up_codes`` and so on."""
        _check_complete(self.prefix, {stored_name(name, kind) for name, kind in self._missing})
        bits, down = ([widths[e] for e in self.kept] for widths in self.bits.values())
        module = LowBitExperts(self.hidden, self.intermediate, bits, self.group_size, "meta", down)
        for name, buffer in buffers.items():
            setattr(module, name, buffer)
        module.prepare()
        return module


def _check_loaded(name: str, param: nn.Parameter, loaded: Tensor, expected: int) -> None:
    if loaded.dtype != param.dtype or loaded.dim() != 1 or loaded.numel() != expected:
        raise CheckpointError(
            f"{name} is {str(loaded.dtype).removeprefix('torch.')} {list(loaded.shape)}, expected "
            f"{str(param.dtype).removeprefix('torch.')} [{expected}]"
        )


def _check_complete(prefix: str, missing: set[str]) -> None:
    if missing:
        raise CheckpointError(f"{prefix}: the checkpoint's {', '.join(sorted(missing))} did not reach the layer")


def check_unsplit(prefix: str, given: Sequence[int], whole: Sequence[int]) -> None:
    """Refuse tensor parallelism: a layer of which this rank was to hold a part. ``given`` and ``whole`` are sizes."""
    if list(given) != list(whole):
        raise ServingError(
            f"{prefix}: tensor parallelism is not served ({list(given)} of {list(whole)} on this rank): packed rows "
            "are not split. Use one GPU, or expert parallelism with data-parallel attention"
        )


def local_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Global expert ids as ids of this rank's experts, -1 for those elsewhere, which contribute zero."""
    if expert_map is None:
        return topk_ids
    inside = (topk_ids >= 0) & (topk_ids < expert_map.numel())
    mapped = expert_map[topk_ids.clamp(0, expert_map.numel() - 1).long()]
    return torch.where(inside, mapped.to(topk_ids.dtype), -1)
