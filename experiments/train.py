"""Train one model on one data set: the loop, and the entry point of all experiments.

python -m experiments.train experiment=digits optimizer=adam train.batch_size=64
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments import checkpoint, record
from experiments.config import CONF, as_config, check_ranges, is_lasting
from experiments.data import Split, batches, load_data
from experiments.distributed import ALONE, Process, this_process
from experiments.errors import Diverged, UserError, as_user_errors, command_line
from experiments.fingerprint import NOT_IN_FINGERPRINT
from experiments.hardest import show_hardest
from experiments.history import History, NoHistory
from experiments.measurements import Measurements
from experiments.models import build_model
from experiments.models.dropout import share_draws
from experiments.optimizers import (
    RANDOM_SIGN,
    attach_statistics,
    backpropagate,
    build_optimizer,
    rounding,
    step_lr,
    stepper,
)
from experiments.progress import Notify, progress_bar, silent
from experiments.record import Record
from experiments.resume import previous_run, restore, save
from experiments.sampler import Draws, Sampler
from experiments.schedule import budget, evaluation_counts, every, learning_rate_schedule
from experiments.schemas.run import Config, Device, StatisticsDtype
from experiments.tracker import Tracker, Value, how_to_look, open_tracker, summarized
from gradstats import matmul
from gradstats.optim.base import ExampleOptimizer

EVALUATION_TARGETS = 4096  # at once: sequences are as many examples fewer as they are long
LONGEST_TAG = 64  # W&B refuses longer ones


@as_user_errors()
def train(config: Config, directory: Path, notify: Notify = silent, process: Process = ALONE) -> Record:
    """One run; record, checkpoints and W&B files are written to the directory.

    Processes that share the run each take their rows of every batch, and all that is logged or decided is of all of
    them; only the first writes.

    notify(examples_seen, total, loss) is called wherever the host waits for the device, with the loss over the training
    set where it is evaluated and the mean loss of the batches since the last call elsewhere. With config.resume a
    finished run is returned as it is, and an unfinished one continued from its checkpoint, on the CPU bit for bit.

    Raises UserError for what is wrong in the configuration, and Diverged, once a record with that status is saved,
    when the loss or a parameter stops being finite.
    """
    check_ranges(config)
    device = prepare(config, process)
    if (finished := process.decide(previous_run, config, directory)) is not None:
        return finished
    directory.mkdir(parents=True, exist_ok=True)
    data = process.in_turn(load_data, config.data, device)

    B = config.train.batch_size
    sampler = Sampler(len(data.train), B, config.seed, device, process)
    total = budget(config.train.epochs, len(data.train), config.evaluation.multiple, B)
    schedule = learning_rate_schedule(config.train.warmup_examples, total, config.train.decay)
    evaluations = evaluation_counts(total, config.evaluation.multiple, config.evaluation.count)
    checkpoints = every(config.train.checkpoint_every_examples, B, total)
    stops = sorted({*evaluations, *checkpoints, *every(config.train.log_every_examples, B, total)})

    torch.manual_seed(config.seed)
    model = build_model(config.model, data.shape, data.classes, data.discrete).to(device)
    share_draws(model, sampler.rows, B)
    parameters = list(model.parameters())
    optimizer = build_optimizer(parameters, config.optimizer, B, config.train.max_norm)
    detail = ("second_moment", "norms") if config.tracker.detail else ()
    draws = Draws(config.seed)
    statistics = attach_statistics(
        *(model, optimizer, config.optimizer, *detail),
        engine=config.engine,
        generator=draws.generator,
        batch_size=None if config.hardware.compile or config.hardware.bf16 else B,
    )
    peak_lr = optimizer.param_groups[0]["lr"]
    gradient_limit = None if isinstance(optimizer, ExampleOptimizer) else config.train.max_norm
    step = stepper(optimizer, B if statistics is None else None)
    measurements = Measurements(model, statistics, config.tracker.detail)
    together = process.parallel(model)
    forward = torch.compile(together) if config.hardware.compile else together
    weight = process.weight(B)
    reduction = "none" if config.engine.name == RANDOM_SIGN else "mean"
    rounds = matmul.forced() if config.engine.statistics_dtype is StatisticsDtype.emulated else nullcontext()
    precision = torch.autocast(device.type, torch.bfloat16) if config.hardware.bf16 else nullcontext()

    parts = {"model": model, "optimizer": optimizer, "sampler": sampler, "draws": draws, "measurements": measurements}
    result, run_id = restore(config, directory, parts, device, process)
    result.rounding = None if statistics is None else rounding(config.engine, device)
    if config.hardware.compile and statistics is not None:
        # Before anything is compiled: torch is to meet the layers as the probe leaves them.
        statistics.probe(data.train.take(torch.arange(B, device=data.train.x.device))[0].to(device))
    if sampler.position > 0:
        stops = [stop for stop in stops if stop > sampler.position]

    with (
        rounds,
        open_tracker(config, directory, run_id) if process.first else Tracker() as tracker,
        summarized(tracker, result, lambda: step_lr(optimizer, config.optimizer, peak_lr, B)),
        History(config, directory, device, sampler.position) if process.first else NoHistory() as history,
    ):
        started, worked = time.perf_counter() - result.seconds, time.process_time() - (result.processor_seconds or 0.0)
        for stop in stops:
            start, clock = sampler.position, time.perf_counter()
            losses: list[Tensor] = []  # on the device, which is not waited for before the stop
            values: dict[str, Value] = {}
            for x, y in batches(data, sampler, stop):
                for p in parameters:
                    p.grad = None
                with precision:
                    loss = weight * F.cross_entropy(forward(x).flatten(0, -2), y.flatten(), reduction=reduction)
                losses.append(backpropagate(loss, len(x), statistics))
                if sampler.position == stop:
                    values = measurements.read(B)
                if gradient_limit is not None:
                    nn.utils.clip_grad_norm_(parameters, gradient_limit)
                optimizer.param_groups[0]["lr"] = peak_lr * schedule.mean(sampler.position - B, sampler.position)
                step()

            # The last one tells whether the last step kept the parameters finite.
            observed = process.mean(torch.stack([*losses, nn.utils.get_total_norm(parameters)])).tolist()
            latest = sum(observed[:-1]) / max(len(losses), 1)
            if losses:
                speed = (stop - start) / (time.perf_counter() - clock)
                values |= {"loss/batch": latest, "speed/examples_per_second": speed}
                values["optimizer/lr"] = optimizer.param_groups[0]["lr"]
            if stop in evaluations:
                train_loss, train_accuracy = evaluate(model, data.evaluated, precision, process)
                test_loss, test_accuracy = evaluate(model, data.test, precision, process)
                values |= {"loss/train": train_loss, "loss/test": test_loss}
                values |= {"accuracy/train": train_accuracy, "accuracy/test": test_accuracy}
                observed += [train_loss, test_loss]
                latest = train_loss
            result.seconds = time.perf_counter() - started
            if result.processor_seconds is not None:
                result.processor_seconds = time.process_time() - worked

            if not all(map(math.isfinite, observed)):
                raise process.decide(diverged, observed[: len(losses)], start, sampler, result, directory)
            if stop in evaluations:
                result.examples.append(stop)
                result.train_loss.append(train_loss)
                result.test_loss.append(test_loss)
                result.test_accuracy.append(test_accuracy)
            tracker.log(stop, values)
            process.decide(history.log, stop, values)
            notify(stop, total, latest)
            if stop in checkpoints:
                process.decide(history.flush)
                process.decide(save, config, directory, parts, device, result, tracker.run_id)

        result.status = "finished"
        process.decide(result.save, directory / record.FILE)
        if process.first and config.tracker.detail and config.tracker.name != "none":
            if statistics is not None:
                statistics.detach()
            show_hardest(model, data, tracker)
    return result


def prepare(config: Config, process: Process = ALONE) -> torch.device:
    """Settings of the process, its device, and its connection to the others."""
    torch.set_num_threads(config.hardware.threads)
    torch.set_float32_matmul_precision("high" if config.hardware.tf32 else "highest")
    available = torch.cuda.is_available()
    if config.device is Device.cuda and not available:
        raise UserError("device=cuda, but torch sees no GPU here: use device=cpu or device=auto")
    device = process.gpu() if available and config.device is not Device.cpu else torch.device("cpu")
    # On the CPU a run repeats, and continues, bit for bit: nothing may be chosen by measured time (gradstats.choice).
    torch.use_deterministic_algorithms(device.type == "cpu")
    process.connect(device)
    return device


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, precision: AbstractContextManager[Any], process: Process = ALONE
) -> tuple[float, float]:
    """Mean loss, in nats, and accuracy over the targets of all examples, whose parts the processes share."""
    model.eval()
    device = next(model.parameters()).device
    size = max(1, EVALUATION_TARGETS * len(split) // split.y.numel())
    parts = list(zip(split.x.split(size), split.y.split(size), strict=True))
    # A row for each part, not one sum: the numbers are then the same, bit for bit, for any number of processes.
    sums = torch.zeros(len(parts), 2, dtype=torch.float64, device=device)
    for i in range(process.rank, len(parts), process.world_size):
        x, y = parts[i]
        targets = y.to(device).flatten()
        with precision:
            logits = model(x.to(device)).flatten(0, -2).float()  # (targets, classes)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums[i] = torch.stack([loss, (logits.argmax(1) == targets).sum()])
    model.train()
    loss, accuracy = (process.sum(sums).sum(0) / split.y.numel()).tolist()
    return loss, accuracy


def diverged(losses: Sequence[float], start: int, sampler: Sampler, result: Record, directory: Path) -> Diverged:
    """Saves the record. The step is the first with a loss that is not finite, or else the last one taken."""
    B = sampler.batch_size
    index = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses) - 1)
    first = start + index * B
    result.status = "diverged"
    result.save(directory / record.FILE)
    return Diverged(first // B + 1, sampler.stream(first, first + B).tolist(), checkpoint.find(directory))


def run(config: Config, directory: Path, shown: bool, process: Process) -> None:
    """A single run, with a bar while it lasts and its result at the end."""
    finished = process.decide(previous_run, config, directory) is not None
    if not process.first:
        train(config, directory, silent, process)
        return
    if finished:
        print(f"{directory} holds this run, finished", file=sys.stderr)
    elif config.resume and checkpoint.find(directory) is None:
        print(f"nothing to resume in {directory} yet: starting from the beginning", file=sys.stderr)
    with progress_bar(config.name, shown) as notify:
        result = train(config, directory, notify, process)
    print(
        f"{result.label}, B = {result.batch_size}: {result.examples[-1]:,} examples in {result.seconds:.1f} s, "
        f"training loss {result.train_loss[-1]:.4f}, test loss {result.test_loss[-1]:.4f}, "
        f"test accuracy {result.test_accuracy[-1]:.1%}\nwritten to {directory}"
        f"\na page to look at: python -m experiments.report {directory}"
    )
    if (hint := how_to_look(directory)) is not None:
        print(hint)


@contextmanager
def as_failed_job() -> Iterator[None]:
    """In a sweep Hydra lets the other runs end first, and prints this kind of error without a traceback."""
    try:
        with as_user_errors():
            yield
    except UserError as error:
        raise CompactHydraException(f"error: {error}") from None


def in_sweep(config: Config, sweep: Path, overrides: Sequence[str]) -> Config:
    """The run of a sweep is tracked in one group with the others, and tagged with what it was started with.

    The sweep's directory ends in its time, or is the user's own: a sweep that is resumed goes on in its group.
    """
    if config.tracker.group is not None:
        return config
    told = [text for text in overrides if text.lstrip("+~").partition("=")[0].split(".")[0] not in NOT_IN_FINGERPRINT]
    tags = [*config.tracker.tags, *(text for text in told if len(text) <= LONGEST_TAG)]
    tracker = dataclasses.replace(config.tracker, group=f"{config.name} {sweep.name}", tags=tags)
    return dataclasses.replace(config, tracker=tracker)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> None:
    job = HydraConfig.get()
    multirun = job.mode is RunMode.MULTIRUN
    directory, sweep = Path(job.runtime.output_dir), Path(job.sweep.dir)
    again = f"resume=true directory={sweep if multirun else directory}"
    process = this_process()
    process.share_directory(directory)
    with (
        command_line(f"interrupted: the same command with {again} continues"),
        as_failed_job() if multirun else nullcontext(),
        process.one_message(),
        process,
    ):
        config = as_config(composed)
        if config.resume and not is_lasting(composed):
            raise UserError("resume=true needs directory=PATH, the directory of the run to continue")
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not config.resume:
            raise UserError("torchrun --max-restarts continues a run only with resume=true directory=PATH: add them")
        if multirun:
            config = in_sweep(config, sweep, job.overrides.task)
        if config.study is not None:
            from experiments.launch import run_study  # which trains, and so imports this module

            run_study(config, directory)
        elif config.search is not None:
            from experiments.search import run_search  # which trains too

            run_search(config, directory, job.overrides.task)
        else:
            run(config, directory, not multirun, process)


def start() -> None:
    """Where torchrun started several processes, they first agree on the directory."""
    process = this_process()
    if process.world_size > 1 and {"-m", "--multirun"} & set(sys.argv):
        with command_line(), process.one_message():
            raise UserError(
                "hydra's -m starts runs, and torchrun the processes of one run: leave one of the two out, or let "
                "hydra/launcher=slurm start the processes of each run (docs/experiments.md)"
            )
    sys.argv += process.overrides()
    main()


if __name__ == "__main__":
    # By its importable name: the processes of a parallel sweep could not import the function from __main__.
    from experiments import train as importable

    importable.start()
