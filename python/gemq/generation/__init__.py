"""Decoding: static cache, whole steps, sampling on the device, streaming."""

from gemq.generation.chat import Conversation, render
from gemq.generation.decoding import MODES, Decoding, Timing
from gemq.generation.options import MAX_BATCH, GenerationOptions
from gemq.generation.streaming import ContinuationStreamer
from gemq.generation.text import Generation, generate_rows, pad_left, stream_row

__all__ = [
    "MAX_BATCH",
    "MODES",
    "ContinuationStreamer",
    "Conversation",
    "Decoding",
    "Generation",
    "GenerationOptions",
    "Timing",
    "generate_rows",
    "pad_left",
    "render",
    "stream_row",
]
