"""gpt-oss as it is published: experts in MXFP4, read as the bfloat16 numbers that they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from listed_models import listed_model
from safetensors.torch import load_file, save_file

import gemq
from gemq import loading
from gemq.engine import mxfp4
from gemq.errors import CheckpointError
from gemq.loading import load_unquantized
from gemq.model_config import model_config


def test_the_same_numbers_as_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).repeat(3 * 6 * 2 * 16 // 256 + 1)[: 3 * 6 * 2 * 16].view(3, 6, 2, 16)
    scales = torch.randint(90, 160, (3, 6, 2), dtype=torch.uint8)
    assert torch.equal(mxfp4.dequantize(blocks, scales), convert_moe_packed_tensors(blocks, scales))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> tuple[Path, Path]:
    """A model in MXFP4, and the same numbers in bfloat16."""
    path = tmp_path_factory.mktemp("mxfp4")
    packed, plain = path / "mxfp4", path / "bf16"
    listed_model("gpt_oss").to(torch.bfloat16).save_pretrained(plain)
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        shape = mxfp4.shapes(list(tensors[name].shape))
        blocks = torch.randint(0, 256, shape["_blocks"], dtype=torch.uint8)
        scales = torch.randint(120, 125, shape["_scales"], dtype=torch.uint8)
        del stored[name]
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = mxfp4.dequantize(blocks, scales)
    shutil.copytree(plain, packed)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (packed / "config.json").write_text(json.dumps(config))
    for folder in (packed, plain):
        tokenizer.save_pretrained(folder)
    return packed, plain


def test_quantized_to_the_same_bytes(folders, tmp_path, text_file) -> None:
    made = []
    for folder in folders:
        gemq.quantize(str(folder), str(tmp_path / folder.name), bits=2.0, calibration=str(text_file), samples=4,
                      length=12, recipe="fast", device="cpu")
        made.append((tmp_path / folder.name / "model.safetensors").read_bytes())
    assert made[0] == made[1]
    assert gemq.from_pretrained(tmp_path / "mxfp4").config.quantization_config.packed.budget == 2.0


def test_loaded_whole(folders, monkeypatch) -> None:
    ids, read = torch.randint(0, 96, (2, 9)), []
    monkeypatch.setattr(loading, "model_config", lambda *args: read.append(args[0]) or model_config(*args))
    one, other = (load_unquantized(str(folder), "bfloat16").eval() for folder in folders)
    assert read == [str(folder) for folder in folders], "each config once"
    with torch.no_grad():
        assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.parametrize("change, said", [
    (lambda t, name: t.pop(f"{name}_scales"), "must have blocks and scales"),
    (lambda t, name: t.update({f"{name}_scales": t[f"{name}_scales"][:, :1].contiguous()}), "does not fit its config"),
    (lambda t, name: t.update({f"{name}_blocks": t[f"{name}_blocks"].to(torch.int16)}), "expected U8"),
])
def test_parts_that_do_not_fit(folders, tmp_path, text_file, change, said) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(folders[0], folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors, "model.layers.1.mlp.experts.down_proj")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        gemq.quantize(str(folder), str(tmp_path / "out"), bits=2.0, calibration=str(text_file), samples=4, length=12,
                      device="cpu")
    assert not (tmp_path / "out").exists()
