"""Make a Mixture-of-Experts model of a dense one without training: CMoE (arXiv 2502.04416).

A neuron of a SwiGLU network is a row of gate and up and a column of down. Neurons that nearly all tokens use become the
shared expert; the others are clustered by the tokens that they are active on into experts of equal size; a linear
router is fitted to the experts' activity. All experts together compute what the dense network computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

CLUSTER_ROUNDS = 12
ROUTER_SCALE = 0.3  # of the fitted log power; keeps sigmoid scores, and so the chosen experts' weights, alike


@dataclass(frozen=True)
class Layout:
    """Sizes of a carving: ``experts`` routed ones of ``width`` neurons each, ``top_k`` of them used by a token; the
    neurons that are left are the shared expert's."""

    experts: int
    top_k: int
    width: int

    def shared(self, intermediate: int) -> int:
        """Neurons of the shared expert. ``ValueError`` if the sizes do not fit a network of ``intermediate``."""
        left = intermediate - self.experts * self.width
        if min(self.experts, self.top_k, self.width) < 1:
            raise ValueError(f"experts, top_k and width must be positive, got {asdict(self)}")
        if self.top_k >= self.experts:
            raise ValueError(f"top_k must be below experts = {self.experts}, got {self.top_k}")
        if left < self.width or left % self.width:
            raise ValueError(f"experts x width must leave a multiple of width = {self.width} of the {intermediate} "
                             f"neurons to the shared expert, got {self.experts} x {self.width}, which leaves {left}")
        return left

    def active(self, intermediate: int) -> float:
        """Share of a layer's neurons that a token uses."""
        return (self.shared(intermediate) + self.top_k * self.width) / intermediate


def moe_config(dense: Any, layout: Layout) -> Glm4MoeConfig:
    """GLM4-MoE's config around the dense model's attention; routed weights add up to ``top_k``, one an expert."""
    shared = layout.shared(dense.intermediate_size)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id",
            "eos_token_id", "pad_token_id", "initializer_range")
    head = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    return Glm4MoeConfig(
        **{name: getattr(dense, name, None) for name in same}, head_dim=head,
        rope_parameters={**dense.rope_parameters, "partial_rotary_factor": 1.0},
        use_qk_norm=dense.model_type == "qwen3", attention_bias=dense.model_type == "qwen2",
        moe_intermediate_size=layout.width, n_routed_experts=layout.experts, n_shared_experts=shared // layout.width,
        num_experts_per_tok=layout.top_k, first_k_dense_replace=0, norm_topk_prob=True,
        routed_scaling_factor=float(layout.top_k), n_group=1, topk_group=1,
    )


@contextmanager
def inputs_of(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Collect the inputs ``[T, H]`` of every layer's dense network, a list of the forward passes' for each layer."""
    found: list[list[Tensor]] = [[] for _ in model.model.layers]
    with ExitStack() as stack:
        for layer, held in zip(model.model.layers, found, strict=True):
            def seen(module: nn.Module, args: tuple[Tensor], held: list[Tensor] = held) -> None:
                held.append(args[0].flatten(0, 1))

            stack.callback(layer.mlp.register_forward_pre_hook(seen).remove)
        yield found


def activity(mlp: nn.Module, inputs: Tensor) -> Tensor:
    """Size of each neuron's contribution to the output ``[T, I]``: its activation times the norm of its column."""
    hidden = F.silu(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
    return hidden.abs() * mlp.down_proj.weight.norm(dim=0)


def most_used(active: Tensor, count: int) -> Tensor:
    """Order neurons by how often they are among the strongest fifth of a token; the first ``count`` are shared."""
    strongest = active.topk(max(1, active.shape[1] // 5), dim=1).indices
    return torch.bincount(strongest.flatten(), minlength=active.shape[1]).argsort(descending=True, stable=True)[:count]


def balanced_clusters(features: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Assign ``[N]`` features ``[N, T]`` to clusters of N / clusters each by cosine similarity; best matches first."""
    count = len(features)
    features = F.normalize(features, dim=1)
    centres = features[torch.randperm(count, generator=generator)[:clusters]]
    assigned = torch.zeros(count, dtype=torch.long)
    for _ in range(CLUSTER_ROUNDS):
        similarity = features @ F.normalize(centres, dim=1).T
        room = [count // clusters] * clusters
        before, order = assigned.clone(), similarity.argsort(dim=1, descending=True).tolist()
        for neuron in similarity.amax(1).argsort(descending=True, stable=True).tolist():
            cluster = next(c for c in order[neuron] if room[c])
            assigned[neuron], room[cluster] = cluster, room[cluster] - 1
        if torch.equal(before, assigned):
            break
        centres = torch.stack([features[assigned == c].mean(0) for c in range(clusters)])
    return assigned


def fitted_router(inputs: Tensor, power: Tensor) -> Tensor:
    """Ridge regression ``[E, H]`` from inputs ``[T, H]`` to the experts' log power ``[T, E]``, relative to a token's
    mean."""
    target = power.clamp_min(1e-6).log()
    target = (target - target.mean(1, keepdim=True)).double()
    inputs = inputs.double()
    ridge = torch.eye(inputs.shape[1], dtype=torch.float64) * (1e-2 * len(inputs))
    factor = torch.linalg.cholesky(inputs.T @ inputs + ridge)
    return ROUTER_SCALE * torch.cholesky_solve(inputs.T @ target, factor).T.float()


@torch.no_grad()
def carve_layer(mlp: nn.Module, block: nn.Module, inputs: Tensor, layout: Layout, generator: torch.Generator) -> float:
    """Fill a block with a dense network's neurons; how many of a token's strongest experts its router finds."""
    active = activity(mlp, inputs)
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    shared = most_used(active, layout.shared(gate.shape[0]))
    routed = torch.ones(gate.shape[0], dtype=torch.bool).index_fill(0, shared, False).nonzero().flatten()
    block.shared_experts.gate_proj.weight.copy_(gate[shared])
    block.shared_experts.up_proj.weight.copy_(up[shared])
    block.shared_experts.down_proj.weight.copy_(down[:, shared])
    clusters = balanced_clusters(active[:, routed].T, layout.experts, generator)
    power = []
    for expert in range(layout.experts):
        mine = routed[clusters == expert]
        block.experts.gate_up_proj[expert].copy_(torch.cat([gate[mine], up[mine]]))
        block.experts.down_proj[expert].copy_(down[:, mine])
        power.append(active[:, mine].square().sum(1).sqrt())
    powers = torch.stack(power, 1)
    block.gate.weight.copy_(fitted_router(inputs, powers))
    found = (inputs @ block.gate.weight.T).topk(layout.top_k, 1).indices
    wanted = powers.topk(layout.top_k, 1).indices
    return float((found[:, :, None] == wanted[:, None, :]).any(2).float().mean())


@torch.no_grad()
def carve(dense: nn.Module, layout: Layout, windows: Tensor, seed: int) -> tuple[nn.Module, list[float]]:
    """Carve a dense model by its activity on token ids ``windows [N, L]``; the model, and each router's hits.

    Returns float32 in evaluation mode. Embeddings, attention and norms are the dense model's.
    """
    model = Glm4MoeForCausalLM(moe_config(dense.config, layout)).eval()
    given = dense.state_dict()
    kept = {name: given[name] for name, value in model.state_dict().items()
            if name in given and given[name].shape == value.shape}
    left = model.load_state_dict(kept, strict=False).missing_keys
    assert all(".mlp." in name for name in left), left
    with inputs_of(dense) as inputs:
        for rows in windows.split(4):
            dense(input_ids=rows, use_cache=False, logits_to_keep=1)
    generator, hits = torch.Generator().manual_seed(seed), []
    for old, new, held in zip(dense.model.layers, model.model.layers, inputs, strict=True):
        hits.append(carve_layer(old.mlp, new.mlp, torch.cat(held), layout, generator))
        held.clear()
    return model, hits
