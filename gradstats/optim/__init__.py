"""Optimizers whose hyper-parameters do not depend on the batch size. One file each."""

from gradstats.optim.adam import BatchInvariantAdam
from gradstats.optim.adascale import AdaScale
from gradstats.optim.batch_size import AdaptiveBatchSize, ScheduledBatchSampler
from gradstats.optim.convert import from_torch, to_torch
from gradstats.optim.lion import BatchInvariantLion
from gradstats.optim.microbatch import MicrobatchAdamW
from gradstats.optim.quenching import QuenchingSGD
from gradstats.optim.rmsprop import BatchInvariantRMSprop
from gradstats.optim.saturating import SaturatingAdam, SaturatingSGD
from gradstats.optim.schedule import Constant, Cosine, ExampleLR, InverseSquareRoot, Linear, Schedule, Warmup
from gradstats.optim.sgd import BatchInvariantSGD
from gradstats.optim.sign import BatchInvariantSignSGD
from gradstats.optim.variance_adapted import VarianceAdaptedAdam, VarianceAdaptedSGD

__all__ = [
    "AdaScale",
    "AdaptiveBatchSize",
    "BatchInvariantAdam",
    "BatchInvariantLion",
    "BatchInvariantRMSprop",
    "BatchInvariantSGD",
    "BatchInvariantSignSGD",
    "Constant",
    "Cosine",
    "ExampleLR",
    "InverseSquareRoot",
    "Linear",
    "MicrobatchAdamW",
    "QuenchingSGD",
    "SaturatingAdam",
    "SaturatingSGD",
    "Schedule",
    "ScheduledBatchSampler",
    "VarianceAdaptedAdam",
    "VarianceAdaptedSGD",
    "Warmup",
    "from_torch",
    "to_torch",
]
