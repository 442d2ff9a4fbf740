"""Adam and RMSProp with momentum, with and without the correction of their averages' start from zero."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.bias_correction.analysis import TERMS, alternative, analyse, findings, tables
from experiments.laboratory.bias_correction.figure import draw
from experiments.laboratory.bias_correction.moments import VARIANTS, Moments
from experiments.laboratory.digits import examples, log_spaced, losses, network, refuse_others, training
from experiments.laboratory.schemas import BiasCorrectionConfig
from experiments.schemas.run import Config
from experiments.study import Outcome, Study

POINTS = 20


class BiasCorrection(Study[BiasCorrectionConfig]):
    title = "Bias correction"
    question = "Is bias correction what makes Adam better than RMSProp with momentum?"
    source = "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: the guess that it is; Kingma & Ba 2015, section 6.4"

    def check(self) -> None:
        super().check()
        if self.settings.warmups[0] != 0:
            raise UserError(f"study.warmups={self.settings.warmups} must begin with 0, no warm-up")

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        refuse_others(config)
        settings = self.settings
        return [
            self.measurement(
                config,
                trained,
                cost=settings.epochs,
                variant=variant,
                warmup=warmup,
                lr=settings.lr * 2**octave,
                seed=seed,
                batch_size=settings.batch_size,
                epochs=settings.epochs,
                beta1=settings.betas[0],
                beta2=settings.betas[1],
                eps=settings.eps,
            )
            for variant, warmup, octave, seed in product(VARIANTS, settings.warmups, settings.octaves, settings.seeds)
        ]

    def outcome(self, results: Sequence[Result]) -> Outcome:
        settings = self.settings
        counts = log_spaced(settings.batch_size, settings.epochs, POINTS)
        analysis = analyse(results, settings.early_epochs * len(examples()), counts)
        return Outcome(
            tables=tables(analysis),
            findings=findings(analysis),
            draw=lambda theme: draw(analysis, theme),
            caption=(
                "Training loss on the digits, each variant at the learning rate that is best for its final loss, "
                f"geometric mean over {len(settings.seeds)} seeds with 95% intervals. Top: without warm-up; "
                "with the best of the warm-ups. Bottom: final loss along the learning rate."
            ),
            alternative=alternative(analysis),
            terms=TERMS,
        )


def trained(
    variant: str,
    warmup: int,
    lr: float,
    seed: int,
    batch_size: int,
    epochs: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> list[float]:
    """The learning curve: training losses at `log_spaced` counts of examples."""
    model = network(seed)
    moments = Moments(model.parameters(), VARIANTS[variant], (beta1, beta2), eps)
    counts = log_spaced(batch_size, epochs, POINTS)
    steps = training(
        model, lambda k: moments.step(lr * k), batch_size=batch_size, seed=seed, warmup=warmup, counts=counts
    )
    return losses(model, steps, len(counts))


STUDY = BiasCorrection
