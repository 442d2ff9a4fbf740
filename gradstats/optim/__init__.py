"""Optimizers whose hyper-parameters do not depend on the batch size. One file each, on

    base.py              what all share: options, time in examples, the contract of torch; with
    found.py             its parameters and what was backpropagated through them
    parts.py             what of them has its step in common, and its scalars
    bound.py, saved.py   max_norm, and a state put back
    update.py            an equation, as a pure function of tensors and numbers
    elementwise.py       how it is run: compiled, or block by block
    moment.py            the second moment at a reference batch size R, of Adam and RMSprop
    noise.py             signal and noise of each element, of the experimental ones

and beside them schedule.py and batch_size.py (what changes within a run), counterparts.py, convert.py and describe.py
(the values and the state of torch's).
"""

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
