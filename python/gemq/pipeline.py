"""One call for each thing a user does: quantize a model to a folder, evaluate one, load one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from gemq import distributed
from gemq.algorithms.calibration import calibration_windows, check_windows, evaluation_windows
from gemq.algorithms.costs import Costs
from gemq.algorithms.importance import ExpertStatistics
from gemq.algorithms.perplexity import perplexity
from gemq.algorithms.progressive import (
    MethodConfig,
    StageProgress,
    StageResult,
    in_memory_only,
    quantize_progressively,
)
from gemq.algorithms.saved_costs import saved_statistics
from gemq.algorithms.sequential import OnLayer
from gemq.algorithms.tensor_bits import resolve
from gemq.ambient import plain_torch
from gemq.checkpoint import check_output, pack_model, save_packed
from gemq.engine.journal import CHANGED, check_directory, read_manifest
from gemq.engine.run import StreamedResult
from gemq.engine.session import RunOptions, Session, Work, written_by
from gemq.engine.source import Source
from gemq.errors import CheckpointError, first_line
from gemq.folders import file_or_folder
from gemq.integrity import RUN_FILE
from gemq.loading import check_model, load_any, load_tokenizer, load_unquantized, parse_dtype, pick_device
from gemq.model_config import model_config
from gemq.models import MoeModel, describe
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
from gemq.packed_config import PackedConfig
from gemq.planning import PlanConfig, check, check_budgets, make_plan, this_machine
from gemq.staging import claimed

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

    ``stream`` reads one decoder layer at a time from disk and works in ``run_dir`` (default: ``output`` with ``.run``
    after it), which a second call with the same options continues and which is deleted at the end unless
    ``keep_run``. ``scratch`` says where calibration activations are: on ``disk`` there, or in ``memory``, from which a
    second call cannot take them. ``changed`` is what to do if ``run_dir`` was begun with other options
    (:func:`gemq.engine.journal.opened`). ``log`` is a file for JSON lines about every stage. ``stream=False`` holds
    the whole model in memory and cannot be resumed.
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
    stream: bool = True
    scratch: str = "disk"
    run_dir: str | None = None
    changed: str = "refuse"
    keep_run: bool = False
    log: str | None = None
    check: bool = True
    costs: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("scratch", ("disk", "memory")), ("changed", CHANGED)):
            if getattr(self, name) not in allowed:
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
    if config.stream and (whole := in_memory_only(config.method)):
        raise ValueError(f"{', '.join(whole)}: not with one layer at a time; give --no-stream (stream=False)")
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
    if config.stream:
        check_run_directory(run, output, targets, config.model)
        check_directory(run, config.changed)
    if config.log is not None:
        apart = [*targets, run] if config.stream else targets
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
    source = Source(config.model, declared, dtype, device, config.trust_remote_code)
    if config.stream:
        first = _checked(source.moe, config, costs)
        command = asdict(config)
        options = {k: v for k, v in command.items() if k not in (*RUN_OPTIONS, *_PLACES)}
        session = Session(source, windows, router, config.method, options, command, first)
        return _quantize_streamed(config, session, tokenizer, targets, progress, on_layer)
    distributed.on_first(lambda: source.watch.read(numbers=source.numbers()))
    model = load_unquantized(config.model, str(dtype).removeprefix("torch."), config.trust_remote_code)
    # on the CPU its tensors may still be the files' pages
    source.watch.check()
    stored = source.stored
    model = model.to(device).eval()
    moe = describe(model)
    first = _checked(moe, config, costs)
    outcomes = []
    for stage in quantize_progressively(
        moe, windows, config.method, router_windows=router, progress=progress, first_statistics=first,
        on_layer=on_layer,
    ):
        target = targets[stage.budget]
        distributed.on_first(source.watch.check)
        outcomes.append(
            distributed.on_first(lambda s=stage, t=target: save_stage(config, model, tokenizer, s, t, stored))
        )
    return outcomes


def _prepare(config: QuantizeConfig, targets: dict[float, Path], device: torch.device):
    """Every check that can be made before weights are read; then the windows to calibrate and to tune routers on, and
    the model's transformers config."""
    begun = config.stream and read_manifest(run_directory(config)) is not None
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


def check_resources(config: QuantizeConfig, architecture, device: torch.device) -> None:
    """Raise :class:`gemq.errors.ResourceError` if the plan of a transformers config takes more than is free here."""
    chosen = parse_dtype(config.dtype)
    dtype = None if isinstance(chosen, str) else chosen
    options = PlanConfig(
        config.method, config.samples, config.length, "stream" if config.stream else "memory", dtype,
        scratch=config.scratch, ranks=distributed.launched().size,
    )
    folder = run_directory(config) if config.stream else config.output
    here = distributed.processes_here()
    machine = this_machine(device, folder, dtype or torch.float32, rates=False, processes=here)
    check(make_plan(architecture, options, machine), architecture)


def run_directory(config: QuantizeConfig) -> Path:
    """The folder of a streamed run's unfinished work."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    output = Path(config.output)
    if output.name in ("", ".."):
        # of the present folder and the ones above it
        output = output.resolve()
    return output.with_name(f"{output.name}.run") if output.name else output / ".run"


def _quantize_streamed(
    config: QuantizeConfig, session: Session, tokenizer, targets: dict[float, Path], progress: StageProgress | None,
    on_layer: OnLayer | None,
) -> list[QuantizeOutcome]:
    run = RunOptions(
        run_directory(config), config.scratch == "disk", config.changed, config.keep_run,
        Path(config.log) if config.log else None,
    )
    outcomes = []
    with session.working(run, progress, on_layer) as work:
        for result in work.results():
            outcomes.append(
                distributed.on_first(lambda r=result: _save_streamed(config, work, r, tokenizer, targets[r.budget]))
            )
    return outcomes


def _save_streamed(
    config: QuantizeConfig, work: Work, result: StreamedResult, tokenizer, target: Path
) -> QuantizeOutcome:
    """Write the checkpoint of a result, unless an earlier call did."""
    source = work.engine.source
    stored = source.stored
    assembly, packed, name = work.assembly(result, stored)
    if written_by(target, REPORT_FILE) != name:
        with work.saving(result.budget):
            save_packed(
                assembly.model, packed, target, tokenizer=tokenizer, dtype=stored,
                weights=work.confirming(assembly.write),
                extra_files=extra_files(config, result, result.reports, name, source.moe), overwrite=config.overwrite,
            )
    if not (target / RUN_FILE).is_file():
        write_run(target, result.seconds)
    return outcome_of(result, target, result.reports, source.moe)


def target_of(config: QuantizeConfig, budget: float) -> Path:
    """The folder of a budget's checkpoint."""
    return Path(config.output) if len(config.method.budgets) == 1 else Path(config.output) / f"{budget:g}"


def save_stage(
    config: QuantizeConfig, model: nn.Module, tokenizer, stage: StageResult, target: Path, stored: torch.dtype
) -> QuantizeOutcome:
    """Pack a copy of the model's skeleton, save it, and leave ``model`` as it is for the next budget.

    ``stored`` is the dtype of the tensors that stay unquantized.
    """
    packed, packed_config = _packed_copy(model, stage, config.method.name)
    moe = describe(model)
    extra = extra_files(config, stage, stage.weights.reports, None, moe)
    save_packed(
        packed, packed_config, target, tokenizer=tokenizer, dtype=stored, extra_files=extra, overwrite=config.overwrite
    )
    write_run(target, stage.seconds)
    return outcome_of(stage, target, stage.weights.reports, moe)


def _packed_copy(model: nn.Module, stage: StageResult, method: str) -> tuple[nn.Module, PackedConfig]:
    """A packed twin that shares the unquantized tensors of ``model``; only packed buffers are new memory."""
    import copy

    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    moe = describe(twin)
    config = pack_model(moe, stage.weights, budget=stage.allocation.budget, method=method)
    source = dict(model.named_parameters())
    for name, parameter in list(twin.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(owner), leaf, source[name])
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, buffer)
    twin.tie_weights()
    twin.generation_config = model.generation_config
    return twin.eval(), config


@dataclass(frozen=True)
class Evaluation:
    """Token perplexity of a model on a text, over ``tokens`` predicted tokens, in ``seconds``."""

    perplexity: float
    tokens: int
    seconds: float


@plain_torch()
def evaluate(
    model: str | os.PathLike | nn.Module, text: str = "wikitext2", *, length: int = 2048, limit: int | None = None,
    tokenizer=None, batch_size: int = 4, dtype: str = "auto", device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Token perplexity over consecutive windows of ``length`` tokens of a held-out text.

    ``model`` is a packed checkpoint, a full-precision model folder or name, or a loaded model (then give its
    ``tokenizer``). ``limit`` bounds the number of windows.
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
    start = time.perf_counter()
    value = perplexity(model, windows, batch_size, progress)
    return Evaluation(value, windows.shape[0] * (windows.shape[1] - 1), time.perf_counter() - start)
