"""Compare the predictions of `gemq plan` with `gemq quantize`: memory by stage, seconds, and bytes of the checkpoint.

    python benchmarks/plan_accuracy.py --json benchmarks/results/plan-<date>.json

Three random models on the CPU, one that weights dominate, one that activations do, one with shared experts, each by
both engines and quantized in a process of its own, whose resident memory is read every 3 ms.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from record import conditions

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "python" / "gemq" / "demo"
_DEEPSEEK = {
    "n_shared_experts": 2, "kv_lora_rank": 128, "q_lora_rank": None, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
    "v_head_dim": 64, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
}
# model type, config, windows, tokens a window, windows a batch
CASES = {
    "weights": ("mixtral", {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
                            "num_local_experts": 8, "num_attention_heads": 8, "num_key_value_heads": 4}, 8, 256, 4),
    "activations": ("mixtral", {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8,
                                "num_local_experts": 8, "num_attention_heads": 8, "num_key_value_heads": 4},
                    32, 512, 4),
    "shared experts": ("deepseek_v2", _DEEPSEEK | {
        "hidden_size": 384, "intermediate_size": 1024, "moe_intermediate_size": 256, "num_hidden_layers": 4,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "num_attention_heads": 8, "num_key_value_heads": 8,
    }, 16, 512, 4),
}  # fmt: skip


def save_random(name: str, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    kind, sizes, *_ = CASES[name]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def one(name: str, keep: str, folder: Path) -> dict:
    """Predict, then quantize and watch; in this process."""
    import torch

    import gemq
    from gemq.algorithms.method import MethodConfig
    from gemq.loading import check_model
    from gemq.pipeline import QuantizeConfig
    from gemq.planning import PlanConfig, make_plan, this_machine

    save_random(name, folder / "model")
    *_, samples, length, batch = CASES[name]
    method = MethodConfig(batch_size=batch)
    machine = this_machine(torch.device("cpu"), folder, torch.float32, rates=True)
    plan = make_plan(check_model(str(folder / "model")), PlanConfig(method, samples, length, keep), machine)
    stage, peaks = ["load"], {}

    def watch() -> None:
        while True:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            peaks[stage[0]] = max(peaks.get(stage[0], 0), pages * os.sysconf("SC_PAGESIZE"))
            time.sleep(0.003)

    threading.Thread(target=watch, daemon=True).start()
    config = QuantizeConfig(str(folder / "model"), str(folder / "out"), str(DEMO / "text" / "calibration.txt"),
                            samples, length, method=method, check=False, keep=keep)
    (found,) = gemq.quantize(config, progress=lambda name, done, total: stage.__setitem__(0, name))
    return {
        "case": name, "keep": keep, "parameters": plan.parts.parameters, "tokens": samples * length,
        "predicted": {
            "memory": {k: sum(need.host.values()) for k, need in plan.stages.items()}, "seconds": plan.seconds,
            "files": plan.outputs[2.5].files,
        },
        "measured": {"memory": peaks, "seconds": found.seconds, "files": found.bytes},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", choices=CASES, help="one case, in this process")
    parser.add_argument("--keep", choices=("layer", "model"), default="layer")
    options = parser.parse_args()
    if options.case:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(one(options.case, options.keep, Path(folder))))
        return
    rows = []
    for name, keep in itertools.product(CASES, ("layer", "model")):
        command = [sys.executable, __file__, "--case", name, "--keep", keep]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        peaks = {which: max(rows[-1][which]["memory"].values()) / 1e9 for which in ("predicted", "measured")}
        seconds = {which: sum(rows[-1][which]["seconds"].values()) for which in ("predicted", "measured")}
        files = {which: rows[-1][which]["files"] for which in ("predicted", "measured")}
        told = [f"{what} {found['predicted']:.4g} predicted, {found['measured']:.4g} measured"
                for what, found in (("GB", peaks), ("seconds", seconds), ("bytes of files", files))]
        print(f"{name}, {keep}: {'; '.join(told)}")
    if options.json:
        result = {"conditions": conditions("python benchmarks/plan_accuracy.py"), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
