"""The rehearsal: how many micro-batches run as one batch, and what a lack of memory becomes."""

import re
from pathlib import Path

import pytest
import torch

from ddp_asr.config import load_config
from ddp_asr.data.corpus import read_corpus
from ddp_asr.errors import UserError
from ddp_asr.features.log_mel import LogMel
from ddp_asr.model import AcousticModel, make_model
from ddp_asr.objective import Objective
from ddp_asr.ranks.world import World
from ddp_asr.training import rehearsal, session
from ddp_asr.training.learner import Learner
from ddp_asr.training.optim import make_optimizer
from ddp_asr.training.rehearsal import is_out_of_memory, rehearse, sizes_to_try

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def corpus_and_learner(tiny_corpus):
    path, *overrides = tiny_corpus.arguments(Path("runs"))[1:]
    config = load_config(Path(path), overrides)
    corpus = read_corpus(config)
    model = make_model(config, corpus.tokeniser.size)
    learner = Learner(
        world=World(0, 1, 0, CPU),
        model=model,
        log_mel=LogMel(config.features),
        objective=Objective(config.objective, seed=0, frame_s=config.frame_s),
        optimizer=make_optimizer(model, config.optim),
        optim=config.optim,
        precision="fp32",
    )
    return corpus, learner


@pytest.fixture
def memory_for(monkeypatch):
    """A GPU's memory that is full beyond so many samples of a batch; returns the sizes that were tried."""

    def give(most_samples, error=torch.OutOfMemoryError):
        tried, accumulate = [], Learner.accumulate

        def limited(self, batch, *, step, last):
            tried.append(batch.waveforms.numel())
            if batch.waveforms.numel() > most_samples:
                raise error("CUDA out of memory. Tried to allocate 20.00 MiB")
            return accumulate(self, batch, step=step, last=last)

        monkeypatch.setattr(Learner, "accumulate", limited)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: tried.append(0))
        return tried

    return give


def samples_of(corpus, fuse):
    """Samples of the largest batch of so many micro-batches."""
    largest = corpus.plan.largest_micro_batches(corpus.target_lengths, fuse).values()
    slowest = min(corpus.plan.speeds)
    return max(len(rows) * round(int(corpus.index.samples[rows].max()) / slowest) for rows in largest)


def test_on_a_gpu_the_whole_share_is_tried_first_and_halved():
    assert sizes_to_try(0, 32, CUDA) == [32, 16, 8, 4, 2, 1]
    assert sizes_to_try(0, 11, CUDA) == [11, 6, 3, 2, 1]
    assert sizes_to_try(0, 1, CUDA) == [1]
    assert sizes_to_try(4, 11, CUDA) == sizes_to_try(4, 11, CPU) == [4]
    assert sizes_to_try(40, 11, CUDA) == [11]
    assert sizes_to_try(0, 11, CPU) == [1]


@pytest.mark.parametrize("fits", [4, 2, 1])
def test_what_does_not_fit_is_halved_until_it_does(corpus_and_learner, memory_for, fits):
    corpus, learner = corpus_and_learner
    tried = memory_for(samples_of(corpus, fits))
    found = rehearse(corpus, learner, sizes_to_try(0, 4, CUDA))
    assert found.fuse == fits
    too_large = [line for line in found.lines if "need too much memory" in line]
    assert [int(line.split()[0]) for line in too_large] == {4: [], 2: [4], 1: [4, 2]}[fits]
    assert tried.count(0) == len(too_large)  # what a failed size leaves in the cache is given back
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_one_micro_batch_that_does_not_fit_is_an_error(corpus_and_learner, memory_for):
    corpus, learner = corpus_and_learner
    memory_for(samples_of(corpus, 1) - 1)
    with pytest.raises(UserError, match=r"^the \w+ \w+ of the plan \(\d+ .* does not fit .* lower batch.max_seconds"):
        rehearse(corpus, learner, sizes_to_try(0, 4, CUDA))


def test_a_number_that_was_set_is_not_halved(corpus_and_learner, memory_for):
    corpus, learner = corpus_and_learner
    memory_for(samples_of(corpus, 2) - 1)
    with pytest.raises(UserError, match=r"does not fit .*: lower train.fuse_micro_batches, .* 0 finds"):
        rehearse(corpus, learner, sizes_to_try(2, 4, CPU))


def test_several_have_to_leave_some_memory_free(corpus_and_learner, monkeypatch):
    """Steps of other shapes need more than the rehearsal did; a single micro-batch has nothing to fall back to."""
    corpus, learner = corpus_and_learner
    monkeypatch.setattr(rehearsal, "_memory_bytes", lambda device: 100.0)
    monkeypatch.setattr(rehearsal, "_peak_bytes", lambda batch, learner: 95)
    found = rehearse(corpus, learner, sizes_to_try(0, 4, CUDA))
    assert (found.fuse, found.peak_bytes) == (1, 95)
    monkeypatch.setattr(rehearsal, "_peak_bytes", lambda batch, learner: 89)
    assert rehearse(corpus, learner, sizes_to_try(0, 4, CUDA)).fuse == 4


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:40],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("lacks", ["the model", "the optimiser"])
def test_a_model_that_the_gpu_does_not_hold_is_said_in_a_sentence(tiny_corpus, monkeypatch, lacks):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    owner, name = (AcousticModel, "to") if lacks == "the model" else (session, "make_optimizer")
    monkeypatch.setattr(owner, name, no_memory)
    path, *overrides = tiny_corpus.arguments(Path("runs"))[1:]
    config = load_config(Path(path), overrides)
    with pytest.raises(UserError, match=r"^cpu of rank 0 has too little free memory for the [\d,]+ parameters"):
        session.make_learner(config, World(0, 1, 0, CPU), read_corpus(config), None)


def test_another_error_passes(corpus_and_learner, memory_for):
    corpus, learner = corpus_and_learner

    def illegal(text):
        return RuntimeError("CUDA error: an illegal memory access was encountered")

    memory_for(0, illegal)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        rehearse(corpus, learner, [4, 2, 1])
    learner.discard()
