"""``gemq generate`` and ``gemq chat``: their options."""

from __future__ import annotations

from typing import Annotated

import typer

from gemq.choices import Compile, Dtype
from gemq.cli.settings import ConfigFile

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
DtypeOption = Annotated[Dtype, typer.Option(help="To compute in.")]


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
    dtype: DtypeOption = Dtype.auto,
    config_file: ConfigFile = None,
) -> None:
    """Continue a text with a packed (or full-precision) model, as it is made; several texts, one after the other at
    the end.

    [dim]gemq generate mixtral-2.5 "The capital of France is" --max-new-tokens 40[/dim]
    """
    from gemq.cli.answers import continue_texts

    continue_texts(model, prompt, chat=chat, dtype=dtype, device=device, compile=compile.value,
                   max_new_tokens=max_new_tokens, do_sample=do_sample, temperature=temperature, top_k=top_k,
                   top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, ignore_eos=ignore_eos, seed=seed)


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
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Talk to a model. /clear forgets the conversation, /exit leaves; Ctrl-C stops an answer, at the prompt it leaves.

    [dim]gemq chat mixtral-2.5 --temperature 0.7 --top-p 0.9[/dim]
    """
    from gemq.cli.answers import converse

    converse(model, system, dtype=dtype, device=device, compile=compile.value, max_new_tokens=max_new_tokens,
             do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
             repetition_penalty=repetition_penalty, seed=seed)
