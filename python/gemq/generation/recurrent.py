"""One new token through linear attention (gated delta rule) and Mamba-2, from the projections and parameters of
transformers' own modules; the states of :mod:`gemq.generation.states` move on in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemq.generation.states import Recurrent


def _convolve(new: Tensor, state: Recurrent, convolution: Any) -> Tensor:
    """SiLU of the causal convolution at the new inputs ``[B, channels]``."""
    conv = state.conv
    conv.copy_(torch.cat((conv[:, :, 1:], new[:, :, None].to(conv.dtype)), -1))
    out = (conv.float() * convolution.weight.squeeze(1).float()).sum(-1)
    if convolution.bias is not None:
        out = out + convolution.bias.float()
    return F.silu(out).to(new.dtype)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class DeltaNet:
    """The gated delta net of Qwen3-Next, whose projections are fused by key head, and of Qwen3.5, where they are
    apart."""

    def __init__(self, module: Any, state: Recurrent):
        self.module, self.state = module, state
        self.rate = -module.A_log.detach().float().exp()

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs of the convolution ``[B, channels]``, the gate ``[B, heads, dim]``, beta and decay ``[B, heads]``."""
        module, batch = self.module, x.shape[0]
        if hasattr(module, "in_proj_qkv"):
            gate = module.in_proj_z(x).view(batch, module.num_v_heads, module.head_v_dim)
            return module.in_proj_qkv(x)[:, 0], gate, module.in_proj_b(x)[:, 0], module.in_proj_a(x)[:, 0]
        *parts, gate, beta, decay = module.fix_query_key_value_ordering(module.in_proj_qkvz(x), module.in_proj_ba(x))
        mixed = torch.cat([part.reshape(batch, -1) for part in parts], -1)
        return mixed, gate[:, 0], beta[:, 0], decay[:, 0]

    def __call__(self, x: Tensor, *_: Any) -> Tensor:
        """``[B, 1, H] -> [B, 1, H]``."""
        module, batch = self.module, x.shape[0]
        mixed, gate, beta, decay = self._projected(x)
        parts = _convolve(mixed, self.state, module.conv1d).split(
            [module.key_dim, module.key_dim, module.value_dim], -1
        )
        query, key = (part.view(batch, -1, module.head_k_dim).float() for part in parts[:2])
        value = parts[2].view(batch, -1, module.head_v_dim).float()
        shared = module.num_v_heads // module.num_k_heads
        query = (_unit(query) * module.head_k_dim**-0.5).repeat_interleave(shared, 1)
        key = _unit(key).repeat_interleave(shared, 1)
        state = self.state.state
        state.mul_((self.rate * F.softplus(decay.float() + module.dt_bias)).exp()[..., None, None])
        seen = (key[:, :, None].to(state.dtype) @ state)[:, :, 0]
        change = (value - seen) * beta.sigmoid().float()[..., None]
        state.add_(key[..., None] * change[:, :, None])
        out = (query[:, :, None].to(state.dtype) @ state)[:, :, 0].to(x.dtype)
        out = module.norm(out.reshape(-1, module.head_v_dim), gate.reshape(-1, module.head_v_dim))
        return module.out_proj(out.view(batch, 1, -1))


class Mamba:
    """The Mamba-2 mixer of Nemotron-H."""

    def __init__(self, module: Any, state: Recurrent):
        self.module, self.state = module, state
        self.rate = -module.A_log.detach().float().exp()

    def __call__(self, x: Tensor, *_: Any) -> Tensor:
        """``[B, 1, H] -> [B, 1, H]``."""
        module, batch = self.module, x.shape[0]
        inner, groups = module.intermediate_size, module.n_groups
        gate, mixed, step = module.in_proj(x)[:, 0].split([inner, module.conv_dim, module.num_heads], -1)
        shared = groups * module.ssm_state_size
        mixed, into, out_of = _convolve(mixed, self.state, module.conv1d).split([inner, shared, shared], -1)
        heads = module.num_heads // groups
        into, out_of = (t.view(batch, groups, -1).repeat_interleave(heads, 1) for t in (into, out_of))
        mixed = mixed.view(batch, module.num_heads, module.head_dim)
        step = F.softplus(step + module.dt_bias.to(step.dtype))
        state = self.state.state
        state.mul_((step.float() * self.rate).exp()[..., None, None])
        state.add_((step[..., None] * mixed)[..., None].float() * into[:, :, None].float())
        out = (state @ out_of[..., None].to(state.dtype))[..., 0].to(x.dtype)
        out = out + mixed * module.D[:, None].to(x.dtype)
        return module.out_proj(module.norm(out.reshape(batch, 1, -1), gate[:, None]).to(x.dtype))
