"""Set-up shared by all tests: no network, quiet libraries, and a tiny model folder to work on."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tiny tensors gain nothing from a second thread, and on a busy machine wait for it; threads are asked for where they
# are what is tested. Before torch is imported, which reads it once; tests hand it to the processes they start
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a pytest that a test starts is no worker of this one
os.environ.pop("PYTEST_XDIST_WORKER", None)

import hypothesis
import pytest
from cpu_kernels import isa  # noqa: F401  (a fixture for all)
from tiny_text import word_tokenizer, words

# the same examples at each run, so that a failure is of the change at hand; `make sweep` draws new ones
hypothesis.settings.register_profile("repeatable", derandomize=True)
if not os.environ.get("GEMQ_NEW_EXAMPLES"):
    hypothesis.settings.load_profile("repeatable")


# files of few long tests: they start first, so that no process is left with one of them at the end
LONGEST = ("test_triton_kernels.py", "test_triton_prefill.py", "test_demo.py", "test_distributed.py", "test_readme.py",
           "test_docs.py", "test_engine_resume.py", "test_listed_families.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the longest tests first, the others as they were."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def exact_activations():
    """The CPU kernels round no activations unless a test says so: tolerances stay those of float32.

    tests/test_cpu_activations.py is about the default.
    """
    from gemq import ops

    before = ops.set_cpu_activations("exact")
    yield
    ops.set_cpu_activations(before)


@pytest.fixture(scope="session")
def tokenizer():
    """A fast tokenizer of whole words, 0..95."""
    return word_tokenizer()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A text of 2,000 words that the tokenizer knows."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words(2000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A tiny full-precision Mixtral with its tokenizer, as a user has it on disk."""
    from tiny_models import tiny_model

    path = tmp_path_factory.mktemp("model") / "tiny-mixtral"
    model = tiny_model("mixtral")
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_folder(model_folder, text_file):
    """Values of QuantizeConfig for the tiny model and its text."""
    return {"model": str(model_folder), "calibration": str(text_file), "samples": 6, "length": 16}


@pytest.fixture
def gemq_run(capsys):
    """Run a command in this process: ``(exit code, standard output, standard error)``."""

    def call(*arguments, debug=False):
        from gemq.cli.run import run

        capsys.readouterr()
        code = run([str(a) for a in arguments], debug)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def quick(text_file):
    """Options of ``gemq quantize`` that make quantizing the tiny model take no time."""
    return ["--calibration", str(text_file), "--samples", "6", "--length", "24"]


def _plugin(monkeypatch, fake, name):
    import importlib
    import sys

    from gemq import serving

    for place, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, place, module)
    monkeypatch.delitem(sys.modules, f"gemq.serving.{name}", raising=False)
    monkeypatch.delattr(serving, name, raising=False)
    yield importlib.import_module(f"gemq.serving.{name}")
    sys.modules.pop(f"gemq.serving.{name}", None)


@pytest.fixture
def vllm(monkeypatch):
    """The plug-in for vLLM, imported over the fake."""
    import fake_vllm

    yield from _plugin(monkeypatch, fake_vllm, "vllm_methods")


@pytest.fixture
def sglang(monkeypatch):
    """The plug-in for SGLang, imported over the fake."""
    import fake_sglang

    yield from _plugin(monkeypatch, fake_sglang, "sglang_methods")
