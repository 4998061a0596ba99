"""The answers of the real vLLM to the jobs of ``serve_check.py``; runs in vLLM's own environment.

    python serve_vllm.py JOBS.json

A job is ``{"folder", "prompts", "tokens", "streams", "options", "out"}``, and with ``"fork"`` it runs in a fork of this
process, which has imported vLLM. Its answers go to ``out``: by number of streams a list of ``{"tokens", "logprobs",
"prompt_logprobs", "cached"}``, one for each prompt; of a job that failed ``{"error": text}``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def sampling(tokens: int, prompt: bool) -> Any:
    """Greedy parameters for exactly ``tokens`` tokens, with log-probabilities, if asked of the prompt too."""
    from vllm import SamplingParams

    asked = {"prompt_logprobs": 0} if prompt else {}
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False, **asked)


def answer(output: Any) -> dict[str, list]:
    """Result of one request."""
    done, prompt = output.outputs[0], output.prompt_token_ids
    given = output.prompt_logprobs or []
    return {
        "tokens": list(done.token_ids),
        "logprobs": [step[token].logprob for step, token in zip(done.logprobs, done.token_ids, strict=True)],
        "cached": output.num_cached_tokens or 0,
        "prompt_logprobs": [step[token].logprob for step, token in zip(given[1:], prompt[1:], strict=False)],
    }


def answers(job: dict) -> dict[str, list]:
    """The job's prompts, by number of streams; a second time without the prompt's log-probabilities, with which vLLM
    reads no cached prefix."""
    from vllm import LLM

    llm = LLM(model=job["folder"], **job["options"])
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    found: dict[str, list] = {}
    for streams in job["streams"]:
        for name, asked in ((str(streams), True), (f"{streams} again", False)):
            parts = [prompts[at : at + streams] for at in range(0, len(prompts), streams)]
            outputs = [o for part in parts for o in llm.generate(part, sampling(job["tokens"], asked), use_tqdm=False)]
            found[name] = [answer(output) for output in outputs]
    return found


def run(job: dict) -> int:
    """Do a job and write its file; 1 if it failed."""
    try:
        result: dict = answers(job)
    except BaseException as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"[:500]}
    Path(job["out"]).write_text(json.dumps(result), encoding="utf-8")
    return int("error" in result)


def main() -> int:
    """Run the jobs one after the other."""
    import vllm  # noqa: F401  (once, for all forks)

    failed = 0
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if not job.get("fork"):
            failed |= run(job)
            continue
        child = os.fork()
        if child == 0:
            code = run(job)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        failed |= os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
