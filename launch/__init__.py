"""Launches runs on Slurm, on this machine or in this process. Nothing here needs torch, so it works on login nodes.

    submit, sweep, doctor, slurm/train.sbatch  ->  srun  ->  node: a torchrun on each node
                                                         ->  job conclude: whether the job is requeued
    status                                     <-  run directories, squeue, sacct

`cluster` alone talks to the scheduler; `job` and `node` run inside a job.
"""
