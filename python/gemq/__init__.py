"""gemq: quantize the experts of Mixture-of-Experts language models globally, and run them packed.

>>> import gemq
>>> model = gemq.from_pretrained("mixtral-2.5")        # a folder written by `gemq quantize`

After ``import gemq``, ``transformers.AutoModelForCausalLM.from_pretrained`` loads such folders too.
"""

__version__ = "0.1.0"

from gemq import hf, ops
from gemq.checkpoint import from_pretrained, save_packed
from gemq.continuation import generate, stream
from gemq.errors import CalibrationError, CheckpointError, GemqError, OutOfMemoryError, UnsupportedModelError
from gemq.generation import Generation, GenerationOptions
from gemq.integrity import Verification, verify
from gemq.pipeline import QuantizeConfig, evaluate, quantize

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "GemqError",
    "Generation",
    "GenerationOptions",
    "OutOfMemoryError",
    "QuantizeConfig",
    "UnsupportedModelError",
    "Verification",
    "evaluate",
    "from_pretrained",
    "generate",
    "hf",
    "ops",
    "quantize",
    "save_packed",
    "stream",
    "verify",
]
