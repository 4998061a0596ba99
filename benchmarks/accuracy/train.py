"""Train a small Mixture-of-Experts language model on real text, for the accuracy study.

    python benchmarks/accuracy/train.py mixtral books/*.txt --out models/mixtral-20m --steps 6000
    python benchmarks/accuracy/train.py qwen3_moe wiki.txt docs.jsonl#text --out models/qwen3-40m --device cuda

The architectures are transformers' own (``architectures.py``). Of every document the last 4% are held out and the 6%
before them are kept as calibration text (they stay in the training text); both are written beside the model. Routers
are balanced layer by layer: a loss that pools all layers, as transformers' does, lets experts of one layer die while
the pool looks even. The same seed gives the same model on the same machine; an interrupted run goes on from its last
saved state with the same batches, and ends with the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from architectures import ARCHITECTURES, Size, build
from torch import Tensor, nn

from gemq.algorithms.calibration import documents, parse_sources
from gemq.models import MoeModel, describe

HELDOUT, CALIBRATION, PASSAGE = 0.04, 0.06, 6000


def split(text: str) -> tuple[str, str, str]:
    """``(training text, its calibration part, held-out text)`` of a document, cut at line ends where there are any."""
    cuts = []
    for part in (HELDOUT + CALIBRATION, HELDOUT):
        at = int(len(text) * (1 - part))
        line = text.find("\n", at, at + PASSAGE)
        cuts.append(at if line < 0 else line + 1)
    return text[: cuts[1]], text[cuts[0] : cuts[1]], text[cuts[1] :]


def mix(texts: list[str]) -> str:
    """Passages of all texts merged so that every stretch of the result draws on all of them."""
    placed = []
    for text in texts:
        passages = [text[at : at + PASSAGE] for at in range(0, len(text), PASSAGE)]
        placed += [((i + 0.5) / len(passages), passage) for i, passage in enumerate(passages)]
    return "\n".join(passage.strip() for _, passage in sorted(placed)) + "\n"


def train_tokenizer(texts: list[str], vocabulary: int):
    """A byte-level BPE tokenizer; ``<s>`` is id 0 and ``</s>`` id 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    ))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def expert_load(logits: Tensor, top_k: int) -> Tensor:
    """Share of a layer's routed tokens by expert ``[E]``; sums to 1."""
    chosen = logits.topk(top_k, dim=-1).indices.flatten()
    return torch.bincount(chosen, minlength=logits.shape[-1]) / chosen.numel()


def balance_loss(logits: list[Tensor], top_k: int) -> Tensor:
    """Switch Transformer's balance loss of each layer by itself (arXiv 2101.03961, Eq. 4), mean over layers; 1 if even.

    ``logits`` ``[T, E]`` per layer.
    """
    terms = [x.shape[-1] * (expert_load(x, top_k) * x.float().softmax(-1).mean(0)).sum() for x in logits]
    return torch.stack(terms).mean()


@contextmanager
def router_logits(moe: MoeModel) -> Iterator[list[Tensor]]:
    """A list that every forward pass refills with each layer's router logits ``[T, E]``, with their gradients."""
    found: list[Tensor] = []

    def seen(module: nn.Module, args: tuple) -> None:
        if module is moe.moe[0].router:
            found.clear()
        found.append(nn.functional.linear(args[0].reshape(-1, moe.hidden), module.weight))

    with ExitStack() as stack:
        for layer in moe.moe:
            stack.callback(layer.router.register_forward_pre_hook(seen).remove)
        yield found


def batch_at(ids: Tensor, step: int, batch: int, window: int, seed: int) -> Tensor:
    """The batch ``[batch, window + 1]`` of a step: windows of a pass start at the pass's offset, in its own order."""
    if len(ids) < (batch + 1) * window + 1:
        raise ValueError(f"the text has {len(ids)} tokens, one batch of {batch} windows of {window} needs "
                         f"{(batch + 1) * window + 1}")
    per_pass = ((len(ids) - window - 1) // window) // batch
    passes, within = divmod(step, per_pass)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + passes)
    offset = int(torch.randint(window, (1,), generator=generator))
    starts = offset + window * torch.randperm((len(ids) - window - 1) // window, generator=generator)
    rows = starts[within * batch : (within + 1) * batch].clamp(max=len(ids) - window - 1)
    return ids[rows[:, None] + torch.arange(window + 1)]


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to 2% of the peak."""
    progress = max(0.0, step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * min(1.0, (step + 1) / options.warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def evaluate(moe: MoeModel, ids: Tensor, window: int, limit: int = 256, batch: int = 16) -> tuple[float, Tensor]:
    """Perplexity over the first windows of a held-out text, and the load ``[L, E]`` of the experts on it."""
    windows = ids[: len(ids) // window * window].view(-1, window)[:limit]
    device, total, load = next(moe.model.parameters()).device, 0.0, []
    moe.model.eval()
    with router_logits(moe) as logits:
        for rows in windows.split(batch):
            rows = rows.to(device)
            out = moe.model(input_ids=rows, use_cache=False).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(out.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
            total += float(loss)
            load.append(len(rows) * torch.stack([expert_load(x, moe.top_k) for x in logits]))
    moe.model.train()
    return math.exp(total / (len(windows) * (window - 1))), sum(load) / len(windows)


def _optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)


def _save_state(path: Path, content: dict) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def train(moe: MoeModel, ids: Tensor, heldout: Tensor, options: argparse.Namespace, state: Path) -> None:
    """AdamW on the cross-entropy and the balance loss; the state is saved every ``options.save_every`` steps."""
    model, device = moe.model.train(), next(moe.model.parameters()).device
    optimizer, first = _optimizer(model, options), 0
    if state.is_file():
        held = torch.load(state, map_location=device, weights_only=True)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        first = held["step"]
        print(f"going on from step {first}", flush=True)
    start, shown = time.perf_counter(), 0.0
    with router_logits(moe) as logits:
        for step in range(first, options.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options)
            rows = batch_at(ids, step, options.batch, options.window, options.seed).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
            loss = nn.functional.cross_entropy(out.flatten(0, 1), rows[:, 1:].flatten())
            balance = balance_loss(logits, moe.top_k)
            (loss + options.balance * balance).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            shown += float(loss.detach())
            done = step + 1
            if done % options.log_every == 0:
                rate = (done - first) * rows[:, 1:].numel() / (time.perf_counter() - start)
                left = (options.steps - done) * rows[:, 1:].numel() / rate / 60
                print(f"step {done}/{options.steps}  loss {shown / options.log_every:.3f}  balance {balance:.3f}  "
                      f"{rate:.0f} tokens/s  {left:.1f} min left", flush=True)
                shown = 0.0
            if done % options.save_every == 0 and done < options.steps:
                _save_state(state, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done})
                print(f"held-out perplexity {evaluate(moe, heldout, options.window)[0]:.2f}", flush=True)


def save(model: nn.Module, tokenizer, target: Path) -> None:
    """The bf16 model and its tokenizer, written beside ``target`` and moved there."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    settings = json.loads((temporary / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("text", nargs="+", help="files as gemq takes them: .txt, .jsonl#field")
    parser.add_argument("--out", type=Path, required=True, help="folder to write model/ and text/ into")
    parser.add_argument("--hidden", type=int, default=Size.hidden)
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--intermediate", type=int, help="width of an expert")
    parser.add_argument("--heads", type=int, default=Size.heads)
    parser.add_argument("--vocabulary", type=int, default=Size.vocabulary)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=0.01, help="of the balance loss; 0 lets experts die")
    parser.add_argument("--least-share", type=float, default=0.2, help="of an even load, that each expert must get")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--log-every", type=int, default=50)
    return parser.parse_args(arguments)


def _refuse_other_options(path: Path, options: argparse.Namespace) -> None:
    """Refuse to continue a run with options other than those it was begun with."""
    given = {k: str(v) for k, v in vars(options).items() if k not in ("out", "log_every", "save_every", "device")}
    if path.is_file():
        before = json.loads(path.read_text())
        different = [f"{k}: {before.get(k)} before, {v} now" for k, v in given.items() if before.get(k) != v]
        if different:
            raise ValueError(f"{path.parent} was begun with other options ({'; '.join(different)}); remove it")
    path.write_text(json.dumps(given, indent=1) + "\n")


def run(options: argparse.Namespace) -> float:
    """Train and save; the held-out perplexity of the saved weights. ``ValueError`` if an expert is hardly used."""
    work = options.out / ".training"
    work.mkdir(parents=True, exist_ok=True)
    _refuse_other_options(work / "options.json", options)
    found = [d for text in options.text for source in parse_sources(text) for d in documents(source)]
    parts = [split(d) for d in found]
    texts = {"calibration": mix([p[1] for p in parts]), "heldout": mix([p[2] for p in parts])}
    tokenizer = train_tokenizer([p[0] for p in parts], options.vocabulary)

    def encode(text: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    ids = torch.tensor([t for p in parts for t in (0, *encode(p[0]), 1)])
    heldout = torch.tensor(encode(texts["heldout"]))
    torch.manual_seed(options.seed)
    size = Size(options.hidden, options.layers, options.experts, options.top_k, options.intermediate, options.heads,
                len(tokenizer))
    model = build(options.architecture, size).to(options.device)
    moe = describe(model)
    print(f"{len(ids)} training tokens, {len(heldout)} held out, {model.num_parameters() / 1e6:.1f} M parameters, "
          f"{len(moe.moe)} MoE layers of {moe.num_experts} experts, {moe.top_k} used", flush=True)
    train(moe, ids, heldout, options, work / "state.pt")
    (options.out / "text").mkdir(exist_ok=True)
    for name, text in texts.items():
        (options.out / "text" / f"{name}.txt").write_text(text, encoding="utf-8")
    save(model, tokenizer, options.out / "model")
    # the saved weights, in bf16
    perplexity, load = evaluate(describe(model.float()), heldout, options.window)
    even = 1 / moe.num_experts
    print(f"held-out perplexity {perplexity:.2f}; share of an even load by expert, lowest to highest: "
          f"{float(load.min()) / even:.2f} to {float(load.max()) / even:.2f}", flush=True)
    if float(load.min()) < options.least_share * even:
        raise ValueError(f"an expert gets {float(load.min()) / even:.2f} of an even load, below --least-share "
                         f"{options.least_share:g}; raise --balance or train longer")
    shutil.rmtree(work)
    return perplexity


def main() -> None:
    """Run, and print an error in one line."""
    try:
        run(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
