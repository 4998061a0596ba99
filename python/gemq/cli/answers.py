"""Output of ``gemq generate`` and ``gemq chat``: texts as they are made, and figures after them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import gemq
from gemq.cli import display
from gemq.cli.escapes import printable
from gemq.generation import ContinuationStreamer, Conversation, Decoding, Generation, GenerationOptions, stream_row
from gemq.loading import load_any, load_tokenizer


def continue_texts(model: str, prompt: Sequence[str], *, chat: bool, **options: Any) -> None:
    """Show the continuation of one text as it is made, of several at the end; ``options`` as for
    :func:`gemq.generate`."""
    def streamer(tokenizer: Any) -> _Shown:
        # only now, after all that could fail, does anything go to standard output
        if not chat:
            _write(prompt[0], end="")
        return _Shown(tokenizer)

    one = len(prompt) == 1
    found = gemq.generate(model, list(prompt), chat=chat, streamer=streamer if one else None, **options)
    assert isinstance(found, list)
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


def converse(model: str, system: str | None, *, dtype: str, device: str | None, compile: str, **options: Any) -> None:
    """Answer the lines of standard input until it ends; ``options`` are those of
    :class:`gemq.generation.GenerationOptions`."""
    chosen = GenerationOptions(**options)
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
            step = _answer(loaded, conversation, line, chosen, compile)
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
    model: Any, conversation: Conversation, line: str, options: GenerationOptions, compile: str
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
    said, steps = _Said(conversation), list[tuple[str, str | None]]()

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
        self.conversation, self.waiting = conversation, ""
        self.shown: list[str] = []
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
