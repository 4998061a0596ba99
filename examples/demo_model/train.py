"""Train the small Mixtral-style MoE model that `gemq demo` quantizes.

Reads the novels in `text/`, trains a byte-level BPE tokenizer and a mixture-of-experts language model of
4.4M parameters on the CPU, and writes the model, a calibration text and a held-out text into the package
(`python/gemq/demo`). Takes about half an hour on two idle CPU cores:

    python examples/demo_model/train.py
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
DEFAULT_OUT = HERE.parents[1] / "python" / "gemq" / "demo"

HELDOUT = 0.04  # the last part of each book, never trained on
CALIBRATION = 0.06  # the part of each book just before that; it belongs to the training text
PASSAGE = 6000  # characters; passages of this length from all books alternate in the two texts
VOCAB = 2048
WINDOW = 256


def split_book(text: str) -> tuple[str, str, str]:
    """Split one book, at paragraph ends, into (training text, its calibration slice, held-out text)."""
    ends = [text.index("\n\n", int(len(text) * (1 - part))) + 2 for part in (HELDOUT + CALIBRATION, HELDOUT)]
    return text[: ends[1]], text[ends[0] : ends[1]], text[ends[1] :]


def mix(slices: list[str]) -> str:
    """Cut the slices into passages and merge them so that every stretch of the result draws on all books."""
    placed = []
    for text in slices:
        passages, current = [], ""
        for paragraph in text.strip().split("\n\n"):
            current += paragraph + "\n\n"
            if len(current) >= PASSAGE:
                passages.append(current)
                current = ""
        if current:
            passages.append(current)
        placed += [((i + 0.5) / len(passages), passage) for i, passage in enumerate(passages)]
    return "".join(passage for _, passage in sorted(placed)).rstrip() + "\n"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; `<s>` is id 0 and `</s>` is id 1."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def build_model() -> MixtralForCausalLM:
    """The untrained model."""
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return MixtralForCausalLM(config)


def forward(model: MixtralForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Next-token cross-entropy of a batch (mean over tokens) and the router logits of each layer."""
    out = model.model(input_ids=ids[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.lm_head(out.last_hidden_state)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), out.router_logits


def expert_load(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Fraction of the routed tokens that each expert of one layer receives; sums to 1."""
    chosen = logits.topk(top_k, dim=-1).indices.flatten()
    return torch.bincount(chosen, minlength=logits.shape[-1]) / chosen.numel()


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch-style balance loss of each layer on its own, summed (1 per layer at perfect balance)."""
    return sum(
        logits.shape[-1] * (expert_load(logits, top_k) * logits.softmax(-1).mean(0)).sum()
        for logits in router_logits
    )


@torch.no_grad()
def evaluate(model: MixtralForCausalLM, ids: torch.Tensor, batch: int = 16) -> tuple[float, torch.Tensor]:
    """Perplexity over windows of 256 tokens, and the load table [layers, experts]."""
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    total, load = 0.0, 0.0
    for rows in windows.split(batch):
        loss, router_logits = forward(model, rows)
        total += loss.item() * len(rows)
        top_k = model.config.num_experts_per_tok
        load += len(rows) * torch.stack([expert_load(logits, top_k) for logits in router_logits])
    return math.exp(total / len(windows)), load / len(windows)


def batches(ids: torch.Tensor, batch: int, generator: torch.Generator):
    """Endless batches of windows: in each pass the windows start at a new offset and come in a new order."""
    while True:
        offset = int(torch.randint(WINDOW, (1,), generator=generator))
        starts = torch.arange(offset, len(ids) - WINDOW - 1, WINDOW)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for rows in starts.split(batch):
            if len(rows) == batch:
                yield ids[rows[:, None] + torch.arange(WINDOW + 1)]


def train(model: MixtralForCausalLM, ids: torch.Tensor, heldout: torch.Tensor, args) -> None:
    """AdamW with linear warm-up and cosine decay; progress every 50 steps, held-out perplexity every 800."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)

    def schedule(step: int) -> float:
        progress = max(0.0, step - args.warmup) / max(1, args.steps - args.warmup)
        return min(1.0, (step + 1) / args.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    stream = batches(ids, args.batch, torch.Generator().manual_seed(args.seed))
    start, shown = time.perf_counter(), 0.0
    for step in range(1, args.steps + 1):
        loss, router_logits = forward(model, next(stream))
        balance = balance_loss(router_logits, model.config.num_experts_per_tok)
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        shown += loss.item() / 50
        if step % 50 == 0:
            spent = time.perf_counter() - start
            left = spent / step * (args.steps - step) / 60
            print(
                f"step {step}/{args.steps}  loss {shown:.3f}  balance {balance / len(router_logits):.3f}  "
                f"{step * args.batch * WINDOW / spent:.0f} tokens/s  {left:.1f} min left",
                flush=True,
            )
            shown = 0.0
        if step % 800 == 0:
            print(f"held-out perplexity {evaluate(model, heldout)[0]:.2f}", flush=True)
    spent = time.perf_counter() - start
    seen = args.steps * args.batch * WINDOW
    print(f"{seen} tokens ({seen / len(ids):.1f} passes), {spent / 60:.1f} min, {seen / spent:.0f} tokens/s")


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
    """Write the bf16 model and its tokenizer into a temporary folder, then move that to the target."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "model.safetensors").chmod(0o644)
    settings = json.loads((temporary / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that all versions know
    (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def main() -> None:
    """Split the text, train the tokenizer and the model, save them and measure what was saved."""
    parser = argparse.ArgumentParser(description="Train the model of `gemq demo`.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for model/ and text/")
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=150, help="steps of linear warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=0.01, help="coefficient of the balance loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    books = [split_book(path.read_text(encoding="utf-8")) for path in sorted((HERE / "text").glob("*.txt"))]
    texts = {"calibration": mix([book[1] for book in books]), "heldout": mix([book[2] for book in books])}
    tokenizer = train_tokenizer([book[0] for book in books])
    ids = torch.tensor([t for book in books for t in (0, *encode(tokenizer, book[0]), 1)])
    heldout = torch.tensor(encode(tokenizer, texts["heldout"]))
    model = build_model()
    print(f"{len(ids)} training tokens, {len(heldout)} held-out tokens, {model.num_parameters()} parameters")
    model.set_experts_implementation("eager")  # on a CPU as fast as "grouped_mm" or faster
    train(model, ids, heldout, args)
    (args.out / "text").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (args.out / "text" / f"{name}.txt").write_text(text, encoding="utf-8")
    save(model, tokenizer, args.out / "model")

    saved = MixtralForCausalLM.from_pretrained(args.out / "model", dtype=torch.float32)
    ids = torch.tensor(encode(AutoTokenizer.from_pretrained(args.out / "model"), texts["heldout"]))
    perplexity, load = evaluate(saved, ids)
    print(f"held-out perplexity of the saved model: {perplexity:.2f}")
    print("share of the routed tokens that each expert gets, in %:")
    for layer, row in enumerate(load.tolist()):
        print(f"  layer {layer}: " + " ".join(f"{100 * share:5.1f}" for share in row))
    if load.min() < 0.03:
        raise SystemExit("an expert gets less than 3% of the routed tokens")


if __name__ == "__main__":
    main()
