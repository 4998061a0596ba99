"""Choose transformers' class of a model: of a wrapper the whole, with its vision or audio towers."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """The auto class that makes the model of a transformers config.

    A config with a text config inside is of a wrapper. Its towers stay unquantized and are written back, so that the
    checkpoint serves what the source served. Anything else is a causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = getattr(config, "model_type", None)
    whole = config.get_text_config() is not config or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if whole and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM
