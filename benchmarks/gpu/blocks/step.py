"""Whole steps of the production model through the real loop, by the number of micro-batches that run as one batch."""

from benchmarks.gpu import production
from benchmarks.gpu.job import Job


def run(job: Job) -> None:
    config = production.settings(job.small)
    corpus = production.make_corpus(config, small=job.small)
    together = config.batch.micro_batches
    # All together and all apart first: the others lie between.
    groups = sorted({together, 1, 8, 16, 4} & set(range(1, together + 1)), key=lambda n: (n not in (together, 1), -n))
    reference: production.Step | None = None
    for fuse in groups:
        learner = production.make_learner(config, corpus, job.device)
        table, values = f"K = {together}, {learner.precision}", {"micro-batches a batch": fuse}
        with job.guarding(table, **values):
            steps = 2 if fuse == 1 else 3  # apart a step takes seconds, and the first is not counted
            batches = production.first_batches(config, corpus, steps=steps, fuse=fuse)
            first, *measured = production.train(learner, config, batches, steps=steps)
            reference = reference or first
            computed = sum(batch.waveforms.numel() for batch in batches)
            job.row(
                table,
                **values,
                **production.describe(measured),
                padding=1 - sum(batch.audio_samples for batch in batches) / computed,
                **{
                    "loss of step 1": first.loss,
                    "its difference": abs(first.loss - reference.loss) / reference.loss,
                    "norm's difference": abs(first.norm - reference.norm) / reference.norm,
                },
            )
