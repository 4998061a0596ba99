"""Formulas for the memory and disk, in bytes by part, that quantizing and running a model take.

The letters are those of docs/plan.md: ``P`` parameters, ``Q`` those that are quantized or tuned, ``L`` decoder
layers, ``M`` MoE layers, ``H`` hidden size, ``I`` width of an expert, ``E`` experts, ``K`` experts a token, ``V``
vocabulary, ``N`` windows of ``T`` tokens, ``b`` windows a batch, ``B`` candidate widths, ``d`` bytes an element of
the dtype that is computed in. Hessians and GPTQ are float32 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gemq.algorithms.method import MethodConfig
from gemq.format import UNQUANTIZED
from gemq.planning.model_parts import LayerParts, ModelParts

# An interpreter with torch and transformers loaded, measured: 0.75 GB. A CUDA context, as NVIDIA's runtime takes it
# on current devices: 0.5 GB, an estimate.
PROCESS, CONTEXT = 750 * 10**6, 500 * 10**6
# float32 copies of a k x k Hessian that are alive while its factor is computed (gemq.algorithms.gptq), and bytes a
# weight while its columns are rounded: its float32 copy, clone, dequantized twin and error, and the codes
FACTOR_COPIES, ROUNDING = 5, 17
# Memory that allocators hold beyond what is in use, as a share of all but the process itself: measured, 0 to 18%.
SLACK = 0.1
# assumed ratio of the busiest expert's tokens to the mean
BUSIEST = 4
# what rounding a part of an embedding or a head takes, eight million weights at a time
ROUNDING_ENDS = 100 * 10**6
_FLOAT = 4


@dataclass(frozen=True)
class Work:
    """Size of a task: calibration ``samples`` of ``length`` tokens, the method, the bytes of an element of the dtype
    that is computed in (``element``). It also says whether the task runs on the CPU, where device memory is host
    memory, and how many processes (``ranks``) share windows and experts."""

    samples: int
    length: int
    method: MethodConfig
    element: int
    on_cpu: bool
    ranks: int = 1

    def shared(self, size: int) -> int:
        """Share of one process."""
        return -(-size // self.ranks)

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.samples * self.length


@dataclass(frozen=True)
class Need:
    """Bytes that one stage takes, by part: on the ``device``, in the ``host``'s memory, on the ``scratch`` disk."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    scratch: dict[str, int] = field(default_factory=dict)


def graph_bytes(parts: ModelParts, layer: LayerParts, tokens: int, element: int) -> int:
    """Bytes that autograd keeps of one decoder layer whose weights are frozen.

    Two norms keep their input in float32, attention its queries, keys, values and result, a gated MLP gate, up and
    SiLU(gate), experts also their results, which the routing weights multiply.
    """
    kept = 2 * parts.hidden * _FLOAT + 4 * layer.attention * element + 3 * layer.mlp * element
    if layer.routed:
        kept += parts.top_k * (3 * parts.intermediate + 2 * parts.hidden) * element
    return tokens * kept


def logits_bytes(parts: ModelParts, tokens: int, element: int) -> int:
    """Logits in the model's dtype, and in float32 themselves, their log-softmax and two gradients."""
    return tokens * parts.vocabulary * (element + 4 * _FLOAT)


def gptq_bytes(count: int, n: int, k: int) -> int:
    """Working memory of GPTQ for ``count`` matrices ``n x k`` at once, their Hessians not included."""
    return count * (FACTOR_COPIES * _FLOAT * k * k + ROUNDING * n * k)


def _group_bytes(parts: ModelParts, widths: int, inner: int) -> int:
    """Bytes of quantized copies of one expert at ``widths`` widths, of GPTQ's working memory, and of its Hessians."""
    weights = parts.hidden * inner
    hessians = parts.hidden**2 + 2 * inner**2 + 4 * max(parts.hidden, inner) ** 2
    # 3 of them the expert itself, converted
    return _FLOAT * ((3 * widths + 9) * weights + hessians)


def held_layer(parts: ModelParts, element: int) -> int:
    """Bytes of the largest decoder layer as the streaming engine holds it: experts as they are stored, assumed to be 16
    bits."""
    experts = parts.experts * parts.expert
    return experts * min(element, 2) + (parts.largest_layer - experts) * element


def _expert_inputs(work: Work, size: int) -> int:
    # of several processes each has its own windows' and then those of all
    return size * (1 + work.ranks if work.ranks > 1 else 1)


def _streamed_measuring(parts: ModelParts, work: Work) -> Need:
    d, batch, widths = work.element, work.method.batch_size * work.length, len(work.method.candidates)
    shared = max((layer.mlp for layer in parts.layers if layer.routed), default=0)
    inner = max(parts.intermediate, shared)
    # experts are taken in groups that fit half a layer in 16 bits, one at least; then a batch's tokens at all widths
    group = max(parts.largest_layer, _group_bytes(parts, widths, inner))
    changes = batch * widths * (4 * inner + parts.hidden) * d
    graph = max(graph_bytes(parts, layer, batch, d) for layer in parts.layers) + 3 * batch * parts.hidden * d
    layer = {"layer": held_layer(parts, d), "working memory": max(graph, group + changes)}
    head = {"layer": parts.outside * d, "working memory": logits_bytes(parts, work.length, d)}
    stream = work.tokens * parts.hidden * d
    scratch = {
        "layer inputs": (len(parts.layers) + 1) * stream, "gradients": 2 * stream,
        "expert inputs": _expert_inputs(work, work.tokens * (2 * parts.hidden * d + parts.top_k * (8 + d))),
    }
    return Need(max(layer, head, key=lambda parts: sum(parts.values())), {}, scratch)


def _streamed_quantizing(parts: ModelParts, work: Work) -> Need:
    d, batch = work.element, work.method.batch_size * work.length
    group = max(parts.largest_layer, _group_bytes(parts, 1, parts.intermediate))
    linears = [shape for layer in parts.layers for shape in layer.linears]
    linear = max((gptq_bytes(1, n, k) for n, k in linears), default=0)
    hessians = _FLOAT * max(sum(k * k for _, k in layer.linears) for layer in parts.layers)
    run = max(graph_bytes(parts, layer, batch, d) for layer in parts.layers)
    device = {
        "layer": held_layer(parts, d), "codes": int(1.03 * parts.largest_layer), "Hessians": hessians,
        "working memory": max(group, linear, run),
    }
    routing = parts.hidden * d + parts.top_k * (8 + d)
    expert_inputs = _expert_inputs(work, work.tokens * routing)
    scratch = {"layer inputs": 2 * work.tokens * parts.hidden * d, "expert inputs": expert_inputs}
    if min(work.method.head_bits, work.method.embedding_bits) < UNQUANTIZED:
        ends = {"layer": parts.outside * d, "codes": int(1.03 * parts.outside), "working memory": ROUNDING_ENDS}
        device = max(device, ends, key=lambda parts: sum(parts.values()))
    return Need(device, {"packed layer": 2 * parts.largest_layer}, scratch)


def _stored_outside(parts: ModelParts, work: Work) -> int:
    """Bytes that the checkpoint has of embeddings, head and last norm."""
    method, matrix = work.method, parts.vocabulary * parts.hidden
    ends = (method.head_bits, method.embedding_bits)
    # of a tied pair there is one
    widths = ends if parts.outside >= 2 * matrix else (min(ends),)
    per_weight = 32 / method.gptq.group_size
    saved = sum(matrix * (UNQUANTIZED - bits - per_weight) for bits in widths if bits < UNQUANTIZED)
    return 2 * parts.outside - int(saved / 8)


def layerwise(parts: ModelParts, work: Work, output: int) -> dict[str, Need]:
    """Bytes by stage with one decoder layer on the device at a time, or embeddings and head.

    Activations wait in scratch files: the input of every layer, because the reverse sweep needs it again, gradients,
    and what one layer's experts were called with. Routers are tuned on packed layers, one at a time, recomputed.
    """
    d = work.element
    stages: dict[str, Need] = {}
    if work.method.measures:
        stages["measure"] = _streamed_measuring(parts, work)
    stages["quantize"] = _streamed_quantizing(parts, work)
    if work.method.tune:
        graph = max(graph_bytes(parts, one, work.length, d) for one in parts.layers)
        windows = work.shared(work.method.router.batch_size)
        # read, and laid out for the kernels
        packed = 2 * (output - _stored_outside(parts, work)) * parts.largest_layer // (parts.parameters - parts.outside)
        stages["tune routers"] = Need({
            "embeddings and head": parts.outside * d, "packed layer": max(0, packed),
            "layer inputs": len(parts.layers) * windows * work.length * parts.hidden * d,
            "routers": 5 * _FLOAT * parts.moe_layers * parts.experts * parts.hidden,
            "working memory": graph + parts.expert * d + logits_bytes(parts, work.length, d),
        })
    stages["save"] = Need({}, {"packed layer": 2 * parts.largest_layer})
    if not work.on_cpu:
        # a stack of experts is read on the host
        stages = {
            name: Need(need.device, need.host | {"reading": 2 * parts.largest_layer}, need.scratch)
            for name, need in stages.items()
        }
    return {name: _merged(need, work) for name, need in stages.items()}


def resident(stages: dict[str, Need], parts: ModelParts, work: Work, output: int) -> dict[str, Need]:
    """Bytes by stage if the model stays in memory once it was read, instead of a layer of it, and the quantized layers
    and activations with it; Fisher information needs a plain copy of the model, and sums and gradients of its
    weights."""
    d, experts = work.element, parts.moe_layers * parts.experts * parts.expert
    # experts as they are stored
    model = experts * min(d, 2) + (parts.parameters - experts) * d
    found = {}
    for name, need in stages.items():
        device = {part: size for part, size in need.device.items() if part not in ("layer", "embeddings and head")}
        if name == "measure" and work.method.method == "fisher":
            device |= {"plain copy": parts.parameters * d, "Fisher information": parts.quantizable * (_FLOAT + d)}
        host = need.host | ({"quantized layers": output} if name != "measure" else {})
        if work.on_cpu:
            host = host | {"weights": model}
            host.pop("layer", None)
        else:
            device |= {"weights": model}
        found[name] = Need(device, host, need.scratch)
    return found


def _merged(need: Need, work: Work) -> Need:
    """Add the process and the allocators' slack to a stage. On a CPU the device's bytes count as the host's."""
    host = dict(need.host)
    if work.on_cpu:
        for name, size in need.device.items():
            host[name] = host.get(name, 0) + size
    host = {"process": PROCESS} | host | {"allocator": int(SLACK * sum(host.values()))}
    if work.on_cpu:
        return Need({}, host, need.scratch)
    device = {"context": CONTEXT} | need.device | {"allocator": int(SLACK * sum(need.device.values()))}
    return Need(device, host, need.scratch)


def peak(stages: dict[str, Need]) -> dict[str, int]:
    """Most bytes that any stage takes of ``device``, ``host`` and ``scratch``."""
    return {
        place: max((sum(getattr(need, place).values()) for need in stages.values()), default=0)
        for place in ("device", "host", "scratch")
    }
