"""Property 2 with 1, 2 and 4 processes on one GPU, by the real program; gloo, as NCCL wants a GPU for each rank."""

from benchmarks.gpu.job import Job
from benchmarks.gpu.tones import make_shards
from benchmarks.gpu.trainings import Training, differences

_ALLOWED = 1e-4  # in float32


def run(job: Job) -> None:
    shards, _ = make_shards(job.folder / "train", utterances=24, seconds=(1, 2), seed=0)
    settings = [
        *(
            f"--data.train={shards}",
            "--data.test=",
            "--train.precision=fp32",
            "--distributed.backend=gloo",
        ),
        *("--batch.max_seconds=6", "--batch.micro_batches=4", "--train.epochs=4", "--data.threads=1"),
    ]
    # All at the same time: most of it is starting, and what is compared does not depend on speed.
    runs = {n: Training(job, f"processes-{n}", settings, processes=n) for n in ((1, 2) if job.small else (1, 2, 4))}
    codes = {n: training.wait() for n, training in runs.items()}
    for n, training in runs.items():
        ended = {"processes": n, "exit status": codes[n], "steps": len(training.lines())}
        if codes[n]:
            job.check("against one process", False, **ended)
            continue
        apart = differences(training, runs[1])
        job.check("against one process", max(apart.values()) <= _ALLOWED, **ended, **apart, allowed=_ALLOWED)
