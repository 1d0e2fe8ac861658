"""The real program, stopped by SIGTERM and killed by SIGKILL, is the run that was not disturbed; then error rates."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.job import REPOSITORY, Job
from benchmarks.gpu.tones import make_shards
from benchmarks.gpu.trainings import Training, differences

_ALLOWED = 1e-4  # in float32, where kernels do not add in a fixed order


def run(job: Job) -> None:
    utterances, seconds = (12, (1, 2)) if job.small else (96, (2, 8))
    train, _ = make_shards(job.folder / "train", utterances=utterances, seconds=seconds, seed=0)
    test, _ = make_shards(job.folder / "test", utterances=utterances // 4, seconds=seconds, seed=1)
    settings = [
        *(f"--data.train={train}", f"--data.test={test}", "--train.precision=fp32", "--train.save_every_steps=4"),
        *(
            f"--batch.max_seconds={3 if job.small else 24}",
            "--batch.micro_batches=4",
            f"--train.epochs={4 if job.small else 8}",
        ),
        *("--optim.learning_rate=1e-3", "--augment.speeds=1"),
    ]
    undisturbed = Training(job, "undisturbed", settings)  # beside the other one: most of it is starting
    disturbed = _disturb(job, settings)
    job.check("stops", undisturbed.wait() == 0, what="undisturbed, to its end", step=len(undisturbed.lines()))
    apart = differences(disturbed, undisturbed)
    job.check("disturbed against undisturbed", max(apart.values()) <= _ALLOWED, **apart, allowed=_ALLOWED)
    first, last = undisturbed.lines()[0], undisturbed.lines()[-1]
    tested = undisturbed.lines("test")[-1]
    job.row(
        "what it learned",
        steps=last["step"],
        **{"first loss": first["loss"], "last loss": last["loss"], "test loss": tested["loss"], "WER": tested["wer"]},
    )
    _evaluate(job, undisturbed.run, test)


def _disturb(job: Job, settings: list[str]) -> Training:
    """A run that goes on twice; rows for each stop."""
    training = Training(job, "disturbed", settings)
    training.wait_for_step(3)
    seconds = training.stop(signal.SIGTERM)
    status = training.status()
    job.check(
        "stops", status.get("state") == "stopped", what="SIGTERM", step=status.get("step"), **{"s to its end": seconds}
    )
    training, started = Training(job, "disturbed", settings), time.perf_counter()
    training.wait_for_step(status["step"] + 1)
    job.row("stops", what="resumed", step=status["step"], **{"s to its first step": time.perf_counter() - started})
    if not job.small:
        training.wait_for_step(status["step"] + 5)
        training.kill()
        reached = len(training.lines())
        job.check("stops", training.status().get("state") == "running", what="SIGKILL", step=reached)
        training = Training(job, "disturbed", settings)
    code = training.wait()
    job.check("stops", code == 0, what="resumed, to its end", step=training.status().get("step"))
    return training


def _evaluate(job: Job, run: Path, test: Path) -> None:
    """The same checkpoint on the GPU and on the CPU, at the same time."""
    ways = {"CPU, fp32": ("fp32", {"CUDA_VISIBLE_DEVICES": ""})}
    if job.on_gpu:
        ways |= {"GPU, fp32": ("fp32", {}), "GPU, bf16": ("bf16", {})}
    command = [sys.executable, "-m", "ddp_asr", "evaluate", str(run), str(test), "--json", "--precision"]
    started = {
        name: subprocess.Popen(
            [*command, precision], cwd=REPOSITORY, env={**os.environ, **environment}, stdout=subprocess.PIPE
        )
        for name, (precision, environment) in ways.items()
    }
    answers: dict[str, dict[str, Any]] = {name: json.loads(popen.communicate()[0]) for name, popen in started.items()}
    reference = answers["CPU, fp32"]
    for name, answer in answers.items():
        apart = abs(answer["loss"] - reference["loss"]) / reference["loss"]
        values = {"run": name, "WER": answer["wer"], "CER": answer["cer"], "loss": answer["loss"], "difference": apart}
        if name.endswith("fp32"):
            job.check("evaluation", apart <= _ALLOWED, **values, allowed=_ALLOWED)
        else:
            job.row("evaluation", **values)
