"""Find the ends of a transformers model, its embedding and its head, and say at which widths they can be packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gemq.format import END_BITS, GROUP_SIZES, UNQUANTIZED
from gemq.nn import LowBitEmbedding

# the class of Gemma's embeddings, which multiply what they look up by a number
_SCALED = "TextScaledWordEmbedding"


@dataclass(frozen=True)
class Ends:
    """Embedding and head of a model, with their module paths; ``tied`` if they are one matrix."""

    embedding: Any
    embedding_path: str
    head: Any
    head_path: str
    tied: bool

    @property
    def scale(self) -> float:
        """The number that the embedding multiplies its rows by."""
        return float(getattr(self.embedding, "scalar_embed_scale", 1.0))


def ends_of(model: Any) -> Ends:
    """Locate the ends of an unquantized causal language model or wrapper. Raises ``ValueError`` without a head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no head")
    paths = {id(module): name for name, module in model.named_modules()}
    names = paths[id(embedding)], paths[id(head)]
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    pair = {f"{name}.weight" for name in names}
    return Ends(embedding, names[0], head, names[1], any({target, source} == pair for target, source in ties.items()))


def embedding_device(model: Any) -> torch.device:
    """The device of the embedding of a model or decoder, packed or not: where token numbers go."""
    found = model.get_input_embeddings()
    return found.packed_device() if isinstance(found, LowBitEmbedding) else found.weight.device


def embedding_dtype(model: Any) -> torch.dtype:
    """The dtype of what the embedding of a model or decoder, packed or not, gives."""
    found = model.get_input_embeddings()
    return found.dtype if isinstance(found, LowBitEmbedding) else found.weight.dtype


def check_end_bits(name: str, width: Any) -> None:
    """Raise ``ValueError`` unless ``width`` is one of an end, or 16."""
    if type(width) is not int or width not in (*END_BITS, UNQUANTIZED):
        raise ValueError(f"{name} must be {END_BITS[0]}..{END_BITS[-1]}, or {UNQUANTIZED} for unquantized, got {width}")


def end_widths(model: Any, head: int, embedding: int) -> tuple[int, int]:
    """Widths of head and embedding: those given, and of a tied pair the one that is below 16 for both.

    Raises ``ValueError`` for a width that is none, different ones of a tied pair, and an end that is not packed: of
    columns that no group divides, or of a class that computes something else.
    """
    check_end_bits("head_bits", head)
    check_end_bits("embedding_bits", embedding)
    if head == embedding == UNQUANTIZED:
        return head, embedding
    ends = ends_of(model)
    if ends.tied:
        if UNQUANTIZED not in (head, embedding) and head != embedding:
            raise ValueError(
                f"head_bits and embedding_bits must be equal for a model whose head and embedding are one matrix "
                f"(tie_word_embeddings), got {head} and {embedding}"
            )
        head = embedding = min(head, embedding)
    for name, width, end in (("head_bits", head, ends.head), ("embedding_bits", embedding, ends.embedding)):
        reason = _unfit(end) if width < UNQUANTIZED else None
        if reason:
            raise ValueError(f"{name} must be {UNQUANTIZED} for {type(model).__name__}, whose {reason}, got {width}")
    return head, embedding


def _unfit(end: Any) -> str | None:
    """Tell why an end is not packed; None if it is."""
    kind = type(end)
    if isinstance(end, nn.Linear):
        known, columns = kind is nn.Linear, end.in_features
    else:
        scaled = kind.__name__.endswith(_SCALED) and hasattr(end, "scalar_embed_scale")
        known, columns = kind is nn.Embedding or scaled, getattr(end, "embedding_dim", 0)
        known = known and end.max_norm is None
    if not known:
        return f"module is a {kind.__name__}, which was not compared"
    if columns % min(GROUP_SIZES):
        return f"{columns} columns are no multiple of {min(GROUP_SIZES)}"
    return None
