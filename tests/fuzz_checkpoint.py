"""Mutations of a valid checkpoint: it loads with the weights it was saved with, or a gemq error says what is wrong.

``make fuzz SECONDS=3600`` runs cases until the time is up, ``python tests/fuzz_checkpoint.py --seed N`` one of them.
Every case is a number: the same number is the same mutation. Three kinds, by what they hold:

* ``readers``: the header reader accepts no file that the safetensors library refuses, and reads the same from it.
* ``load``: mutations of header, index and config. What loads has, bit for bit, the weights that were saved. (A payload
  bit, or two equal tensors exchanged, is what only the SHA-256 sums can tell: the next kind.)
* ``verified``: any mutation of any file, loaded with ``verify=True``: an error, or the same model.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from copy import deepcopy
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import gemq
from gemq.checkpoint import save_packed
from gemq.errors import GemqError
from gemq.integrity import INDEX_FILE, read_header

KINDS = ("readers", "load", "verified")
# seconds that a case may take
LONGEST = 30.0
ODD = (
    None, True, False, 0, -1, 1, 2, 3, 9, 48, 2**31, 2**63, 2**64, -(2**63), 10**9, 10**30, 0.5, float("nan"),
    float("inf"), "", "x", "../x.safetensors", "/etc/passwd", "\x1b[2J", "\u202e", "F16", "U8", [], [0], [-1],
    [2**62] * 4, {}, {"a": 1}, [[[[]]]], "9" * 5000, "\x00", "a" * 10_000,
)  # fmt: skip


def make_originals(folder: Path) -> tuple[Path, Path]:
    """``(a checkpoint of one file, one of shards)`` of a tiny model."""
    from packed_models import quantized

    made = quantized("mixtral", tune=False)
    single = save_packed(made.packed, made.config, folder / "single", dtype=torch.bfloat16)
    return single, save_packed(made.packed, made.config, folder / "sharded", max_shard_size="30KB")


class Fuzzer:
    """Runs cases on copies of the originals in ``folder``; ``outcomes`` counts what came of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.originals = make_originals(folder)
        self.weights = [dict(gemq.from_pretrained(path).state_dict()) for path in self.originals]
        self.outcomes: Counter[str] = Counter()

    def run(self, seed: int) -> str:
        """Case ``seed``: what came of it. Raises ``AssertionError`` for what must not be."""
        pick = random.Random(seed)
        kind = KINDS[seed % len(KINDS)]
        which = pick.randrange(2)
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.originals[which], copy)
        started = time.perf_counter()
        try:
            outcome = getattr(self, f"_{kind}")(pick, copy, which)
        except GemqError as error:
            assert str(error).strip(), f"case {seed}: an error without a word"
            outcome = "refused"
        except Exception as error:
            raise AssertionError(f"case {seed} ({kind}): {type(error).__name__}: {error}") from error
        took = time.perf_counter() - started
        assert took < LONGEST, f"case {seed} ({kind}) took {took:.0f} s"
        self.outcomes[f"{kind}: {outcome}"] += 1
        return outcome

    def _readers(self, pick: random.Random, copy: Path, which: int) -> str:
        file = pick.choice(sorted(copy.glob("*.safetensors")))
        for _ in range(pick.randint(1, 3)):
            pick.choice((mutate_header, mutate_bytes, mutate_length))(pick, file)
        found = read_header(file)
        try:
            with safe_open(file, "pt") as theirs:
                slices = {name: theirs.get_slice(name) for name in found}
                wanted = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
                assert set(theirs.keys()) == set(found)
        except SafetensorError as error:
            raise AssertionError(f"read, but the safetensors library refuses it: {error}") from error
        assert {name: (entry.dtype, entry.shape) for name, entry in found.items()} == wanted
        return "read"

    def _load(self, pick: random.Random, copy: Path, which: int) -> str:
        choices = [mutate_config, mutate_one_header, mutate_quantization]
        if which:
            choices.append(mutate_index)
        pick.choice(choices)(pick, copy)
        return self._same_weights(copy, which, verify=False)

    def _verified(self, pick: random.Random, copy: Path, which: int) -> str:
        file = pick.choice(sorted(copy.iterdir()))
        choices = [mutate_bytes, mutate_length, exchange]
        choices += [mutate_json] if file.suffix == ".json" else [mutate_header, mutate_payload]
        pick.choice(choices)(pick, file)
        return self._same_weights(copy, which, verify=True)

    def _same_weights(self, copy: Path, which: int, verify: bool) -> str:
        model = gemq.from_pretrained(copy, verify=verify)
        state, wanted = model.state_dict(), self.weights[which]
        assert state.keys() == wanted.keys(), f"other tensors: {sorted(state.keys() ^ wanted.keys())[:3]}"
        for name, value in wanted.items():
            # a config may ask for another dtype of what is not quantized
            got = state[name] if state[name].dtype == value.dtype else state[name].to(value.dtype)
            close = state[name].dtype != value.dtype and torch.allclose(got, value, rtol=0.01, atol=1e-3)
            assert torch.equal(got, value) or close, f"{name} has other values than were saved"
        return "loaded"


# mutations of a file


def mutate_bytes(pick: random.Random, file: Path) -> None:
    """A few bytes of the file changed, put in or taken out; more often near its beginning."""
    raw = bytearray(file.read_bytes())
    for _ in range(pick.randint(1, 4)):
        at = pick.randrange(max(1, min(len(raw), pick.choice((8, 64, 2000, 10**9)))))
        change = pick.randrange(4)
        if change == 0 and raw:
            raw[at] ^= 1 << pick.randrange(8)
        elif change == 1 and raw:
            raw[at] = pick.choice(b'\0\xff{}[]",:0-9e')
        elif change == 2:
            raw[at:at] = bytes(pick.choices(b'{}[]",:0\xff\0', k=pick.randint(1, 9)))
        else:
            del raw[at : at + pick.randint(1, 9)]
    file.write_bytes(raw)


def mutate_length(pick: random.Random, file: Path) -> None:
    """Cut short, made longer, or doubled."""
    raw = file.read_bytes()
    cut = raw[: pick.randrange(len(raw) + 1)]
    file.write_bytes(pick.choice((cut, raw + b"\0" * pick.randint(1, 100), raw + raw, b"")))


def mutate_payload(pick: random.Random, file: Path) -> None:
    """One bit of the tensors."""
    raw = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    if 8 + length < len(raw):
        raw[pick.randrange(8 + length, len(raw))] ^= 1 << pick.randrange(8)
    file.write_bytes(raw)


def exchange(pick: random.Random, file: Path) -> None:
    """The contents of two files of the folder."""
    other = pick.choice(sorted(file.parent.iterdir()))
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)


def mutate_header(pick: random.Random, file: Path) -> None:
    """The JSON of a safetensors header, with its length made to fit."""
    raw = file.read_bytes()
    try:
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
    except (struct.error, ValueError):
        return  # an earlier mutation broke it already
    text = json.dumps(mutated(pick, header)).encode()
    text += b" " * (-len(text) % pick.choice((1, 8)))
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def mutate_json(pick: random.Random, file: Path) -> None:
    """The values, keys and structure of a JSON file."""
    file.write_text(json.dumps(mutated(pick, json.loads(file.read_text()))))


def mutated(pick: random.Random, data):
    """``data`` with something inside replaced, removed, renamed or added."""
    for _ in range(pick.randint(1, 2)):
        owner, key = data, None
        for _ in range(pick.randint(1, 4)):
            inner = owner if key is None else owner[key]
            if not isinstance(inner, (dict, list)) or not inner:
                break
            owner, key = inner, pick.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if key is None:
            return _odd(pick)
        change = pick.randrange(4)
        if change == 0:
            owner.pop(key)
        elif change == 1 and isinstance(owner, dict):
            owner[pick.choice((str(key) + "x", "", "__metadata__", "\x1b[2J"))] = owner.pop(key)
        elif change == 2 and type(owner[key]) is int:
            owner[key] += pick.choice((-1, 1, 8, -8, 2**32, 2**63))
        else:
            owner[key] = _odd(pick)
    return data


def _odd(pick: random.Random):
    """One of ``ODD``; a copy, because the next change may be inside it, and no case may depend on those before."""
    return deepcopy(pick.choice(ODD))


# mutations of a folder


def mutate_config(pick: random.Random, folder: Path) -> None:
    """Any part of config.json, or its bytes."""
    pick.choice((mutate_json, mutate_json, mutate_bytes))(pick, folder / "config.json")


def mutate_quantization(pick: random.Random, folder: Path) -> None:
    """Mutate gemq's own part of config.json."""
    file = folder / "config.json"
    data = json.loads(file.read_text())
    data["quantization_config"] = mutated(pick, data["quantization_config"])
    file.write_text(json.dumps(data))


def mutate_index(pick: random.Random, folder: Path) -> None:
    """The index of the shards."""
    pick.choice((mutate_json, mutate_bytes))(pick, folder / INDEX_FILE)


def mutate_one_header(pick: random.Random, folder: Path) -> None:
    """The header of one weight file."""
    mutate_header(pick, pick.choice(sorted(folder.glob("*.safetensors"))))


def main() -> int:
    """Run cases until the time is up, or one."""
    import resource
    import warnings

    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--first", type=int, default=None, help="number of the first case (default: from the clock)")
    parser.add_argument("--seed", type=int, help="run this case alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # taking memory for a size that a header claims is a finding, not a reason to stop the machine
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        if options.seed is not None:
            print(options.seed, fuzzer.run(options.seed))
            return 0
        seed = int(time.time()) * 1000 if options.first is None else options.first
        print(f"cases from {seed} on", flush=True)
        # the number of the case that a crash of the process would leave behind
        last, failures, began = Path(".fuzz-case"), 0, time.monotonic()
        while time.monotonic() - began < options.seconds:
            last.write_text(str(seed))
            try:
                fuzzer.run(seed)
            except AssertionError:
                failures += 1
                traceback.print_exc(limit=-3)
            seed += 1
        last.unlink()
    for outcome, count in sorted(fuzzer.outcomes.items()):
        print(f"{count:8d}  {outcome}")
    print(f"{sum(fuzzer.outcomes.values()) + failures} cases in {options.seconds:g} s, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
