"""Import a GPTQ checkpoint of a supported Mixture-of-Experts model as a checkpoint of gemq: the same codes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gemq.checkpoint import check_output
from gemq.errors import CheckpointError
from gemq.folders import COMPANIONS, LEGAL, local_folder
from gemq.format import UNQUANTIZED, default_group_size
from gemq.hf import check_files
from gemq.integrity import read_json, weight_files, write_manifest
from gemq.interchange.gptq_tensors import PARTS, GptqShape, checkpoint_format, common_group_size, convert, shape_of
from gemq.interchange.reading import TensorReader, copy_companions, disk_name, disk_names, meta_model
from gemq.models import MoeModel, describe, replace_with_packed
from gemq.nn.experts import PROJECTIONS, stored_name
from gemq.packed_config import PackedConfig
from gemq.packed_model import packed_skeleton
from gemq.shards import ShardWriter
from gemq.staging import new_folder
from gemq.widths import Widths

# names on disk of the three linears of an expert
_ROLES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_EXPERT = re.compile(r"\.experts\.(\d+)\.(\w+)\.weight$")
# buffers that old checkpoints hold and models compute
_COMPUTED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Imported:
    """Result of :func:`import_gptq`. ``wrapped`` counts zero points stored as -1, which AutoGPTQ reads as 0;
    ``left_out`` are files of the source that were not copied."""

    path: Path
    config: PackedConfig
    bytes: int
    wrapped: int
    left_out: list[str] = field(default_factory=list)


@dataclass
class _GptqFiles:
    """The checkpoint that is read: its tensors, and which of them were used."""

    reader: TensorReader
    form: str
    used: set[str] = field(default_factory=set)
    wrapped: int = 0

    def shape(self, stem: str, n: int, k: int) -> GptqShape | None:
        """None for a linear that is stored in 16 bits."""
        names = {part: f"{stem}.{part}" for part in PARTS if f"{stem}.{part}" in self.reader.handles}
        if not names and f"{stem}.weight" in self.reader.handles:
            return None
        return shape_of(stem, {part: self.reader.shape(name) for part, name in names.items()}, n, k)

    def converted(self, stem: str, shape: GptqShape, group_size: int) -> tuple[Tensor, Tensor]:
        names = {part: f"{stem}.{part}" for part in PARTS if f"{stem}.{part}" in self.reader.handles}
        self.used |= set(names.values())
        parts = {part: self.reader.take(name) for part, name in names.items()}
        codes, meta, wrapped = convert(stem, parts, shape, group_size, self.form)
        self.wrapped += wrapped
        return codes, meta

    def plain(self, name: str) -> Tensor:
        self.used.add(name)
        return self.reader.take(name)


@dataclass(frozen=True)
class _Layout:
    """Names of all quantized linears: stems of the experts' linears by layer, expert and role, and of plain linears."""

    experts: dict[int, list[dict[str, str]]]
    expert_shapes: dict[int, list[dict[str, GptqShape]]]
    linears: dict[str, tuple[str, GptqShape | None]]


def import_gptq(
    source: str | os.PathLike, target: str | os.PathLike, *, shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Write the GPTQ checkpoint ``source`` (AutoGPTQ's or GPTQModel's format) as a gemq checkpoint ``target``.

    Experts have 2, 3, 4 or 8 bits each (uniform, or by GPTQModel's ``dynamic``), attention and dense MLPs one width or
    none. Codes and scales are kept; the offset of a group, ``-scale * zero``, is rounded once to float16
    (:mod:`gemq.interchange.gptq_tensors`). ``progress(done, total)`` counts decoder layers.

    Raises :class:`CheckpointError`, or :class:`gemq.errors.UnsupportedModelError` for another architecture, before
    anything is written where the headers show what is wrong.
    """
    source = local_folder(source, (*COMPANIONS, *LEGAL, "*.safetensors", "*.json"))
    out = check_output(target, source)
    files = weight_files(source)
    form = checkpoint_format(_quantization(source))
    model, config = meta_model(source)
    moe = describe(model)
    with ExitStack() as stack:
        read = _GptqFiles(TensorReader(files, stack), form)
        layout = _locate(moe, read)
        packed = _packed_config(moe, layout)
        replace_with_packed(model, packed_skeleton(moe, packed.widths, packed.group_size, "meta"))
        with new_folder(out) as folder:
            writer = ShardWriter(folder, shard_bytes)
            _write_experts(moe, model, layout, read, packed, writer, progress)
            _write_linears(model, layout, read, packed, writer)
            _write_rest(model, layout, read, writer)
            written = writer.finish()
            check_files(model, written)
            left_out = copy_companions(source, folder)
            config.quantization_config = packed.to_dict()
            text = config.to_json_string().encode()
            write_manifest(folder, {"config.json": text})
            (folder / "config.json").write_bytes(text)
    return Imported(out, packed, writer.total, read.wrapped, left_out)


def _quantization(folder: Path) -> dict:
    """The ``quantization_config`` of ``config.json``, or AutoGPTQ's file of its own."""
    found = read_json(folder / "config.json").get("quantization_config")
    if found is None and (folder / "quantize_config.json").is_file():
        found = read_json(folder / "quantize_config.json")
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder} is not a GPTQ checkpoint: it has no quantization_config")
    return found


def _locate(moe: MoeModel, read: _GptqFiles) -> _Layout:
    stems: dict[int, list[dict[str, str]]] = {}
    shapes: dict[int, list[dict[str, GptqShape]]] = {}
    sizes = {"gate": (moe.intermediate, moe.hidden), "up": (moe.intermediate, moe.hidden),
             "down": (moe.hidden, moe.intermediate)}  # fmt: skip
    for layer in moe.moe:
        stems[layer.index] = _expert_stems(moe, f"{layer.path}.experts")
        shapes[layer.index] = []
        for e, roles in enumerate(stems[layer.index]):
            found = {role: read.shape(stem, *sizes[role]) for role, stem in roles.items()}
            widths = {role: UNQUANTIZED if s is None else s.bits for role, s in found.items()}
            if widths["gate"] != widths["up"] or None in found.values():
                raise CheckpointError(
                    f"expert {e} of layer {layer.index} has widths {widths}: gate and up have one width in gemq, and "
                    "all have 2, 3, 4 or 8 bits from GPTQ"
                )
            shapes[layer.index].append({role: s for role, s in found.items() if s is not None})
    linears = {}
    for path, module in moe.linears().items():
        stem = disk_name(moe.model, f"{path}.weight").removesuffix(".weight")
        linears[path] = (stem, read.shape(stem, module.out_features, module.in_features))
    return _Layout(stems, shapes, linears)


def _expert_stems(moe: MoeModel, path: str) -> list[dict[str, str]]:
    """The names on disk of every expert's gate, up and down linear, without their endings."""
    found: list[dict[str, str]] = [{} for _ in range(moe.num_experts)]
    for name in PROJECTIONS:
        for stored in disk_names(moe.model, f"{path}.{name}"):
            match = _EXPERT.search(stored)
            role = _ROLES.get(match[2]) if match else None
            if match is None or role is None:
                raise CheckpointError(f"{stored} is not a linear of an expert by any name that is known")
            found[int(match[1])][role] = stored.removesuffix(".weight")
    return found


def _packed_config(moe: MoeModel, layout: _Layout) -> PackedConfig:
    def width(kind: str, paths: list[str]) -> int:
        shapes = {path: layout.linears[path][1] for path in paths}
        found = {path: UNQUANTIZED if shape is None else shape.bits for path, shape in shapes.items()}
        if len(set(found.values())) > 1:
            low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
            raise CheckpointError(
                f"{kind} has linears of {found[low]} bits ({low}) and {found[high]} ({high}): gemq keeps one width"
            )
        return next(iter(found.values()), UNQUANTIZED)

    shared = {}
    for layer in moe.moe:
        if layer.shared is not None:
            shared[layer.index] = width(f"the shared expert of layer {layer.index}", list(layer.shared_linears()))
    shapes = [s for experts in layout.expert_shapes.values() for roles in experts for s in roles.values()]
    shapes += [shape for _, shape in layout.linears.values() if shape is not None]
    routed, down = (
        {i: [roles[role].bits for roles in experts] for i, experts in layout.expert_shapes.items()}
        for role in ("gate", "down")
    )
    widths = Widths(
        routed, shared, width("attention", list(moe.attention)), width("the dense MLP", list(moe.dense)),
        down={} if down == routed else down,
    )
    return PackedConfig(widths, common_group_size(shapes), method="gptq")


def _write_experts(
    moe: MoeModel, model: nn.Module, layout: _Layout, read: _GptqFiles, packed: PackedConfig, writer: ShardWriter,
    progress: Callable[[int, int], None] | None,
) -> None:
    for done, layer in enumerate(moe.moe):
        for name, roles in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            codes, meta = [], []
            for stems, shapes in zip(layout.experts[layer.index], layout.expert_shapes[layer.index], strict=True):
                for role in roles:
                    size = default_group_size(shapes[role].k, packed.group_size)
                    part, pairs = read.converted(stems[role], shapes[role], size)
                    codes.append(part)
                    meta.append(pairs)
            writer.add(disk_name(model, f"{layer.path}.experts.{stored_name(name, 'codes')}"), torch.cat(codes))
            writer.add(disk_name(model, f"{layer.path}.experts.{stored_name(name, 'meta')}"), torch.cat(meta))
        if progress:
            progress(done + 1, len(moe.moe))


def _write_linears(
    model: nn.Module, layout: _Layout, read: _GptqFiles, packed: PackedConfig, writer: ShardWriter
) -> None:
    for path, (stem, shape) in layout.linears.items():
        if shape is not None:
            codes, meta = read.converted(stem, shape, default_group_size(shape.k, packed.group_size))
            writer.add(disk_name(model, f"{path}.weight_codes"), codes)
            writer.add(disk_name(model, f"{path}.weight_meta"), meta)


def _write_rest(model: nn.Module, layout: _Layout, read: _GptqFiles, writer: ShardWriter) -> None:
    """Write the tensors that are stored in 16 bits unchanged. Raises :class:`CheckpointError` if one is missing, or if
    a tensor of the source was not used."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name in model.state_dict():
        if name in tied or name.endswith(("_codes", "_meta")):
            continue
        stored = disk_name(model, name)
        if stored not in read.reader.handles:
            quantized = f"{stored.removesuffix('.weight')}.qweight" in read.reader.handles
            raise CheckpointError(f"{stored} is quantized, which gemq keeps in 16 bits" if quantized else
                                  f"the checkpoint has no {stored}")
        writer.add(stored, read.plain(stored))
    left = {n for n in set(read.reader.handles) - read.used - tied if not n.endswith(_COMPUTED)}
    # AutoGPTQ writes a bias of zeros for every linear it quantizes
    left = {n for n in left if not (n.endswith(".bias") and not bool(read.reader.take(n).any()))}
    if left:
        shown = ", ".join(sorted(left)[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        raise CheckpointError(f"the checkpoint holds tensors that the model has no place for: {shown}")
