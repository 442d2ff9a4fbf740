"""What ends invariance to the batch size near the tuned learning rate, and whether that can be pushed."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from itertools import product

from experiments.contest.analysis import Contest
from experiments.contest.followed import check_followed, examples_of, runs_of
from experiments.contest.plan import ContestStudy, tuned_octave
from experiments.contest.tables import TERMS, tables
from experiments.errors import UserError
from experiments.estimate import Finding
from experiments.jobs import Job, Result
from experiments.laboratory.largest_batch.analysis import Analysis, analyse
from experiments.laboratory.largest_batch.figure import alternative, caption, draw
from experiments.laboratory.largest_batch.findings import BATCHES, EXAMPLES, findings
from experiments.laboratory.largest_batch.look import look
from experiments.laboratory.largest_batch.tables import own_tables, own_terms
from experiments.laboratory.problem import problem_of
from experiments.laboratory.schemas import LargestBatchConfig
from experiments.laboratory.terms import DIVERGED, intervals
from experiments.schemas.optimizer import BatchInvariantAdamConfig, SaturatingAdamConfig
from experiments.schemas.run import Config
from experiments.study import Outcome

LOWER = 2  # octaves below the tuned learning rate, over which invariance is seen to end later


class LargestBatch(ContestStudy[LargestBatchConfig]):
    title = "The largest batch"
    question = "What ends invariance to the batch size near the tuned learning rate, and can that be pushed?"
    source = (
        "Cohen et al. 2022, arXiv:2207.14484: the edge of stability of Adam; McCandlish et al. 2018, arXiv:1812.06162: "
        "the gradient noise scale"
    )

    def required(self) -> Sequence[str]:
        return (EXAMPLES, BATCHES)

    def check(self) -> None:
        super().check()
        optimizers = {label: one.optimizer for label, one in self.contestants().items()}
        if strange := [label for label, o in optimizers.items() if not isinstance(o, BatchInvariantAdamConfig)]:
            raise UserError(f"study.contestants: {', '.join(strange)} must be kinds of BatchInvariantAdam")
        if len(self.settings.batch_sizes) < 2 or self.settings.looks < 1:
            raise UserError("study.batch_sizes must be two or more, and study.looks 1 or more")
        if self.settings.judged_batch_size not in self.settings.batch_sizes:
            raise UserError(
                f"study.judged_batch_size={self.settings.judged_batch_size} is none of {self.settings.batch_sizes}"
            )

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        check_followed(config)
        trained = runs_of(known)
        jobs = super().jobs(config, trained)
        for label in self.settings.contestants if trained else ():
            best = self.tuned(label, trained)
            if best is not None:
                saturating = isinstance(self.contestants()[label].optimizer, SaturatingAdamConfig)
                jobs += self.away(config, label, best, 1 if saturating else LOWER)
                jobs += [] if saturating else self.looks(config, label, best)
        return list({job.directory: job for job in jobs}.values())

    def tuned(self, label: str, trained: Sequence[Result]) -> float | None:
        """The octave of the best learning rate at the smallest batch size, once it has a neighbour on either side."""
        (losses,) = self.losses(trained, label, min(self.settings.batch_sizes))
        return tuned_octave(self.settings.octaves, losses)

    def away(self, config: Config, label: str, best: float, lower: int) -> list[Job]:
        """Runs at all batch sizes with the learning rate tuned at the smallest, and so many octaves lower."""
        one = self.contestants()[label]
        of_one = dataclasses.replace(config, engine=one.engine)
        lr, octaves = one.optimizer.lr, [best - below for below in range(lower + 1)]
        return [
            self.training(
                of_one,
                dataclasses.replace(one.optimizer, lr=lr * 2**octave),
                B,
                seed,
                contestant=label,
                octave=octave,
            )
            for B, octave, seed in product(self.settings.batch_sizes, octaves, self.settings.seeds)
        ]

    def looks(self, config: Config, label: str, best: float) -> list[Job]:
        s, home = self.settings, min(self.settings.batch_sizes)
        return [
            self.measurement(
                config,
                look,
                problem=problem_of(config),
                overrides=shlex.join(s.contestants[label]),
                lr=self.contestants()[label].optimizer.lr * 2**best,
                batch_size=home,
                warmup=config.train.warmup_examples,
                examples=examples_of(config, home),
                looks=s.looks,
                longest=max(s.batch_sizes),
                sample=s.sample,
                seed=seed,
            )
            for seed in s.seeds
        ]

    def findings(self, found: Contest) -> list[Finding]:
        assert isinstance(found, Analysis)
        return findings(found)

    def outcome(self, results: Sequence[Result]) -> Outcome:
        optimizers = {label: one.optimizer for label, one in self.contestants().items()}
        found = analyse(self.settings, results, optimizers)
        return Outcome(
            tables=[*own_tables(found), *tables(found)],
            findings=[*self.findings(found), *found.notes()],
            draw=lambda theme: draw(found, theme),
            caption=caption(found),
            alternative=alternative(found),
            terms=own_terms(self.settings) | TERMS | intervals(len(self.settings.seeds)) | DIVERGED,
        )


STUDY = LargestBatch
