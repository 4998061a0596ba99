"""One call for each thing a user does: quantize a model to a folder, evaluate one, load one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemq import distributed
from gemq.algorithms.calibration import calibration_windows, check_windows, evaluation_windows
from gemq.algorithms.costs import Costs
from gemq.algorithms.divergence import Divergence, Logits, counted, divergence, window_logits
from gemq.algorithms.importance import ExpertStatistics
from gemq.algorithms.method import MethodConfig, needs_whole_model
from gemq.algorithms.perplexity import measured_losses
from gemq.algorithms.saved_costs import saved_statistics
from gemq.algorithms.tensor_bits import resolve
from gemq.ambient import plain_torch
from gemq.checkpoint import check_output, save_packed
from gemq.choices import Changed, Keep
from gemq.engine.assemble import Assembly
from gemq.engine.disk_source import DiskSource
from gemq.engine.journal import check_directory, read_manifest
from gemq.engine.progression import BudgetResult, StageProgress
from gemq.engine.session import RunOptions, Session, Work, written_by
from gemq.engine.walk import OnLayer
from gemq.errors import CheckpointError, first_line
from gemq.folders import file_or_folder
from gemq.integrity import RUN_FILE
from gemq.loading import check_model, load_any, load_tokenizer, parse_dtype, pick_device
from gemq.logits_file import save_logits as write_logits
from gemq.logits_file import stored_logits
from gemq.model_config import model_config
from gemq.models import MoeModel
from gemq.outcome import (
    COSTS_FILE,
    REPORT_FILE,
    RUN_OPTIONS,
    QuantizeOutcome,
    extra_files,
    outcome_of,
    write_run,
)
from gemq.output_folder import check_log, check_run_directory, is_event
from gemq.planning import PlanConfig, check, check_budgets, make_plan, this_machine
from gemq.staging import claimed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# fields of QuantizeConfig that say where things are: known by content instead
_PLACES = ("model", "output", "calibration", "router_text", "overwrite", "device", "dtype", "costs")


@dataclass(frozen=True)
class QuantizeConfig:
    """Settings of ``gemq quantize``: the model, the output, the text, and the method.

    ``model`` is a folder or hub name. With one budget the checkpoint is ``output`` itself, with several
    ``output/<budget>``. ``calibration`` and ``router_text`` are sources of
    :mod:`gemq.algorithms.calibration` (``router_text`` None: the calibration windows). ``length`` is in tokens.
    ``costs`` is a file of coefficients that an earlier run saved, used for the first budget instead of measuring.
    ``check`` refuses to start where memory or disk will not do.

    ``keep`` says what stays in memory. With ``layer`` it is one decoder layer: calibration activations are files in
    ``run_dir`` (default: ``output`` with ``.run`` after it), which a second call with the same options continues and
    which is deleted at the end unless ``keep_run``. With ``activations`` those stay in memory too, from which a second
    call cannot take them. With ``model`` all does, no run directory is used, and nothing can be continued. ``changed``
    is what to do if ``run_dir`` was begun with other options (:func:`gemq.engine.journal.opened`). ``log`` is a file
    for JSON lines about every stage.
    """

    model: str
    output: str
    calibration: str = "wikitext2"
    samples: int = 128
    length: int = 2048
    seed: int = 0
    router_text: str | None = None
    device: str | None = None
    dtype: str = "auto"
    overwrite: bool = False
    trust_remote_code: bool = False
    method: MethodConfig = field(default_factory=MethodConfig)
    keep: str = "layer"
    run_dir: str | None = None
    changed: str = "refuse"
    keep_run: bool = False
    log: str | None = None
    check: bool = True
    costs: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("keep", Keep), ("changed", Changed)):
            if getattr(self, name) not in set(allowed):
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


@plain_torch()
def quantize(
    config: QuantizeConfig, progress: StageProgress | None = None, on_layer: OnLayer | None = None
) -> list[QuantizeOutcome]:
    """Quantize a model by the whole method and save a packed checkpoint per budget.

    All that can be checked is checked before work starts: output folder, model family, memory and disk, text. The
    CPU works in float32, CUDA in the model's dtype unless ``config.dtype`` says otherwise. A call that was ended,
    however it was, is continued by the same call. ``on_layer`` gets the
    :class:`gemq.algorithms.layer_report.LayerReport` of every decoder layer as soon as it is quantized.

    The processes of a job (:mod:`gemq.distributed`) share the work; rank 0 checks, reads the text and saves.

    Raises :class:`gemq.errors.GemqError` or ``ValueError`` with one line that says what to change.
    """
    if config.keep != "model" and (whole := needs_whole_model(config.method)):
        raise ValueError(f"{', '.join(whole)} needs the whole model in memory: give keep model, got {config.keep}")
    targets = {b: target_of(config, b) for b in config.method.budgets}
    with ExitStack() as stack:
        distributed.on_first(lambda: stack.enter_context(_places(config, list(targets.values()))))
        return _quantize(config, targets, progress, on_layer)


@contextmanager
def _places(config: QuantizeConfig, targets: list[Path]) -> Iterator[None]:
    """Judge where the run writes, and hold its outputs against other processes."""
    if not config.output:
        raise CheckpointError("the output must be the path of a folder, got ''")
    output, run = Path(config.output), run_directory(config)
    if uses_directory(config):
        check_run_directory(run, output, targets, config.model)
        check_directory(run, config.changed)
    if config.log is not None:
        apart = [*targets, run] if uses_directory(config) else targets
        check_log("--log", Path(config.log), apart, is_event, "a log of gemq quantize")
    with claimed(*dict.fromkeys([output, *targets])):
        yield


def _quantize(
    config: QuantizeConfig, targets: dict[float, Path], progress: StageProgress | None, on_layer: OnLayer | None
) -> list[QuantizeOutcome]:
    device = pick_device(config.device)
    costs = None if config.costs is None else load_costs(config.costs)
    windows, router, declared = distributed.on_first(lambda: _prepare(config, targets, device))
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    dtype = parse_dtype(config.dtype)
    if dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    source = DiskSource(
        config.model, declared, dtype, device, config.trust_remote_code, resident=config.keep == "model"
    )
    first = _checked(source.moe, config, costs)
    command = asdict(config)
    options = {k: v for k, v in command.items() if k not in (*RUN_OPTIONS, *_PLACES)}
    session = Session(source, windows, router, config.method, options, command, first)
    run = RunOptions(
        run_directory(config), config.keep, config.changed, config.keep_run, Path(config.log) if config.log else None
    )
    outcomes = []
    with session.working(run, progress, on_layer) as work:
        for result in work.results():
            save = partial(_save, config, work, result, tokenizer, targets[result.budget])
            outcomes.append(distributed.on_first(save))
    return outcomes


def uses_directory(config: QuantizeConfig) -> bool:
    """Return True if the run works in a directory."""
    return config.keep != "model"


def _prepare(
    config: QuantizeConfig, targets: dict[float, Path], device: torch.device
) -> tuple[Tensor, Tensor, PreTrainedConfig]:
    """Every check that can be made before weights are read; then the windows to calibrate and to tune routers on, and
    the model's transformers config."""
    begun = uses_directory(config) and read_manifest(run_directory(config)) is not None
    for target in targets.values():
        if not (begun and written_by(target, REPORT_FILE)):
            check_output(target, config.model, config.overwrite)
    parse_dtype(config.dtype)
    architecture = check_model(config.model, config.trust_remote_code)
    if config.check and not begun:
        check_resources(config, architecture, device)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    windows = calibration_windows(tokenizer, config.calibration, config.samples, config.length, config.seed)
    router = windows
    if config.router_text is not None:
        router = calibration_windows(tokenizer, config.router_text, config.samples, config.length, config.seed)
    for text in (windows, router):
        check_windows(text, architecture, tokenizer)
    return windows, router, architecture


def _checked(moe: MoeModel, config: QuantizeConfig, costs: Costs | None) -> ExpertStatistics | None:
    """Refuse budgets, patterns and costs that do not fit the model; the statistics of ``costs``."""
    check_budgets(moe, config.method)
    resolve(moe, config.method.tensor_bits)
    return None if costs is None else saved_statistics(costs, moe, config.method)


def load_costs(path: str | os.PathLike) -> Costs:
    """The coefficients in a file, or in the checkpoint (folder or hub name) that holds it. Raises
    :class:`CheckpointError`."""
    given = file_or_folder(path)
    file = given / COSTS_FILE if given.is_dir() else given
    try:
        return Costs.load(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no costs in {path}: {first_line(error)}") from error


def check_resources(config: QuantizeConfig, architecture: PreTrainedConfig, device: torch.device) -> None:
    """Raise :class:`gemq.errors.ResourceError` if the plan of a transformers config takes more than is free here."""
    chosen = parse_dtype(config.dtype)
    dtype = None if isinstance(chosen, str) else chosen
    options = PlanConfig(
        config.method, config.samples, config.length, config.keep, dtype, ranks=distributed.launched().size
    )
    folder = run_directory(config) if uses_directory(config) else config.output
    here = distributed.processes_here()
    machine = this_machine(device, folder, dtype or torch.float32, rates=False, processes=here)
    check(make_plan(architecture, options, machine, config.model), architecture)


def run_directory(config: QuantizeConfig) -> Path:
    """The folder of a run's unfinished work."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    output = Path(config.output)
    if output.name in ("", ".."):
        # of the present folder and the ones above it
        output = output.resolve()
    return output.with_name(f"{output.name}.run") if output.name else output / ".run"


def _save(config: QuantizeConfig, work: Work, result: BudgetResult, tokenizer: Any, target: Path) -> QuantizeOutcome:
    """Write the checkpoint of a result, unless an earlier call did."""
    source = work.progression.source
    assembly, name = work.assembly(result)
    if written_by(target, REPORT_FILE) != name:
        with work.saving(result.budget):
            save_result(config, result, assembly, work.confirming(assembly.write), tokenizer, target, name)
    if not (target / RUN_FILE).is_file():
        write_run(target, result.seconds)
    return outcome_of(result, target, result.reports, source.moe)


def save_result(
    config: QuantizeConfig, result: BudgetResult, assembly: Assembly, write: Callable[[Path], None], tokenizer: Any,
    target: Path, name: str | None = None,
) -> None:
    """Save the checkpoint of a result with its report and costs; ``write`` writes the weights of ``assembly``, ``name``
    is the run's."""
    save_packed(
        assembly.model, assembly.config, target, tokenizer=tokenizer, dtype=assembly.dtype, weights=write,
        extra_files=extra_files(config, result, result.reports, name, assembly.source.moe), overwrite=config.overwrite,
    )


def target_of(config: QuantizeConfig, budget: float) -> Path:
    """The folder of a budget's checkpoint."""
    return Path(config.output) if len(config.method.budgets) == 1 else Path(config.output) / f"{budget:g}"


@dataclass(frozen=True)
class Evaluation:
    """Token perplexity of a model on a text, over ``tokens`` predicted tokens, in ``seconds``; with a reference also
    the ``divergence`` from it."""

    perplexity: float
    tokens: int
    seconds: float
    divergence: Divergence | None = None


@plain_torch()
def evaluate(
    model: str | os.PathLike | nn.Module, text: str = "wikitext2", *, length: int = 2048, limit: int | None = None,
    tokenizer: Any = None, batch_size: int = 4, dtype: str = "auto", device: str | None = None,
    progress: Callable[[int, int], None] | None = None, reference: str | os.PathLike | nn.Module | None = None,
    save_logits: str | os.PathLike | None = None, second_half: bool = False,
) -> Evaluation:
    """Token perplexity over consecutive windows of ``length`` tokens of a held-out text, and how far the model's
    distributions are from a reference's.

    Args:
        model: a packed checkpoint, a full-precision model's folder or name, or a loaded model (then give its
            ``tokenizer``).
        limit: bounds the number of windows.
        reference: the full-precision model, loaded beside ``model``, or a file of ``save_logits``.
        save_logits: file to write this model's logits to, for later ``reference``.
        second_half: compare with the reference at the second half of each window, as llama.cpp does.

    Raises :class:`CheckpointError` for a reference that was made of other windows or has another tokenizer,
    ``ValueError`` for one of another vocabulary.
    """
    if not isinstance(model, nn.Module):
        tokenizer = tokenizer or load_tokenizer(str(model))
        windows = evaluation_windows(tokenizer, text, length, limit)
        check_windows(windows, model_config(str(model)), tokenizer)
        model = load_any(model, dtype, device)
    else:
        if tokenizer is None:
            raise ValueError("tokenizer must be given with a loaded model")
        windows = evaluation_windows(tokenizer, text, length, limit)
        check_windows(windows, model.config, tokenizer)
    wanted = None if reference is None else _reference(reference, windows, text, dtype, device, second_half)
    found = None
    if wanted is None:
        losses = measured_losses(model, windows, batch_size, progress)
    else:
        found, losses = divergence(model, wanted, windows, batch_size, second_half, progress)
    value = losses.perplexity()
    if save_logits is not None:
        write_logits(model, windows, Path(save_logits), batch_size, second_half, progress)
    return Evaluation(value, windows.shape[0] * (windows.shape[1] - 1), losses.seconds, found)


def _reference(
    reference: str | os.PathLike | nn.Module, windows: Tensor, text: str, dtype: str, device: str | None,
    second_half: bool,
) -> Logits:
    """The logits of a loaded model, of a model's folder or name, or of a file."""
    if not isinstance(reference, nn.Module):
        if Path(reference).is_file():
            return stored_logits(Path(reference), windows, second_half)
        own = evaluation_windows(load_tokenizer(str(reference)), text, windows.shape[1], len(windows))
        if not torch.equal(own, windows):
            raise CheckpointError(
                f"the tokenizer of the reference {os.fspath(reference)!r} makes other tokens of {text}"
            )
        reference = load_any(reference, dtype, device)
    base, where = reference, counted(windows.shape[1], second_half)
    return lambda start, end: window_logits(base, windows[start:end], where)
