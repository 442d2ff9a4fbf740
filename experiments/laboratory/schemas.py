"""The settings of every study: the group `study` of the configuration. The values are in conf/experiment/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class StudyConfig:
    """name: of the module in experiments/laboratory/; note: shown above the results, as what a short form leaves out.

    runs: where the jobs are kept, by default in the study's directory; studies with the same value share runs.
    workers: processes, one thread each; null: as many as there are cores.
    """

    name: str = MISSING
    note: str = ""
    runs: str | None = None
    workers: int | None = None
    seeds: list[int] = MISSING


@dataclass
class BatchSizeInvarianceConfig(StudyConfig):
    """Every method runs with the same number of learning rates: lr_multipliers times its own default.

    options: replace those of every method that has one of this name, as betas.
    kin: methods that do what ours do by another road: shown, and named beside every claim, but no baseline to beat.
    loss_targets: where scores are compared, in units of the reference's final loss.
    """

    options: dict[str, Any] = field(default_factory=dict)
    ours: list[str] = MISSING
    baselines: list[str] = MISSING
    kin: list[str] = field(default_factory=list)
    loss_targets: list[float] = field(default_factory=lambda: [1.0, 2.0])
    reference: str = MISSING
    tuning_batch_size: int = MISSING
    lr_multipliers: list[float] = MISSING
    batch_sizes: list[int] = MISSING
    score_batch_sizes: list[int] = MISSING


@dataclass
class TuneOnceConfig(BatchSizeInvarianceConfig):
    """regret_batch_sizes: over which regrets are averaged."""

    regret_batch_sizes: list[int] = MISSING


@dataclass
class RunningAveragesConfig(StudyConfig):
    """Counts of examples. The signals are the offset, and a cosine of amplitude 1 with this period; each of the draws
    is one of them with Gaussian noise of this standard deviation. The figure shows the averages of horizon `shown`."""

    horizons: list[int] = MISSING
    shown: int = MISSING
    examples: int = MISSING
    period: int = MISSING
    offset: float = MISSING
    noise: float = MISSING
    draws: int = MISSING


@dataclass
class DecouplingConfig(StudyConfig):
    """batch_size: of all maps but that over batch_sizes; horizons in examples; octaves: of each map, from the
    configuration's lr."""

    batch_size: int = MISSING
    batch_sizes: list[int] = MISSING
    momentum_horizons: list[int] = MISSING
    gradient_horizons: list[int] = MISSING
    square_horizons: list[int] = MISSING
    epsilons: list[float] = MISSING
    batch_size_octaves: list[float] = MISSING
    momentum_horizon_octaves: list[float] = MISSING
    gradient_horizon_octaves: list[float] = MISSING
    square_horizon_octaves: list[float] = MISSING
    eps_octaves: list[float] = MISSING


@dataclass
class OneDimensionalConfig(StudyConfig):
    """Learning rates scale / t^power over `steps`, and constant `rates` over `rate_steps`; noise: sigma of y;
    start: the distance from the minimum; repetitions: runs a seed."""

    noise: float = MISSING
    start: float = MISSING
    repetitions: int = MISSING
    batch_sizes: list[int] = MISSING
    scale: float = MISSING
    powers: list[float] = MISSING
    steps: int = MISSING
    rates: list[float] = MISSING
    rate_steps: int = MISSING


@dataclass
class SGDMomentumConfig(StudyConfig):
    """lr: on the quadratic of curvature 1, an example's total effect; horizon: examples; time_constants: the length of
    its runs, in 1/lr examples; replicas: runs a seed. lr_multipliers: of batch_invariant_sgd's own, on the digits.
    informative: shares of the examples that have a gradient. lr_fractions: of the tuned lr, over all batch sizes."""

    lr: float = MISSING
    horizon: float = MISSING
    time_constants: int = MISSING
    replicas: int = MISSING
    informative: list[float] = MISSING
    tuning_batch_size: int = MISSING
    batch_sizes: list[int] = MISSING
    lr_multipliers: list[float] = MISSING
    lr_fractions: list[float] = MISSING


@dataclass
class TemperatureConfig(StudyConfig):
    """Descent on a quadratic: curvatures, rates, batch_sizes, noise of a gradient, repetitions a seed. On the data: a
    softmax regression with this penalty. Training: lr_multipliers of the method's own lr; `stages` of `stage` examples,
    between which lr falls or the batch size grows by the factor; cycles of `cycle` examples, the last `members` kept.
    """

    noise: float = MISSING
    repetitions: int = MISSING
    curvatures: list[float] = MISSING
    rates: list[float] = MISSING
    batch_sizes: list[int] = MISSING
    penalty: float = MISSING
    well_rates: list[float] = MISSING
    well_batch_sizes: list[int] = MISSING
    method: str = MISSING
    lr_multipliers: list[float] = MISSING
    factor: int = MISSING
    stages: int = MISSING
    stage: int = MISSING
    points: int = MISSING
    cycles: int = MISSING
    members: int = MISSING
    cycle: int = MISSING


@dataclass
class BiasCorrectionConfig(StudyConfig):
    """Learning rates are lr times powers of two, the octaves; warm-ups in examples, the first of them 0. The early loss
    is that after early_epochs."""

    batch_size: int = MISSING
    epochs: float = MISSING
    early_epochs: float = MISSING
    betas: tuple[float, float] = MISSING
    eps: float = MISSING
    lr: float = MISSING
    octaves: list[float] = MISSING
    warmups: list[int] = MISSING


@dataclass
class RmsUnitsConfig(StudyConfig):
    """Learning rates are the configuration's times powers of two, the octaves; eps is floor^(2 exponent), and that of
    `floor` where predictions are compared over `steps`. warmup: in examples."""

    batch_size: int = MISSING
    epochs: float = MISSING
    warmup: int = MISSING
    octaves: list[float] = MISSING
    floors: list[float] = MISSING
    floor: float = MISSING
    weight_scale: float = MISSING
    loss_scale: float = MISSING
    steps: int = MISSING


@dataclass
class AdamAndFriendsConfig(StudyConfig):
    """steps: the budget of every run, also in tuning; target: of the training loss, in nats; every: steps between two
    looks at it; lr_multipliers: of a default of each method; batch_size: of all but full-batch descent."""

    tuning_seeds: list[int] = MISSING
    lr_multipliers: list[float] = MISSING
    batch_size: int = MISSING
    steps: int = MISSING
    every: int = MISSING
    target: float = MISSING


@dataclass
class DriftConfig(StudyConfig):
    """method: a BatchInvariantAdam, tuned over lr_multipliers at each of the horizons of its momentum, in examples.
    The run is followed in so many log-spaced phases; averages have so many lengths, in factors of 2 of the batch."""

    method: str = MISSING
    horizons: list[int] = MISSING
    lr_multipliers: list[float] = MISSING
    phases: int = MISSING
    lengths: int = MISSING


@dataclass
class ContestConfig(StudyConfig):
    """contestants: overrides of `optimizer` and `engine`, by label. Each is tuned at every batch size: over these
    octaves of its default lr, and further ones while the best lies at an end. reference: the one drawn in ink."""

    contestants: dict[str, list[str]] = MISSING
    reference: str = MISSING
    batch_sizes: list[int] = MISSING
    octaves: list[float] = MISSING


@dataclass
class GradientDiversityConfig(StudyConfig):
    """shares: of the training labels that are wrong, the first of them 0; epochs: after which a run is looked at, the
    first of them 0; early: the one of them at which claims are about unlearnt labels; sample: examples whose gradients
    are compared in pairs."""

    method: str = MISSING
    shares: list[float] = MISSING
    epochs: list[float] = MISSING
    early: float = MISSING
    sample: int = MISSING


@dataclass
class PrivateConfig(StudyConfig):
    """lrs: of each method, tuned at each epsilon over these octaves of it, and further ones while the best lies at an
    end. max_norm: C; batch_size: the expected one; floor: of the corrected second moment, in units of the noise's
    variance. checked_steps: that are compared with Opacus'; timed_*: the width of both hidden layers, and
    the steps, that are timed."""

    lrs: dict[str, float] = MISSING
    octaves: list[float] = MISSING
    epsilons: list[float] = MISSING
    delta: float = MISSING
    max_norm: float = MISSING
    batch_size: int = MISSING
    epochs: float = MISSING
    floor: float = MISSING
    checked_steps: int = MISSING
    timed_width: int = MISSING
    timed_steps: int = MISSING


@dataclass
class FollowedContestConfig(ContestConfig):
    """The run of every contestant at followed_batch_size and its tuned lr is looked at so often on the way."""

    followed_batch_size: int = MISSING
    looks: int = MISSING


@dataclass
class NoiseScaleConfig(FollowedContestConfig):
    """targets: training losses, in nats, whose critical batch sizes are measured. At each look the noise scale is
    estimated from so many `draws` of `big` examples, by examples, and by shards of `small`."""

    targets: list[float] = MISSING
    draws: int = MISSING
    small: int = MISSING
    big: int = MISSING


@dataclass
class AdamNoiseScaleConfig(FollowedContestConfig):
    """probes: random signs from which traces of the Hessian are estimated at each look."""

    probes: int = MISSING


@dataclass
class LargestBatchConfig(ContestConfig):
    """broken: where invariance ends, of the loss at the smallest batch size. judged_batch_size: at which claims are
    about the loss there. looks: points of the tuned runs, log-spaced, at which curvature, noise and drift are measured,
    over a sample of so many examples of the training set, evenly over it, or all of it."""

    broken: float = MISSING
    judged_batch_size: int = MISSING
    looks: int = MISSING
    sample: int | None = None


@dataclass
class AdaptiveBatchConfig(StudyConfig):
    """method: a BatchInvariantAdam. batch_sizes: fixed ones, of which the first is the slow one to beat. A growing one
    goes from `smallest` to `largest`, over `horizon` examples of noise. octaves: as of a contest."""

    method: str = MISSING
    batch_sizes: list[int] = MISSING
    smallest: int = MISSING
    largest: int = MISSING
    horizon: int = MISSING
    octaves: list[float] = MISSING
    points: int = MISSING


STUDIES: dict[str, type[StudyConfig]] = {
    "running_averages": RunningAveragesConfig,
    "sgd_momentum": SGDMomentumConfig,
    "adam_and_friends": AdamAndFriendsConfig,
    "decoupling": DecouplingConfig,
    "batch_size_invariance": BatchSizeInvarianceConfig,
    "tune_once": TuneOnceConfig,
    "rms_units": RmsUnitsConfig,
    "bias_correction": BiasCorrectionConfig,
    "one_dimensional": OneDimensionalConfig,
    "temperature": TemperatureConfig,
    "drift": DriftConfig,
    "noise_scale": NoiseScaleConfig,
    "preconditioner": ContestConfig,
    "sign_placement": ContestConfig,
    "micro_batch": ContestConfig,
    "token_or_sequence": ContestConfig,
    "horizons": ContestConfig,
    "largest_batch": LargestBatchConfig,
    "adaptive_batch": AdaptiveBatchConfig,
    "gradient_diversity": GradientDiversityConfig,
    "estimators": ContestConfig,
    "adam_noise_scale": AdamNoiseScaleConfig,
    "private": PrivateConfig,
}
