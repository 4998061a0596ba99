"""Run the accuracy study: one resumable command for the tables and figures of the paper on models of your own.

    make study                                            # all tables on the model that ships with gemq
    make study TABLE=1,21                                 # two of them
    python benchmarks/accuracy/study.py MODEL... --table 1 --calibration wiki=train.txt --calibration c4=docs.jsonl \\
        --text wiki=test.txt --text c4=held.jsonl --seeds 0,1,2 --out study-out

Cells (a model, a seed, a method) are kept in ``OUT/cells``; what is there is not computed again, and interrupting costs
only the cell at hand. ``--dry-run`` counts what is left and how long it will take, from the cells already measured.
Then ``OUT/study.md``, its figures and ``OUT/study.json`` are written from the cells that exist; ``python
benchmarks/record.py accuracy OUT/study.json`` puts the latter into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "benchmarks")]

import cells  # noqa: E402
import record  # noqa: E402
import render  # noqa: E402
import tables  # noqa: E402
from cells import Run, Settings  # noqa: E402

DEMO = ROOT / "python" / "gemq" / "demo"
DEFAULTS = {
    "models": [str(DEMO / "model")],
    "calibration": [f"novels={DEMO / 'text' / 'calibration.txt'}"],
    "text": [f"held-out={DEMO / 'text' / 'heldout.txt'}"],
}


@dataclass(frozen=True)
class Cell:
    """A run of one model and seed, and where its result lies."""

    model: str
    seed: int
    run: Run
    path: Path

    def result(self) -> dict | None:
        """Read the cell's result, or None if it was not computed."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else None


def _pairs(given: list[str], option: str) -> tuple[tuple[str, str], ...]:
    found = [tuple(item.split("=", 1)) for item in given]
    bad = [item for item, pair in zip(given, found, strict=True) if len(pair) != 2 or not all(pair)]
    if bad or len({pair[0] for pair in found}) < len(found):
        raise ValueError(f"{option} must be NAME=SOURCE, each name once, got {', '.join(bad or given)}")
    return tuple(found)


def settings_of(options: argparse.Namespace) -> Settings:
    """The study's settings; with several calibration texts their even mixture is one more, ``A+B``."""
    calibration = _pairs(options.calibration or DEFAULTS["calibration"], "--calibration")
    if len(calibration) > 1:
        mixture = ",".join(source for _, source in calibration)
        calibration = (*calibration, ("+".join(name for name, _ in calibration), mixture))
    texts = _pairs(options.text or DEFAULTS["text"], "--text")
    return Settings(calibration, texts, options.samples, options.length, options.limit, options.batch_size)


def planned(options: argparse.Namespace, settings: Settings) -> tuple[dict[str, tables.Table], list[Cell]]:
    """List the requested tables, and their cells: each once, models and seeds outermost, the most useful table first.
    """
    names = [name for name, _ in settings.calibration if "+" not in name]
    budgets = tuple(float(b) for b in options.bits.split(","))
    found = tables.build(names, budgets, tuple(b for b in budgets if b <= 2) or budgets)
    asked = list(tables.PRIORITY) if options.table == "all" else options.table.split(",")
    unknown = set(asked) - set(found)
    if unknown:
        raise ValueError(f"--table must be all or of {', '.join(found)}; got {', '.join(sorted(unknown))}")
    chosen, result = {key: found[key] for key in asked}, {}
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for model in options.models or DEFAULTS["models"]:
        print_of = cells.fingerprint(model)
        for seed in seeds:
            for table in chosen.values():
                for run in _runs(table, seed == seeds[0]):
                    name = cells.cell_name(model, print_of, seed, run, settings)
                    result.setdefault(name, Cell(model, seed, run, options.out / "cells" / name))
    return chosen, list(result.values())


def _runs(table: tables.Table, first_seed: bool) -> Iterator[Run]:
    for _, run in table.rows:
        if table.seeds == tables.FIRST_SEED and not first_seed:
            continue
        controls = [tables.FP, tables.control(run)] if run.kind in ("quantize", "spqr") else []
        for wanted in (*controls, run):
            # the bare model does not depend on the calibration seed
            if wanted != tables.FP or first_seed:
                yield wanted


def seconds_left(todo: list[Cell], done: list[dict]) -> float | None:
    """Estimate the remaining seconds from the mean time of measured cells of the same kind and router handling; None
    without any."""
    if not done:
        return None
    groups: dict[tuple, list[float]] = {}
    for result in done:
        for key in ((), (result["run"]["kind"],), (result["run"]["kind"], result["run"]["routers"])):
            groups.setdefault(key, []).append(result["seconds"])
    total = 0.0
    for cell in todo:
        keys = ((cell.run.kind, cell.run.routers), (cell.run.kind,), ())
        held = next(groups[key] for key in keys if key in groups)
        total += sum(held) / len(held)
    return total


def compute(todo: list[Cell], settings: Settings, options: argparse.Namespace) -> None:
    """Run the remaining cells, and print a line for each."""
    folder = options.out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    session, count = None, len(todo)
    for number, cell in enumerate(todo, 1):
        if session is None or (session.name, session.seed) != (cell.model, cell.seed):
            session = cells.Session(cell.model, cell.seed, settings, folder, options.device)
        conditions = record.conditions(f"python benchmarks/accuracy/study.py --table {options.table}")
        result = cells.run_cell(session, cell.run, conditions)
        cells.write_json(cell.path, result)
        scores = [", ".join(f"{s['budget']:g}: {v:.2f}" for v in list(s.get("perplexity", {}).values())[:1])
                  for s in result["stages"]]
        print(f"[{number}/{count}] {result['model']} seed {cell.seed} {_label(cell.run)}  "
              f"{' '.join(filter(None, scores))}  {result['seconds']:.0f} s", flush=True)


def _label(run: Run) -> str:
    default = Run()
    changed = {k: v for k, v in vars(run).items() if v != getattr(default, k) and k not in ("kind", "method")}
    return " ".join([run.kind, run.method, *(f"{k}={v}" for k, v in changed.items())])


def write(chosen: dict[str, tables.Table], planned_cells: list[Cell], options: argparse.Namespace) -> dict:
    """``study.md``, figures and ``study.json`` from the cells that exist."""
    results = [result for cell in planned_cells if (result := cell.result()) is not None]
    by_run = {(cell.model, cell.seed, cell.run): result
              for cell in planned_cells if (result := cell.result()) is not None}
    models = list(dict.fromkeys(cell.model for cell in planned_cells))
    study = render.Study(models, sorted({cell.seed for cell in planned_cells}), by_run)
    text = render.document(study, chosen, options.out)
    (options.out / "study.md").write_text(text, encoding="utf-8")
    merged = {"cells": [{k: v for k, v in result.items() if k != "conditions"} for result in results]}
    if results:
        # the cells of a study may have been computed at several commits: all are named
        given = [result["conditions"] for result in results]
        commits = ", ".join(dict.fromkeys(c["commit"] for c in given))
        merged["conditions"] = given[0] | {"commit": commits, "load": [min(c["load"] for c in given),
                                                                       max(c["load"] for c in given)]}
    cells.write_json(options.out / "study.json", merged)
    return merged


def put_into(page: Path, out: Path, conditions: dict, command: str, block: str = "study") -> None:
    """Put ``study.md`` between the page's markers of ``block``, its headings one level lower, figures into ``images``
    beside it."""
    begin, end = f"<!-- begin {block} -->", f"<!-- end {block} -->"
    before, first, rest = page.read_text(encoding="utf-8").partition(begin)
    _, second, after = rest.partition(end)
    if not (first and second):
        raise ValueError(f"{page} has no {begin} ... {end}")
    _, _, body = (out / "study.md").read_text(encoding="utf-8").partition("\n")
    images = page.parent / "images"
    images.mkdir(exist_ok=True)
    for figure in sorted(out.glob("*.png")):
        if f"]({figure.name})" in body:
            (images / f"accuracy-{figure.name}").write_bytes(figure.read_bytes())
            body = body.replace(f"]({figure.name})", f"](images/accuracy-{figure.name})")
    body = body.replace("\n### ", "\n#### ").replace("\n## ", "\n### ")
    c = conditions
    said = f"{c['machine']}; commit {c['commit']}, {c['date']}, torch {c['torch']}; `{command}`."
    text = f"{before}{begin}\n{body.strip()}\n\n{said}\n{end}{after}"
    temporary = page.with_name(f".{page.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(page)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`settings_of` reads."""
    parser.add_argument("--calibration", action="append", help="NAME=SOURCE, repeatable; the first is the default")
    parser.add_argument("--text", action="append", help="NAME=SOURCE to evaluate on, repeatable")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--limit", type=int, default=64, help="evaluation windows per text")
    parser.add_argument("--batch-size", type=int, default=8)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders of full-precision models (default: the demo's)")
    parser.add_argument("--table", default="all", help=f"all, or of {', '.join(tables.PRIORITY)}")
    add_settings(parser)
    parser.add_argument("--bits", default="2.5,2,1.5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("study-out"))
    parser.add_argument("--dry-run", action="store_true", help="count and estimate only")
    parser.add_argument("--into", type=Path, help="a Markdown page with markers to put the study into")
    parser.add_argument("--block", default="study", help="the name in that page's markers")
    parser.add_argument("--command", default="make study", help="what that page says was run")
    parser.add_argument("--commit", help="what it says was measured (default: what the cells say)")
    parser.add_argument("--cells", type=int, help="stop after this many new cells")
    options = parser.parse_args(arguments)
    options.models = options.models or DEFAULTS["models"]
    return options


def main(arguments: list[str] | None = None) -> None:
    """Plan the cells, run those that are left, and write the results."""
    options = parse(arguments)
    try:
        settings = settings_of(options)
        chosen, wanted = planned(options, settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    todo = [cell for cell in wanted if not cell.path.is_file()]
    left = seconds_left(todo, [r for cell in wanted if (r := cell.result()) is not None])
    about = "unknown until a cell is measured" if left is None else time.strftime("%H:%M:%S", time.gmtime(left))
    print(f"{len(wanted)} cells, {len(todo)} to compute, time left: {about}", flush=True)
    if options.dry_run:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    compute(todo[: options.cells], replace(settings), options)
    merged = write(chosen, wanted, options)
    if options.into is not None:
        given = merged["conditions"] | ({"commit": options.commit} if options.commit else {})
        put_into(options.into, options.out, given, options.command, options.block)
    print(options.out / "study.md")


if __name__ == "__main__":
    main()
