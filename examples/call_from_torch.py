"""Call gemq's expert kernels from a program of your own: tensors in, tensors out, no model and no transformers.

Run it with ``python examples/call_from_torch.py``. It makes a layer of experts of different widths from float weights,
packs them for this machine, multiplies routed tokens, and compares with plain torch.
"""

from __future__ import annotations

import torch

from gemq import ops

EXPERTS, TOP_K, HIDDEN, INNER, GROUP = 8, 2, 256, 384, 128
BITS = [1, 2, 3, 4, 8, 3, 2, 0]  # one width an expert; an expert of 0 bits contributes zero


def round_to_nearest(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 ``[n, k]`` and ``(s, m)`` float16 ``[n, k / GROUP, 2]`` with ``weight ~ codes * s + m``."""
    groups = weight.unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half()
    offset = low.half()
    codes = ((groups - offset.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return codes.flatten(-2).to(torch.uint8), torch.cat([scale, offset], -1)


def make_stack(weights: list[torch.Tensor], layout: str, device: str) -> tuple[ops.PackedStack, torch.Tensor]:
    """One projection as the ops take it, and its dequantized weights ``[E, n, k]``."""
    n, k = weights[0].shape
    codes, meta, dense = [], [], []
    for weight, bits in zip(weights, BITS, strict=True):
        if bits == 0:
            codes.append(None)
            meta.append(None)
            dense.append(torch.zeros(n, k))
            continue
        q, pairs = round_to_nearest(weight, bits)
        codes.append(q)
        meta.append(pairs)
        s, m = pairs.float().unbind(-1)
        dense.append((q.float().unflatten(-1, (-1, GROUP)) * s[..., None] + m[..., None]).flatten(-2))
    return ops.pack_stack(codes, meta, BITS, GROUP, layout).to(device), torch.stack(dense)


def main() -> float:
    """Relative error of the expert block against float32 torch; at most some 1e-3 (16-bit activations)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = ops.layout_for(device)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gate_up, gate_up_dense = make_stack([draw(2 * INNER, HIDDEN) * 0.05 for _ in BITS], layout, device)
    down, down_dense = make_stack([draw(HIDDEN, INNER) * 0.05 for _ in BITS], layout, device)
    x = draw(5, HIDDEN)
    ids = torch.rand(5, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K].int()
    ids[4, 1] = -1  # padding, or an expert on another rank: contributes zero
    weights = torch.rand(5, TOP_K, generator=generator)

    # one projection: a row per token and slot
    hidden = ops.moe_lowbit_gemm(x.to(device), gate_up, ids.to(device))
    print(f"moe_lowbit_gemm on {device} ({layout}): {list(hidden.shape)}")

    # the whole block: gate and up, SiLU, down, weighted sum
    out = ops.moe_lowbit_ffn(x.to(device), gate_up, down, ids.to(device), weights.to(device)).cpu()

    expected = torch.zeros_like(x)
    for token, slot in torch.cartesian_prod(torch.arange(5), torch.arange(TOP_K)).tolist():
        expert = int(ids[token, slot])
        if expert >= 0:
            gate, up = (gate_up_dense[expert] @ x[token]).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected[token] += weights[token, slot] * (down_dense[expert] @ inner)
    error = float((out - expected).norm() / expected.norm())
    print(f"moe_lowbit_ffn: relative error {error:.1e} against float32 torch")
    return error


if __name__ == "__main__":
    main()
