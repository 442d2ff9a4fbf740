"""The processes that train one model together, as torchrun or Slurm starts them: who this one is, and how they agree.

Tensors travel through torch's process group. What the first process decides (a directory, what it holds, whether a
checkpoint could be written) travels through the launcher's store: a process that waits there for one that is gone waits
until the launcher ends it, and says nothing.
"""

from __future__ import annotations

import os
import pickle
import warnings
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.errors import UserError, as_user_errors

P = ParamSpec("P")
T = TypeVar("T")

TOLD = "told"
# What gloo says to a process that waits for another one, which is gone.
LOST = ("Connection closed by peer", "Connection reset by peer")
# After which a process takes its error for its own: the first may have to end a W&B run before it can tell one of all.
PATIENCE = timedelta(seconds=30)


class Process:
    """One of `world_size` processes; alone, it agrees with itself. rank 0 is the first: it alone writes and tells.

    To be used in a `with` around all of its communication.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, store: dist.Store | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._decisions = count()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def store(self) -> dist.Store:
        assert self._store is not None
        return self._store

    def gpu(self) -> torch.device:
        """A GPU of its own. Raises UserError if this machine has fewer than processes."""
        if self.world_size > 1:
            here, processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
            if processes > here:
                raise UserError(f"{processes} processes have {here} GPUs: start {here} of them, or use device=cpu")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda")

    def connect(self, device: torch.device) -> None:
        """Forms the group whose collectives are of tensors on the device."""
        if self.world_size > 1 and not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        # A process that ends with a group may abort; but NCCL waits, and where one of the others failed for ever.
        if self.world_size > 1 and dist.is_initialized() and (kind is None or dist.get_backend() == "gloo"):
            dist.destroy_process_group()

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, whose gradients become their mean over the processes in the backward pass, and whose statistics
        are those of the examples of all."""
        if self.world_size == 1:
            return model
        # What it asks for is `weight`.
        warnings.filterwarnings("ignore", "the ranks of DistributedDataParallel backpropagated")
        return DistributedDataParallel(model)

    def rows(self, batch_size: int) -> slice:
        """This process' part of every batch, as even as it can be.

        Raises UserError for a batch with less than one example a process.
        """
        if batch_size < self.world_size:
            raise UserError(
                f"train.batch_size={batch_size} is the batch of all processes together, of which there are "
                f"{self.world_size}: start fewer, or give each of them an example"
            )
        return slice(batch_size * self.rank // self.world_size, batch_size * (self.rank + 1) // self.world_size)

    def weight(self, batch_size: int) -> float:
        """W B_r / B, by which a mean over B_r rows is multiplied so that its mean over processes is that over B."""
        rows = self.rows(batch_size)
        return self.world_size * (rows.stop - rows.start) / batch_size

    def sum(self, values: Tensor) -> Tensor:
        """Over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Over the processes, in place."""
        return self.sum(values).div_(self.world_size)

    def decide(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Only the first acts; what it returns, or the UserError that it raises, is everybody's."""
        if self.world_size == 1:
            return action(*args, **kwargs)
        key = f"decision {next(self._decisions)}"
        value: Any
        error: UserError | None = None
        if not self.first:
            value, error = pickle.loads(b64decode(self.store.get(key)))
        else:
            try:
                with as_user_errors():
                    value = action(*args, **kwargs)
            except UserError as refusal:
                value, error = None, refusal
            self.store.set(key, b64encode(pickle.dumps((value, error))).decode())
        if error is not None:
            raise error
        decided: T = value
        return decided

    def in_turn(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The first acts before the others do: what it fetches into a cache, they find there."""
        done: list[T] = []
        self.decide(lambda: done.append(action(*args, **kwargs)))
        return done[0] if done else action(*args, **kwargs)

    @contextmanager
    def one_message(self) -> Iterator[None]:
        """Of an error that all have, the first tells; another process tells what is its own, and one of all that they
        have lost another one."""
        try:
            yield
        except UserError as error:
            if self.world_size == 1:
                raise
            if self.first:
                self.store.set(TOLD, "")
                raise
            if self._is_told():
                raise SystemExit(2) from None
            raise UserError(f"process {self.rank} of {self.world_size}: {error}") from error
        except KeyboardInterrupt:
            if self.first:
                raise
            raise SystemExit(130) from None
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(text in str(error) for text in LOST):
                raise
            if not self._is_first_to_lose():
                raise SystemExit(2) from None
            raise UserError(
                "one of the processes is gone: it was killed, or what it printed says why. With resume=true the run "
                "continues from its last checkpoint"
            ) from error

    def _is_told(self) -> bool:
        try:
            self.store.wait([TOLD], PATIENCE)
        except dist.DistStoreError:
            return False
        except dist.DistError:  # the first had the store, and took it along
            pass
        return True

    def _is_first_to_lose(self) -> bool:
        try:
            return self.store.add("lost", 1) == 1
        except dist.DistError:
            return True

    def share_directory(self, directory: Path) -> None:
        if self.world_size > 1 and self.first:
            self.store.set("directory", str(directory))

    def overrides(self) -> list[str]:
        """By which Hydra, in another process than the first, takes the first one's directory for this run's, and
        leaves its own files to it.

        Waits until the first has composed the configuration: where it cannot, it alone tells.
        """
        if self.first:
            return []
        directory = self.store.get("directory").decode().replace("'", r"\'")
        return [f"hydra.run.dir='{directory}'", "hydra.output_subdir=null"]


ALONE = Process()


def refuse_processes(what: str) -> None:
    """Raises UserError in what starts the processes that it needs by itself."""
    if this_process().world_size > 1:
        raise UserError(f"{what} runs many models, each in a process of its own: start it without torchrun")


@cache
def this_process() -> Process:
    """As the launcher's environment variables tell: torchrun's, or those of a job of submitit's with several tasks."""
    if "SUBMITIT_EXECUTOR" in os.environ and "WORLD_SIZE" not in os.environ:
        from submitit import JobEnvironment  # here: only a cluster needs it
        from submitit.helpers import TorchDistributedEnvironment

        if JobEnvironment().num_tasks > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return ALONE
    store, rank, _ = next(dist.rendezvous("env://"))
    # The store outlives the processes that torchrun starts again, whatever they ended with.
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    before, now = (dist.PrefixStore(f"attempt {n}", store) for n in (attempt - 1, attempt))
    if before.check([TOLD]):
        now.set(TOLD, "")
        raise SystemExit(2)
    return Process(rank, world_size, now)
