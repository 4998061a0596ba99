"""gemq: quantize the experts of Mixture-of-Experts language models globally, and run them packed.

>>> import gemq
>>> gemq.quantize("mistralai/Mixtral-8x7B-v0.1", "mixtral-2.5", bits=2.5)
>>> model = gemq.from_pretrained("mixtral-2.5")

After ``import gemq``, ``transformers.AutoModelForCausalLM.from_pretrained`` loads such folders too.
"""

__version__ = "0.1.0"

from gemq import hf, ops
from gemq.api import allocate, preview, quantize
from gemq.checkpoint import from_pretrained, save_packed
from gemq.continuation import generate, stream
from gemq.errors import (
    CalibrationError,
    CheckpointError,
    GemqError,
    NumberError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from gemq.generation import Generation, GenerationOptions
from gemq.integrity import Verification, verify
from gemq.outcome import QuantizeOutcome
from gemq.pipeline import QuantizeConfig, evaluate
from gemq.recipes import Recipe, quantize_config

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "GemqError",
    "Generation",
    "GenerationOptions",
    "NumberError",
    "OutOfMemoryError",
    "QuantizeConfig",
    "QuantizeOutcome",
    "Recipe",
    "UnsupportedModelError",
    "Verification",
    "allocate",
    "evaluate",
    "from_pretrained",
    "generate",
    "hf",
    "ops",
    "preview",
    "quantize",
    "quantize_config",
    "save_packed",
    "stream",
    "verify",
]
