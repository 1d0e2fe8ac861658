"""Sends runs to Slurm, to this machine, or to the shell at hand; nothing here needs torch, so login nodes will do.

    submit, sweep, doctor   ->   cluster.submit   ->   sbatch, srun   ->   job.Training on every rank
                                                                            job conclude, when all have ended
    status                  <-   run directories, squeue, sacct

`cluster` is all that talks to the scheduler; `job` is all that runs inside a job.
"""
