"""Find the parts of a supported MoE model by its structure."""

from gemq.models.families import SUPPORTED, MoeLayer, MoeModel, describe
from gemq.models.packed import Packed, empty_twin, packed_modules, prepare, replace_with_packed

__all__ = [
    "SUPPORTED", "MoeLayer", "MoeModel", "Packed", "describe", "empty_twin", "packed_modules", "prepare",
    "replace_with_packed",
]
