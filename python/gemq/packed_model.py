"""The packed modules of a model, and the tensors that its checkpoint holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import revert_weight_conversion

from gemq.errors import CheckpointError
from gemq.format import UNQUANTIZED
from gemq.models import MoeModel, Packed, packed_modules
from gemq.models.ends import end_widths, ends_of
from gemq.models.forward import decoder_of
from gemq.nn import LowBitEmbedding, LowBitExperts, LowBitLinear, TiedHead
from gemq.tensor_files import check_finite
from gemq.widths import Widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed_skeleton(
    moe: MoeModel, widths: Widths, group_size: int, device: torch.device | str | None = None, under: str = ""
) -> dict[str, Packed]:
    """Empty packed modules for an unquantized model, by module path; ``under`` is a path prefix to keep to.

    Raises :class:`CheckpointError` for widths of another model.
    """
    modules: dict[str, Packed] = {}
    indices = [layer.index for layer in moe.moe]
    if set(widths.experts) != set(indices):
        raise CheckpointError(
            f"quantization_config.expert_bits names layers {sorted(widths.experts)}, but the model's MoE layers are "
            f"{indices}"
        )
    for layer in moe.moe:
        bits, down = widths.of_experts(layer.index)
        if len(bits) != moe.num_experts:
            raise CheckpointError(
                f"quantization_config.expert_bits[{layer.index}] has {len(bits)} widths for {moe.num_experts} experts"
            )
        if f"{layer.path}.experts".startswith(under):
            form = layer.form
            modules[f"{layer.path}.experts"] = LowBitExperts(
                moe.hidden, moe.intermediate, bits, group_size, device, down, activation=form.activation,
                biased=form.biased, interleaved=form.interleaved, first=form.first,
                dtype=form.weights(layer.experts)[0].dtype,
            )
    try:
        linears = moe.quantized_linears(widths)
    except ValueError as error:
        raise CheckpointError(f"quantization_config gives {error}") from error
    for path, (linear, width) in linears.items():
        if path.startswith(under):
            modules[path] = LowBitLinear(
                linear.in_features, linear.out_features, width, group_size, linear.bias is not None,
                linear.weight.dtype, device,
            )
    return modules if under else modules | packed_ends(moe, widths, group_size, device)


def packed_ends(
    moe: MoeModel, widths: Widths, group_size: int, device: torch.device | str | None = None
) -> dict[str, Packed]:
    """Empty packed modules of an unquantized model's embedding and head, by module path, where they have a width below
    16; a tied pair is an embedding and a :class:`gemq.nn.TiedHead` of it.

    Raises :class:`CheckpointError` for widths of another model.
    """
    if widths.head == widths.embedding == UNQUANTIZED:
        return {}
    try:
        head_bits, embedding_bits = end_widths(moe.model, widths.head, widths.embedding)
    except ValueError as error:
        raise CheckpointError(f"quantization_config gives widths that do not fit: {error}") from error
    ends, modules = ends_of(moe.model), dict[str, Packed]()
    head, embedding = ends.head, ends.embedding
    biased, dtype = head.bias is not None, head.weight.dtype
    if embedding_bits < UNQUANTIZED:
        modules[ends.embedding_path] = packed = LowBitEmbedding(
            embedding.num_embeddings, embedding.embedding_dim, embedding_bits, group_size, embedding.padding_idx,
            ends.scale, ends.tied, embedding.weight.dtype, device,
        )
    if head_bits < UNQUANTIZED:
        modules[ends.head_path] = TiedHead(packed, biased, dtype, device) if ends.tied else LowBitLinear(
            head.in_features, head.out_features, head_bits, group_size, biased, dtype, device
        )
    return modules


def stored_state(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The tensors of a packed model as a checkpoint holds them: as :func:`stored_tensors`, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return stored_tensors(model, {k: v for k, v in model.state_dict().items() if k not in tied}, dtype)


def stored_tensors(
    model: PreTrainedModel, state: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Some or all of a packed model's tensors as a checkpoint has them: by the names of the family's own checkpoints,
    unquantized ones in ``dtype``."""
    packed = {f"{path}.{name}" for path, module in packed_modules(model) for name, _ in module.named_buffers()}
    if dtype is not None:
        as_is = packed | kept_in_float32(model)
        state = {k: v.to(dtype) if v.is_floating_point() and k not in as_is else v for k, v in state.items()}
    towers = tower_prefixes(model)
    for name, value in state.items():
        if not name.startswith(towers):
            check_finite(name, value)
    return {k: v.contiguous() for k, v in revert_weight_conversion(model, state).items()}


def tower_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """Module paths of a wrapper's vision and audio towers, each with a dot: what is neither around nor inside its text
    model, and not its head. They are kept as they are, infinite bounds of clipped layers included."""
    decoder = decoder_of(model)
    path = next(name for name, module in model.named_modules() if module is decoder)
    text, head = f"{path}.", model.get_output_embeddings()
    found = (f"{name}." for name, module in model.named_modules() if name and module is not head)
    return tuple(p for p in found if not p.startswith(text) and not text.startswith(p))


def kept_in_float32(model: PreTrainedModel) -> set[str]:
    """Tensors that the family keeps in float32 in a 16-bit model: correction biases of routers, which rank experts, and
    what else transformers names, by a part of the path or by several (``gate.weight``)."""
    kept = [f".{part}." for part in getattr(model, "_keep_in_fp32_modules_strict", None) or ()]
    return {name for name in model.state_dict() if any(part in f".{name}." for part in kept)}
