"""The processes of a run: which rank this one is, how ranks meet, communicate, stop, and notice that one is gone.

    environment what torch and NCCL read from the environment: our defaults
    rendezvous  place from the environment -> store -> process group -> World
    world       the few collectives of a run; the only user of torch.distributed besides rendezvous
    watchdog    a thread per rank: posts its step and phase, reads those of the others, ends a process that is stuck
    suspects    the posts of all ranks -> the rank to blame
    signals     the signals that ask a run to stop
    torchrun    torchrun with a sentence instead of its tracebacks

Only `world`, `rendezvous` and `torchrun` import torch.
"""
