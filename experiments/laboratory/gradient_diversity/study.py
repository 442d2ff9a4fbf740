"""Gradients of examples against each other along training, and wrong labels found by how long they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.gradient_diversity.analysis import analyse
from experiments.laboratory.gradient_diversity.figure import alternative, caption, draw
from experiments.laboratory.gradient_diversity.findings import findings
from experiments.laboratory.gradient_diversity.follow import followed
from experiments.laboratory.gradient_diversity.tables import TERMS, tables
from experiments.laboratory.problem import data_of, problem_of
from experiments.laboratory.schemas import GradientDiversityConfig
from experiments.laboratory.terms import intervals
from experiments.schemas.model import MLPConfig
from experiments.schemas.run import Config
from experiments.study import Outcome, Study, default_optimizer


class GradientDiversity(Study[GradientDiversityConfig]):
    title = "Diversity of gradients, and wrong labels"
    question = "Are the longest gradients those of wrong labels, and how diverse are gradients along training?"
    source = (
        "Yin et al. 2018, arXiv:1706.05699: gradient diversity bounds the batch size; Paul et al. 2021, "
        "arXiv:2107.07075: GraNd and EL2N; Toneva et al. 2019, arXiv:1812.05159: forgetting events"
    )
    reads = ("data", "model", "train.batch_size", "train.warmup_examples")

    def check(self) -> None:
        super().check()
        s = self.settings
        if len(s.shares) < 2 or s.shares[0] != 0 or not all(0 < share < 0.5 for share in s.shares[1:]):
            raise UserError(f"study.shares={s.shares} must be 0, and then shares of wrong labels below 0.5")
        if s.epochs[0] != 0 or any(a >= b for a, b in pairwise(s.epochs)):
            raise UserError(f"study.epochs={s.epochs} must begin with 0, the initial model, and ascend")
        if s.early not in s.epochs[1:-1]:
            raise UserError(f"study.early={s.early:g} must be one of study.epochs={s.epochs}, before the last")

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        s = self.settings
        if isinstance(config.model, MLPConfig) and config.model.dropout > 0:
            raise UserError("model.dropout must be 0 here: with it an example has another gradient for every mask")
        problem = problem_of(config)
        if data_of(problem).train.y.ndim != 1:
            raise UserError(f"data={config.data.name}: wrong labels are planted where an example has one label")
        return [
            self.measurement(
                config,
                followed,
                s.epochs[-1],
                share=float(share),
                seed=seed,
                problem=problem,
                method=s.method,
                lr=default_optimizer(s.method).lr,
                batch_size=config.train.batch_size,
                warmup=config.train.warmup_examples,
                sample=s.sample,
                epochs=",".join(f"{epoch:g}" for epoch in s.epochs),
            )
            for share, seed in product(s.shares, s.seeds)
        ]

    def outcome(self, results: Sequence[Result]) -> Outcome:
        analysis = analyse(self.settings, results)
        return Outcome(
            tables=tables(analysis),
            findings=findings(analysis),
            draw=lambda theme: draw(analysis, theme),
            caption=caption(analysis),
            alternative=alternative(analysis),
            terms=TERMS | intervals(len(self.settings.seeds)),
        )


STUDY = GradientDiversity
