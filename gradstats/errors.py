"""Every refusal of gradstats is one of these; the text names the parameter, the reason and the way out."""


class GradstatsError(RuntimeError):
    """Base class of all errors raised by gradstats."""


class CoverageError(GradstatsError):
    """The model, or the way it was called, has no exact per-example statistics with this engine."""


class LifetimeError(GradstatsError):
    """A statistic was asked for, or would have been formed, from a mixture of backward passes."""


class MissingStatistic(GradstatsError, LookupError):
    """A statistic that nothing has computed."""


class VerificationError(GradstatsError):
    """A statistic differs from the oracle by more than the tolerance."""
