"""``gemq generate`` and ``gemq chat``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

import gemq
from gemq.cli import display
from gemq.cli.plain import printable
from gemq.cli.settings import ConfigFile
from gemq.generation import ContinuationStreamer, Conversation, Decoding, Generation, GenerationOptions, stream_row
from gemq.pipeline import load_any, load_tokenizer


class Compile(StrEnum):
    """Ways to run a decoding step."""

    auto = "auto"
    none = "none"
    compile = "compile"
    graph = "graph"


Model = Annotated[str, typer.Argument(help="Packed checkpoint, or a full-precision model.")]
NewTokens = Annotated[int, typer.Option(help="At most this many.", min=1)]
Sample = Annotated[bool | None, typer.Option(
    "--do-sample/--no-do-sample", help="Sample, or take the best token (default: sample where a temperature is given).",
)]
Temperature = Annotated[float | None, typer.Option(help="Sample with it; 0 or none is greedy.")]
TopK = Annotated[int, typer.Option(help="Sample among the k best tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Sample among the best tokens that reach this probability.")]
MinP = Annotated[float, typer.Option(help="Sample among tokens this many times as probable as the best.")]
Penalty = Annotated[float, typer.Option(help="Above 1: against repetition.")]
Seed = Annotated[int, typer.Option(help="Of the samples.")]
Mode = Annotated[Compile, typer.Option(help="graph and compile: see docs; auto is graph on CUDA, else none.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 (default: CUDA where there is one).")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Argument(help="Text to continue; several are decoded as one batch, up to 64.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the text through the chat template as a message.")] = False,
    max_new_tokens: NewTokens = 64,
    do_sample: Sample = None,
    temperature: Temperature = None,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
    seed: Seed = 0,
    compile: Mode = Compile.auto,
    device: Device = None,
    dtype: Dtype = "auto",
    config_file: ConfigFile = None,
) -> None:
    """Continue a text with a packed (or full-precision) model, as it is made; several texts, one after the other at
    the end.

    [dim]gemq generate mixtral-2.5 "The capital of France is" --max-new-tokens 40[/dim]
    """
    def streamer(tokenizer):
        # only now, after all that could fail, does anything go to standard output
        if not chat:
            _write(prompt[0], end="")
        return _Shown(tokenizer)

    one = len(prompt) == 1
    found = gemq.generate(
        model, prompt, chat=chat, max_new_tokens=max_new_tokens, do_sample=do_sample, temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, ignore_eos=ignore_eos, seed=seed,
        compile=compile.value, dtype=dtype, device=device, streamer=streamer if one else None,
    )
    if not one:
        for text, result in zip(prompt, found, strict=True):
            _write(("" if chat else text) + result.text)
    _show_figures(found)


class _Shown(ContinuationStreamer):
    """Prints a continuation: a model may write anything, also codes that a terminal obeys."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


def _write(text: str, end: str = "\n") -> None:
    display.output().print(printable(text), end=end, markup=False, highlight=False, soft_wrap=True)


def _show_figures(rows: list[Generation]) -> None:
    """Sums over the rows of the batch, which share their seconds."""
    prompts, new, timing = sum(r.prompt_tokens for r in rows), sum(r.new_tokens for r in rows), rows[0].timing
    lines = [f"prompt: {prompts} tokens, {prompts / timing.prefill:,.1f} tokens/s"]
    # the first new token of a row comes with its prompt
    rate = f", {(new - len(rows)) / timing.decode:,.1f} tokens/s after the first" if timing.steps else ""
    lines.append(f"generation: {new} tokens{rate}; {rows[0].seconds:.2f} s with the prompt")
    if rows[0].peak_bytes is not None:
        lines.append(f"peak memory: {display.size(rows[0].peak_bytes)}")
    if rows[0].step is not None:
        lines.append(_step_line(rows[0].step, rows[0].step_reason))
    display.notes().print("\n".join(lines), style="dim", highlight=False, markup=False)


def _step_line(step: str, reason: str | None) -> str:
    """``decoding step: native``, or another with what kept the better one from running."""
    names = {"transformers": "transformers' own"}
    return f"decoding step: {names.get(step, step)}" + (f" ({printable(reason, keep='')})" if reason else "")


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: NewTokens = 512,
    do_sample: Sample = None,
    temperature: Temperature = None,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    compile: Mode = Compile.auto,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Talk to a model. /clear forgets the conversation, /exit leaves; Ctrl-C stops an answer, at the prompt it leaves.

    [dim]gemq chat mixtral-2.5 --temperature 0.7 --top-p 0.9[/dim]
    """
    options = GenerationOptions(
        max_new_tokens=max_new_tokens, do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, seed=seed,
    )
    conversation, told = Conversation(load_tokenizer(model), system), set()
    loaded = load_any(model, dtype, device)
    note = display.notes()
    if not conversation.templated:
        note.print("the tokenizer has no chat template: talking in plain User: and Assistant: lines", style="dim")
    note.print("/clear forgets, /exit leaves, Ctrl-C stops an answer", style="dim")
    while (line := _ask()) is not None:
        if line == "/exit":
            return
        if line == "/clear":
            conversation.clear()
            note.print("forgotten", style="dim")
        elif line.startswith("/"):
            note.print(f"unknown command {line.split()[0]}: /clear or /exit", style="dim", markup=False)
        elif line:
            step = _answer(loaded, conversation, line, options, compile.value)
            if step is not None and step not in told:
                told.add(step)
                note.print(_step_line(*step), style="dim", highlight=False, markup=False)


def _ask() -> str | None:
    """The user's next line; None at the end of the input."""
    if sys.stdin.isatty():
        display.notes().print("> ", end="", style="bold")
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(
    model, conversation: Conversation, line: str, options: GenerationOptions, compile: str
) -> tuple[str, str | None] | None:
    """Show what the model answers; the step that decoded it, with a reason, where one was taken."""
    conversation.add("user", line)
    tokens = conversation.tokens()
    room = model.config.get_text_config().max_position_embeddings - len(tokens)
    if room < 1:
        conversation.drop_last()
        display.errors().print(
            f"the conversation has {len(tokens)} tokens, the model {len(tokens) + room} positions: /clear to go on",
            style="bold red",
        )
        return None
    limited = GenerationOptions(**asdict(options) | {"max_new_tokens": min(options.max_new_tokens, room)})
    said, steps = _Said(conversation), []

    def at_end(decoding: Decoding) -> None:
        if decoding.step_kind is not None:
            steps.append((decoding.step_kind, decoding.step_reason))

    pieces = stream_row(model, conversation.tokenizer, tokens, limited, compile=compile, at_end=at_end)
    try:
        for piece in pieces:
            if said.hear(piece):
                break
    except KeyboardInterrupt:
        display.notes().print("\nstopped; Ctrl-C again leaves", style="dim")
    finally:
        pieces.close()
    conversation.add("assistant", said.finish())
    return steps[0] if steps else None


class _Said:
    """An answer as it arrives: shown at once, except for what could be the start of a stop text."""

    def __init__(self, conversation: Conversation):
        self.conversation, self.shown, self.waiting = conversation, [], ""
        self.held = max((len(s) for s in conversation.stop), default=0)

    def hear(self, piece: str) -> bool:
        """Take a piece; tell if the answer is over. A stop text begins in what waits, or in the piece."""
        text, over = self.conversation.cut(self.waiting + piece)
        upto = len(text) if over else max(len(text) - self.held, 0)
        self._show(text[:upto])
        self.waiting = text[upto:]
        return over

    def _show(self, text: str) -> None:
        if text:
            self.shown.append(text)
            sys.stdout.write(printable(text))
            sys.stdout.flush()

    def finish(self) -> str:
        """Show the rest and return the whole answer."""
        self._show(self.waiting)
        self.waiting = ""
        sys.stdout.write("\n")
        sys.stdout.flush()
        return "".join(self.shown).strip()
