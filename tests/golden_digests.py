"""Digests of the packed weights of every family and recipe, to compare two commits on one machine.

``python tests/golden_digests.py before.json`` writes them, ``... after.json --against before.json`` lists what differs.
Sums depend on the machine's instructions and threads, so digests are never compared across machines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from tiny_models import FAMILIES, tiny_model
from tiny_text import word_tokenizer, words

import gemq

RECIPES = ("default", "best", "paper", "fast")
METHODS = {
    "pmq": {"method": "pmq", "bits": "2.5,2.25"}, "uniform": {"method": "uniform"},
    "two-step": {"method": "two-step", "bits": "2.5,2.25"},
    "zero": {"candidates": "0,1,2", "bits": 1.5}, "routers": {"router_bits": 8}, "experts": {"granularity": "expert"},
    "estimate": {"estimate": "quantized", "bits": "2.5,2"}, "tensor": {"tensor_bits": ["o_proj=8"]},
}


def digest(folder: Path) -> str:
    """SHA-256 over a checkpoint's shards and config, in order of their names."""
    found = hashlib.sha256()
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("config.json")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def digests(work: Path) -> dict[str, str]:
    """Quantize every case and return its digest by name."""
    (work / "text.txt").write_text(words(4000))
    cases = {f"{family} {recipe}": (family, {"recipe": recipe}) for family in FAMILIES for recipe in RECIPES}
    cases |= {f"deepseek_v3 {name}": ("deepseek_v3", options) for name, options in METHODS.items()}
    found = {}
    for name, (family, options) in cases.items():
        model, out = work / family, work / f"out {name}"
        if not model.is_dir():
            tiny_model(family).to(torch.bfloat16).save_pretrained(model)
            word_tokenizer().save_pretrained(model)
        options = {"bits": "2.5,2", "samples": 6, "length": 24, "calibration": str(work / "text.txt"),
                   "check": False} | options
        gemq.quantize(str(model), str(out), **options)
        found[name] = digest(out)
        print(name, found[name], flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        found = digests(Path(work))
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    before = json.loads(given.against.read_text()) if given.against else found
    different = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
    print(f"{len(found)} cases, {len(different)} differ: {', '.join(different) or 'none'}")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
