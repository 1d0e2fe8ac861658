"""How fast the real program trains the production model from FLAC on the disk, and what it waits for."""

import statistics

from benchmarks.gpu.job import Job
from benchmarks.gpu.tones import make_shards
from benchmarks.gpu.trainings import Training
from ddp_asr.files import read_json


def run(job: Job) -> None:
    # A few recordings many times over: what is measured is a step, and synthesis would take longer than it.
    utterances, seconds, copies = (24, (1.0, 2.0), 2) if job.small else (120, (8.0, 16.0), 12)
    shards, hours = make_shards(job.folder / "train", utterances=utterances, seconds=seconds, seed=0, copies=copies)
    for threads in (1,) if job.small else (2, 8):
        training = Training(
            job,
            f"threads-{threads}",
            [f"--data.train={shards}", "--data.test=", f"--data.threads={threads}", "--train.epochs=1"],
        )
        job.check("from FLAC on the disk", training.wait() == 0, threads=threads, **_speed(training), hours=hours)


def _speed(training: Training) -> dict[str, object]:
    """Medians without the first two steps, in which libraries are set up."""
    lines = training.lines()[2:]
    if not lines:
        return {}
    return {
        "steps": len(lines),
        "audio-h per GPU-s": statistics.median(line["audio_s_per_s"] for line in lines) / 3600,
        "waits for data": statistics.median(line["data_wait"] for line in lines),
        "padding": statistics.median(line["padding"] for line in lines),
        "GPU memory GB": lines[-1]["gpu_memory_gb"],
        "fused": (read_json(training.run / "environment.json") or {}).get("fused_micro_batches"),
    }
