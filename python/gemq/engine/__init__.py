"""Quantize a model layer by layer from disk, resumably: one decoder layer is in memory at a time."""
