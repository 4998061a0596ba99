"""Modules over :mod:`gemq.ops`: a packed linear, a packed embedding and a packed stack of experts."""

from gemq.nn.embedding import LowBitEmbedding, TiedHead
from gemq.nn.experts import LowBitExperts
from gemq.nn.linear import LowBitLinear

__all__ = ["LowBitEmbedding", "LowBitExperts", "LowBitLinear", "TiedHead"]
