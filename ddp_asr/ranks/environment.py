"""Environment variables that torch reads: our defaults, set before it does; what the user has set stays.

before_torch(os.environ)    # at the start of an entry point, before anything imports torch
before_nccl(os.environ)     # before the process group is made
"""

from collections.abc import MutableMapping

# In the order in which torch 2.11.0 looks for them (c10/cuda/CUDAAllocatorConfig.h); the first that is set counts.
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
ERROR_HANDLING = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING")  # the second is the old name
CLEAN_UP_ONLY = "2"


def before_torch(environment: MutableMapping[str, str]) -> None:
    """What torch reads when it is loaded, or when CUDA starts."""
    # Torch logs broken sockets by itself, beside our one sentence.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Micro-batches have thousands of shapes. Blocks of fixed size fragment the GPU's memory until one no longer fits
    # although enough is free; segments that grow do not.
    if not any(environment.get(name) for name in ALLOCATOR):
        environment[ALLOCATOR[-1]] = "expandable_segments:True"


def before_nccl(environment: MutableMapping[str, str]) -> None:
    """What NCCL's process group reads when it is made.

    TORCH_NCCL_ASYNC_ERROR_HANDLING (torch 2.11.0, ProcessGroupNCCL.hpp): 0 ignores a communicator that has failed, 1
    aborts it and ends the process by SIGABRT, 2 only aborts it, 3, the default, ends the process without aborting. With
    2 this process lives on to say which rank is to blame, and to write status.json.
    """
    given = next((environment[name] for name in ERROR_HANDLING if environment.get(name)), None)
    # torchrun sets 1 for its ranks where the user has set nothing, so under torchrun a 1 is nobody's wish.
    if given is None or (given == "1" and "TORCHELASTIC_RUN_ID" in environment):
        environment[ERROR_HANDLING[0]] = CLEAN_UP_ONLY
