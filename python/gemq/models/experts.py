"""Find by computing how a family's experts module stores its matrices, and what it computes.

transformers fuses a layer's experts into one module with ``gate_up_proj [E, 2I, H]`` (or ``up_proj [E, I, H]`` where
there is no gate) and ``down_proj [E, H, I]``. Some families store them transposed, some with the rows of gate and up in
turns, some with biases; activations differ. Names and shapes say some of this. The rest is decided by running the
family's own forward on tiny random weights: the one form that computes the same is the module's.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gemq.activation import SILU, Activation, Between
from gemq.errors import UnsupportedModelError
from gemq.models.weighted_inputs import takes_inputs_alone
from gemq.nn.experts import PROJECTIONS, gate_first

# of a probe: experts, hidden size, intermediate size, tokens, top-k
_EXPERTS, _HIDDEN, _INNER, _TOKENS, _TOP_K = 3, 8, 4, 5, 2
_SIZES = {"num_experts": _EXPERTS, "hidden_size": _HIDDEN, "hidden_dim": _HIDDEN, "intermediate_size": _INNER,
          "intermediate_dim": _INNER, "expert_dim": _INNER}
_CLOSE = 1e-5  # relative; GELU and its approximation by tanh differ by more
_DENSE_ACTIVATIONS = {
    "SiLU": "silu", "SiLUActivation": "silu", "silu": "silu", "GELUTanh": "gelu_tanh", "ReLUSquaredActivation": "relu2",
}


@dataclass(frozen=True)
class ExpertsForm:
    """Storage and activation of an experts module.

    ``first`` and ``second`` name its parameters, of ``experts`` experts. ``transposed`` matrices are stored ``[k, n]``;
    of ``interleaved`` ones the rows of gate and up take turns; ``biased`` modules have ``{name}_bias [E, n]``. The
    standard form, in which gemq works, is ``[n, k]`` with the gate's rows first.
    """

    experts: int
    hidden: int
    intermediate: int
    activation: Activation = SILU
    first: str = "gate_up_proj"
    second: str = "down_proj"
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False

    @property
    def rows(self) -> int:
        """Rows of the first projection, in the standard form."""
        return self.activation.rows(self.intermediate)

    @property
    def parameters(self) -> int:
        """Weights of one expert, without biases."""
        return (self.rows + self.intermediate) * self.hidden

    @property
    def names(self) -> dict[str, str]:
        """The module's parameters by the projections' names."""
        return dict(zip(PROJECTIONS, (self.first, self.second), strict=True))

    def weights(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Both projections as they are stored."""
        return getattr(module, self.first), getattr(module, self.second)

    def standard(self, name: str, stored: Tensor) -> Tensor:
        """A projection, of one expert or several, in the standard form: a view where that is possible."""
        return self._gate_first(name, stored.transpose(-1, -2) if self.transposed else stored, -2)

    def as_stored(self, name: str, standard: Tensor) -> Tensor:
        """The inverse of :meth:`standard`."""
        if self.interleaved and name == PROJECTIONS[0]:
            standard = torch.stack(standard.chunk(2, -2), -2).flatten(-3, -2)
        return (standard.transpose(-1, -2) if self.transposed else standard).contiguous()

    def _gate_first(self, name: str, value: Tensor, dim: int) -> Tensor:
        if not (self.interleaved and name == PROJECTIONS[0]):
            return value
        return gate_first(value, dim)

    def biases(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, Tensor | None]:
        """Biases ``[E, n]`` of both projections, gate first; None without."""
        if not self.biased:
            return None, None
        first, second = (
            self._gate_first(name, getattr(module, f"{own}_bias").detach().to(dtype), -1).contiguous()
            for name, own in self.names.items()
        )
        return first, second

    def between(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> Between:
        """The activation, with the biases that a loaded module holds."""
        return Between(self.activation, *self.biases(module, dtype))


def mlp_activation(mlp: nn.Module) -> Activation | None:
    """The activation of a dense MLP or shared expert by its ``act_fn``; None for one that is not known."""
    alpha, limit = (getattr(mlp, name, None) for name in ("swiglu_alpha", "swiglu_limit"))
    if alpha is not None and limit is not None:
        return Activation("swigluoai", alpha, limit)
    found = next((f for name in ("act_fn", "activation_fn") if (f := getattr(mlp, name, None)) is not None), None)
    name = _DENSE_ACTIVATIONS.get(getattr(found, "__name__", type(found).__name__))
    return None if name is None else Activation(name)


def _candidates(experts: Any, config: Any, gated: bool) -> Iterator[tuple[Activation, bool]]:
    """Activations, and interleaved or not, that a module may have."""
    if not gated:
        yield Activation("relu2"), False
        return
    limit = next((v for v in (getattr(experts, "limit", None), getattr(config, "swiglu_limit", None)) if v), None)
    alpha = next((v for v in (getattr(experts, "alpha", None), getattr(experts, "swiglu_alpha", None)) if v), 1.702)
    for interleaved in (False, True):
        for bound in dict.fromkeys((None, limit)):
            yield Activation("silu", limit=bound), interleaved
            yield Activation("swigluoai", alpha, bound), interleaved
        yield Activation("gelu_tanh"), interleaved


def experts_form(path: str, experts: Any, config: Any) -> ExpertsForm:
    """Find the form of an experts module, whose parameters need no storage.

    Raises :class:`UnsupportedModelError` that names what differs from all forms.
    """
    where = f"{path}.experts is not supported yet"
    shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters(recurse=False)}
    first = next((name for name in ("gate_up_proj", "up_proj") if name in shapes), "")
    biases = {f"{first}_bias", "down_proj_bias"}
    if set(shapes) - biases != {first, "down_proj"} or len(set(shapes) & biases) == 1:
        holds = sorted(name for name, _ in experts.named_parameters())
        raise UnsupportedModelError(f"{where}: it holds {holds[:6]}, not gate_up_proj (or up_proj) and down_proj")
    gated = first == "gate_up_proj"
    count, *one = shapes[first]
    fits = [
        transposed for transposed in (False, True)
        for rows, hidden in [one[::-1] if transposed else one]
        for down in [(hidden, rows // 2 if gated else rows)]
        if shapes["down_proj"] == (count, *(down[::-1] if transposed else down))
    ]
    if not fits:
        kinds = "[E, 2I, H] and [E, H, I]" if gated else "[E, I, H] and [E, H, I]"
        raise UnsupportedModelError(
            f"{where}: {first} {list(shapes[first])} and down_proj {list(shapes['down_proj'])} are not {kinds}"
        )
    probe = _Probe(experts, first, bool(set(shapes) & biases))
    for transposed in fits:
        rows, hidden = one[::-1] if transposed else one
        for activation, interleaved in _candidates(experts, config, gated):
            form = ExpertsForm(count, hidden, rows // 2 if gated else rows, activation, first, "down_proj", transposed,
                               interleaved, probe.biased)
            if probe.fits(form):
                return form
    told = probe.problem or "its outputs are not those of any known activation and order of rows"
    name = type(getattr(experts, "act_fn", None)).__name__
    raise UnsupportedModelError(f"{where}: {told} (activation {name})")


def _called(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    forward = inspect.unwrap(type(module).forward)
    if not takes_inputs_alone(module):
        return forward(module, x, ids, weights)
    every = forward(module, x.repeat(_EXPERTS, 1)).view(_EXPERTS, len(x), -1)
    return sum(weights[:, slot, None] * every[ids[:, slot], torch.arange(len(x))] for slot in range(_TOP_K))


class _Probe:
    """The family's forward, run on tiny random weights."""

    def __init__(self, experts: Any, first: str, biased: bool):
        self._experts, self._first, self.biased, self.problem = experts, first, biased, ""
        # by transposed or not: the module, and the output, inputs, ids and weights of its call
        self._found: dict[bool, tuple[Any, Tensor, Tensor, Tensor, Tensor]] = {}

    def fits(self, form: ExpertsForm) -> bool:
        """True if the module computes what ``form`` says."""
        # a loader may have another default device and dtype
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.no_grad(), torch.device("cpu"):
                return self._fits(form)
        finally:
            torch.set_default_dtype(before)

    def _fits(self, form: ExpertsForm) -> bool:
        try:
            module, output, x, ids, weights = self._run(form.transposed)
        except Exception as error:
            self.problem = f"its forward on [T, H], ids and weights [T, k] gives {type(error).__name__}: {error}"
            return False
        tiny = replace(form, experts=_EXPERTS, hidden=_HIDDEN, intermediate=_INNER)
        gate_up, down = (tiny.standard(n, w.detach()) for n, w in zip(PROJECTIONS, tiny.weights(module), strict=True))
        first_bias, second_bias = tiny.biases(module)
        wanted = torch.zeros_like(x)
        for slot in range(_TOP_K):
            chosen = ids[:, slot]
            inner = torch.einsum("tk,tnk->tn", x, gate_up[chosen])
            inner = form.activation(inner if first_bias is None else inner + first_bias[chosen])
            out = torch.einsum("tk,tnk->tn", inner, down[chosen])
            wanted += weights[:, slot, None] * (out if second_bias is None else out + second_bias[chosen])
        return bool(((output - wanted).norm(dim=1) < _CLOSE * wanted.norm(dim=1)).all())

    def _run(self, transposed: bool) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
        if transposed not in self._found:
            generator = torch.Generator().manual_seed(0)

            def draw(*shape: int) -> Tensor:
                return torch.randn(*shape, generator=generator)

            rows = 2 * _INNER if self._first == "gate_up_proj" else _INNER
            shapes = {self._first: (rows, _HIDDEN), "down_proj": (_HIDDEN, _INNER)}
            module = copy.copy(self._experts)
            module._parameters = {}
            for name, shape in shapes.items():
                stored = shape[::-1] if transposed else shape
                module._parameters[name] = nn.Parameter(draw(_EXPERTS, *stored), requires_grad=False)
                if self.biased:
                    module._parameters[f"{name}_bias"] = nn.Parameter(draw(_EXPERTS, shape[0]), requires_grad=False)
            for name in _SIZES:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, _SIZES[name])
            # small, where activations of one kind differ, to large, beyond limits
            x, weights = draw(_TOKENS, _HIDDEN) * torch.logspace(-1, 1.5, _TOKENS)[:, None], draw(_TOKENS, _TOP_K)
            ids = torch.stack([torch.randperm(_EXPERTS, generator=generator)[:_TOP_K] for _ in range(_TOKENS)])
            output = _called(module, x.clone(), ids, weights)
            self._found[transposed] = (module, output, x, ids, weights)
        return self._found[transposed]
