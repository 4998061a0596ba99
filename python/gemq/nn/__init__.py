"""Modules over :mod:`gemq.ops`: a packed linear and a packed stack of experts."""

from gemq.nn.experts import LowBitExperts
from gemq.nn.linear import LowBitLinear

__all__ = ["LowBitExperts", "LowBitLinear"]
