"""GPTQ inside one group of columns: the column loop, and descent over the codes that it chose. Compiled
for CPUs and CUDA; plain torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq._core import core
from gemq.ops import checks
from gemq.reference import descend_codes as reference_descend_codes
from gemq.reference import gptq_group as reference_gptq_group
from gemq.reference.grid import CLIPS, check_weights

FP16_MAX = 65504.0


def gptq_group(
    block: Tensor, factor: Tensor, bits: Tensor, clip: str = "none", propagate_from: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`gemq.reference.gptq_group` for float32 ``block`` and ``factor`` and int32 ``bits``.

    Raises ``ValueError`` for an unknown ``clip``, tensors on different devices, or weights that are not finite or
    beyond float16's range.
    """
    if not _compiled_for(block):
        return reference_gptq_group(block, factor, bits, clip, propagate_from)
    if clip not in CLIPS:
        raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {clip!r}")
    for name, value in (("factor", factor), ("bits", bits)):
        if value.device != block.device:
            raise ValueError(f"{name} is on {value.device}, block on {block.device}")
    block, factor, bits = block.float().contiguous(), factor.float().contiguous(), bits.to(torch.int32).contiguous()
    low, high = torch.aminmax(block)
    if not -FP16_MAX <= float(low) <= float(high) <= FP16_MAX:  # false for NaN, too
        check_weights(block)
    matrices, n, group = block.shape
    codes = torch.empty_like(block, dtype=torch.uint8)
    meta = torch.empty(matrices, n, 2, dtype=torch.float16, device=block.device)
    errors = torch.empty_like(block)
    core().gptq_group(
        device=checks.device_code("block", block), block=block.data_ptr(), factor=factor.data_ptr(),
        bits=bits.data_ptr(), codes=codes.data_ptr(), meta=meta.data_ptr(), errors=errors.data_ptr(),
        matrices=matrices, n=n, group=group, clip=CLIPS.index(clip), propagate_from=propagate_from,
        threads=torch.get_num_threads(), stream=checks.stream(block),
    )
    return codes, meta, errors


def descend_codes(products: Tensor, hessian: Tensor, codes: Tensor, meta: Tensor, bits: Tensor) -> Tensor:
    """Run :func:`gemq.reference.descend_codes` for float32 ``products`` and ``hessian``.

    Raises ``ValueError`` for shapes that do not fit, tensors on different devices, or a hessian whose diagonal is not
    positive.
    """
    matrices, n, group = products.shape
    wanted = {
        "hessian": (hessian, (matrices, group, group)), "codes": (codes, (matrices, n, group)),
        "meta": (meta, (matrices, n, 2)), "bits": (bits, (matrices,)),
    }
    for name, (value, shape) in wanted.items():
        if value.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for products {list(products.shape)}: {list(value.shape)}")
        if value.device != products.device:
            raise ValueError(f"{name} is on {value.device}, products on {products.device}")
    if not bool((hessian.diagonal(dim1=-2, dim2=-1) > 0).all()):
        raise ValueError("hessian must have a positive diagonal")
    if not _compiled_for(products):
        return reference_descend_codes(products, hessian, codes, meta, bits)
    products, hessian = products.float().contiguous(), hessian.float().contiguous()
    bits, meta = bits.to(torch.int32).contiguous(), meta.to(torch.float16).contiguous()
    found = codes.to(torch.uint8).clone(memory_format=torch.contiguous_format)
    core().descend_codes(
        device=checks.device_code("products", products), products=products.data_ptr(), hessian=hessian.data_ptr(),
        bits=bits.data_ptr(), meta=meta.data_ptr(), codes=found.data_ptr(), matrices=matrices, n=n, group=group,
        threads=torch.get_num_threads(), stream=checks.stream(products),
    )
    return found


def _compiled_for(tensor: Tensor) -> bool:
    """Return True if the extension runs on the tensor's device; elsewhere the reference does."""
    return tensor.device.type == "cpu" or (tensor.is_cuda and core().cuda_built())
