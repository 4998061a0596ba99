"""Decoding: static cache, whole steps, sampling on the device, streaming."""

from gemq.generation.decoding import MODES, Decoding, Timing
from gemq.generation.options import MAX_BATCH, GenerationOptions

__all__ = ["MAX_BATCH", "MODES", "Decoding", "GenerationOptions", "Timing"]
