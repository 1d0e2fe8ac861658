"""A whole training step on a CUDA GPU that is not there (fake_cuda.py): one device, and no hidden wait for it.

Every registered encoder and every term of the objective, in each precision: loader, features, masks, encoder, losses,
backward, clipping, AdamW, moving average, and what a save and an evaluation add. A new kind of encoder, and a new term
of the loss, gets these tests by its line in tests/tiny_encoders.py or tests/tiny_training.py.

What this does not show: what a kernel computes, how much memory it takes and how fast it is (tests/test_gpu.py), and
anything of NCCL, since there is one rank.
"""

import inspect
import itertools
from contextlib import closing
from pathlib import Path

import pytest
import torch

from ddp_asr import objective
from ddp_asr.config import load_config
from ddp_asr.data.corpus import read_corpus
from ddp_asr.data.index import read_index
from ddp_asr.data.loader import eval_loader, on_device, train_loader
from ddp_asr.decoding import beam, make_decoder
from ddp_asr.decoding.bonuses import make_bonuses
from ddp_asr.encoders import ENCODERS, rescnn_bigru
from ddp_asr.features import masks
from ddp_asr.ranks.signals import StopRequest
from ddp_asr.ranks.world import World
from ddp_asr.recognition.evaluation import recognise
from ddp_asr.recognition.recogniser import Recogniser
from ddp_asr.runs import checkpoint
from ddp_asr.training import optim
from ddp_asr.training.learner import Learner
from ddp_asr.training.loop import Evaluation, Hooks, Progress, Trainer
from ddp_asr.training.precision import set_matmul_precision
from ddp_asr.training.session import make_learner, make_schedule
from tests import tiny_encoders
from tests import tiny_training as tiny
from tests.fake_cuda import COPIES, DEVICE, READS, SENDS, FakeCuda, Wait, backward
from tests.test_kneser_ney import model_of

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")

REFUSED, WAITS = "a tensor of the host meets one of the GPU", "the host waits for the GPU"

NORM = "norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip_norm))  # waits for the GPU"
CTC = "losses = torch.nn.functional.ctc_loss("
RECOGNISED = "losses = ctc_loss(logits, frames, batch.targets.to(logits.device), batch.target_lengths).tolist()"
PATHS = "paths, scores = best[:, :, 0].cpu().numpy(), log_probabilities[:, :, 0].cpu().numpy()  # (B, T')"
# Where the host may wait for the GPU: (file, line of code, what it does). A new one is a decision, and needs a reason.
ALLOWED = {
    # Torch's kernels of CTC take lengths of the host and send them. Besides, torch 2.11.0 copies the targets to the
    # host for a test that only AMD's library can pass (LossCTC.cpp); that costs little beside the wait after it.
    ("ddp_asr/objective.py", CTC, SENDS): "once a CTC loss",
    ("ddp_asr/objective.py", CTC, COPIES): "once a CTC loss",
    ("ddp_asr/training/learner.py", "self.scaler.scale(losses.sum()).backward()", SENDS): "once a CTC loss",
    ("ddp_asr/training/loop.py", "tally.loss = float(per_utterance.sum(dtype=torch.float64))", READS): "once a step",
    ("ddp_asr/training/learner.py", NORM, READS): "once a step",
    ("ddp_asr/training/learner.py", '"scaler": self.scaler.state_dict(),', READS): "once a save in fp16",
}
ALLOWED_BESIDE_STEPS = {
    ("ddp_asr/runs/checkpoint.py", 'return state.detach().to("cpu", copy=True)', COPIES): "a save: every tensor of it",
    ("ddp_asr/decoding/greedy.py", PATHS, COPIES): "an evaluation: once a micro-batch",
    ("ddp_asr/recognition/evaluation.py", RECOGNISED, SENDS): "an evaluation: once a micro-batch",
    ("ddp_asr/recognition/evaluation.py", RECOGNISED, READS): "an evaluation: once a micro-batch",
}


@pytest.fixture(autouse=True)
def switches_as_they_were():
    yield
    set_matmul_precision("fp32")
    torch.backends.cudnn.allow_tf32 = True


def train(
    tiny_corpus, *options: str, kind: str | None = None, micro_batches: int = 1, save_and_evaluate: bool = False
) -> list[Wait]:
    """A step on the GPU that is not there, and what follows it; returns where the host waited."""
    path, *given = tiny_corpus.arguments(Path("runs"), "run", *options, kind=kind)[1:]
    config = load_config(Path(path), [*given, f"--batch.micro_batches={micro_batches}", "--train.epochs=1"])
    corpus = read_corpus(config)
    test = read_index(config.data.test)
    with FakeCuda() as gpu:
        set_matmul_precision(config.train.precision)
        learner = make_learner(config, World(0, 1, 0, DEVICE), corpus, None)
        gpu.waits.clear()  # the weights were sent there

        def evaluate(step, should_stop):
            if save_and_evaluate:
                recogniser = Recogniser(
                    config,
                    corpus.tokeniser,
                    learner.log_mel,
                    learner.plain_model,
                    make_decoder(config.decoder, corpus.tokeniser, config.frame_s),
                    DEVICE,
                    learner.precision,
                )
                eval_batches = eval_loader(test, corpus.tokeniser, config, pin_memory=True)
                with closing(eval_batches), learner.averaged_weights():
                    recognise(recogniser, test, itertools.islice(eval_batches, 1))
            return Evaluation(score=None)

        hooks = Hooks(
            log=lambda line: None,
            save=lambda state, best: checkpoint.snapshot(state) if save_and_evaluate else None,
            flush=lambda: None,
            message=pytest.fail,
            evaluate=evaluate,
            dump=lambda step, batches: None,
        )
        trainer = Trainer(learner.world, learner, make_schedule(config, 1), hooks, StopRequest())
        batches = train_loader(
            corpus.index, corpus.tokeniser, corpus.plan, config, rank=0, world_size=1, pin_memory=True
        )
        with closing(on_device(batches, DEVICE)) as sent:
            assert trainer.run(sent, range(micro_batches), Progress()).state == "done"
        assert trainer.progress.skipped == 0
    return gpu.waits


def check(waits: list[Wait], allowed: dict[tuple[str, str, str], str] = ALLOWED) -> None:
    hidden = {str(wait) for wait in waits if (wait.file, wait.code, wait.why) not in allowed}
    assert not hidden, "\n".join([f"{WAITS}, and ALLOWED does not list it:", *sorted(hidden)])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_in_every_precision(tiny_corpus, kind, precision):
    options = tiny.OBJECTIVES["all of it"]
    check(train(tiny_corpus, f"--train.precision={precision}", *options, kind=kind))


@pytest.mark.parametrize("kind, number", [(kind, number) for kind, number in tiny_encoders.CASES if number])
def test_every_setting_of_an_encoder(tiny_corpus, kind, number):
    settings = tiny_encoders.SETTINGS[kind][number].items()
    options = [f"--encoder.{name}={','.join(map(str, v)) if isinstance(v, list) else v}" for name, v in settings]
    check(train(tiny_corpus, "--train.precision=bf16", *options, kind=kind))


@pytest.mark.parametrize("name", [name for name in tiny.OBJECTIVES if name != "all of it"])
def test_every_term_of_the_objective(tiny_corpus, name):
    check(train(tiny_corpus, "--train.precision=fp16", *tiny.OBJECTIVES[name]))


def test_every_wait_that_is_listed_is_there(tiny_corpus):
    waits = train(tiny_corpus, "--train.precision=fp16", micro_batches=2, save_and_evaluate=True)
    check(waits, ALLOWED | ALLOWED_BESIDE_STEPS)
    assert {(wait.file, wait.code, wait.why) for wait in waits} == ALLOWED.keys() | ALLOWED_BESIDE_STEPS.keys()


@pytest.mark.parametrize("symbols_per_frame", [0, 3])
@pytest.mark.parametrize("form", ["table", "arcs"])
def test_a_beam_search_stays_on_the_device(form, symbols_per_frame):
    arcs = model_of([list("a bee"), list("cab fed hg")], 3)[0].arcs("abcdefgh ")
    lm = arcs if form == "arcs" else arcs.table()
    with FakeCuda() as gpu:
        text_model = beam.make_text_model(make_bonuses("abcdefgh ", 0.1, 0.2, ["bee", "a"], 2.0), lm, 0.5)
        text_model = text_model.to(DEVICE, torch.float32)
        gpu.waits.clear()  # the language model was sent there
        logits, frames = torch.zeros(3, 7, 10, dtype=torch.bfloat16, device=DEVICE), torch.tensor([7, 0, 4])
        found, scores = beam.search(beam.log_probabilities(logits, frames), text_model, 8, symbols_per_frame)
    assert (found.shape, scores.shape) == ((3, 8, 7), (3, 8))
    assert (found.device, scores.device, scores.dtype) == (DEVICE, DEVICE, torch.float32)
    check(gpu.waits, {})


# ---- that it catches -----------------------------------------------------------------------------------------------
# Faulty versions of functions of ours. Each has its fault on the line that is marked, and that line must be named.


def cpu_arange_in_the_frame_mask(patch):
    def frame_mask(frames, longest, device):
        return torch.arange(longest) < frames.to(device, non_blocking=True)[:, None]  # fault

    patch.setattr(rescnn_bigru, "frame_mask", frame_mask)


def cpu_zeros_in_the_state_of_the_gru(patch):
    def run_gru(gru, x):
        state = torch.zeros(1, x.shape[1], gru.hidden_size)
        return torch.gru(x, state, gru.all_weights[0], True, 1, 0.0, True, False, False)[0]  # fault

    patch.setattr(rescnn_bigru, "run_gru", run_gru)


def a_number_read_in_the_encoder(patch):
    def run_gru(gru, x):
        return gru_before(gru, x / max(1.0, x.abs().max().item()))  # fault

    gru_before = rescnn_bigru.run_gru
    patch.setattr(rescnn_bigru, "run_gru", run_gru)


def masks_made_on_the_host(patch):
    def hidden(spans, length):
        return hidden_before(spans.cpu(), length).to(spans.device)  # fault

    hidden_before = masks._hidden
    patch.setattr(masks, "_hidden", hidden)


def double_constant_on_the_host_in_the_loss(patch):
    def log_probabilities(logits):
        return logits.float().log_softmax(-1) + torch.zeros(logits.shape[-1], dtype=torch.float64)  # fault

    patch.setattr(objective, "log_probabilities", log_probabilities)


def boolean_index_in_the_loss(patch):
    def ctc_loss(*arguments):
        losses = ctc_before(*arguments)
        losses[losses.isinf()].sum()  # fault
        return losses

    ctc_before = objective.ctc_loss
    patch.setattr(objective, "ctc_loss", ctc_loss)


def constant_sent_in_every_loss(patch):
    def ctc_loss(logits, *arguments):
        return ctc_before(logits, *arguments) * torch.tensor([1.0], device=logits.device)  # fault

    ctc_before = objective.ctc_loss
    patch.setattr(objective, "ctc_loss", ctc_loss)


def decision_of_the_host_in_the_optimiser(patch):
    def update(average, parameters):
        if average.weights[0].isfinite().all():  # fault
            update_before(average, parameters)

    update_before = optim.WeightAverage.update
    patch.setattr(optim.WeightAverage, "update", update)


def cpu_tensor_in_a_backward_pass(patch):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.ones(gradient.shape)  # fault

    def log_probabilities(logits):
        return Scale.apply(log_probabilities_before(logits))

    log_probabilities_before = objective.log_probabilities
    patch.setattr(objective, "log_probabilities", log_probabilities)


def losses_kept_by_the_host(patch):
    def accumulate(learner, *arguments, **named):
        losses = accumulate_before(learner, *arguments, **named)
        return losses.to("cpu", non_blocking=True).to(losses.device)  # fault

    accumulate_before = Learner.accumulate
    patch.setattr(Learner, "accumulate", accumulate)


FAULTS = [
    cpu_arange_in_the_frame_mask,
    cpu_zeros_in_the_state_of_the_gru,
    a_number_read_in_the_encoder,
    masks_made_on_the_host,
    double_constant_on_the_host_in_the_loss,
    boolean_index_in_the_loss,
    constant_sent_in_every_loss,
    decision_of_the_host_in_the_optimiser,
    cpu_tensor_in_a_backward_pass,
    losses_kept_by_the_host,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_and_its_line_is_named(tiny_corpus, monkeypatch, fault):
    fault(monkeypatch)
    lines, first = inspect.getsourcelines(fault)
    (line,) = (number for number, line in enumerate(lines, start=first) if "# fault" in line)
    with pytest.raises(AssertionError, match=rf"test_fake_cuda\.py:{line}: .*# fault"):
        check(train(tiny_corpus, "--encoder.residual_blocks=1", "--encoder.rnn_layers=1"))


def _fused_adamw(x, step):
    rates = {"lr": 1.0, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0, "eps": 1e-8}
    torch._fused_adamw_([x], [x], [x], [x], [], [step], amsgrad=False, maximize=False, **rates)


OPERATIONS = {
    "": [
        lambda x, host, number: x * number,
        lambda x, host, number: torch.where(x > 0, x, number),
        lambda x, host, number: x.__setitem__(x > 0, 0.0),
        lambda x, host, number: host[0].to(DEVICE, non_blocking=True),
        lambda x, host, number: host.pin_memory().to(DEVICE, non_blocking=True),
        lambda x, host, number: torch.full((3,), 1.0, device=DEVICE),
        lambda x, host, number: _fused_adamw(x, step=x.sum()),
    ],
    REFUSED: [
        lambda x, host, number: x + host,
        lambda x, host, number: x.sum() + host,
        lambda x, host, number: x[torch.tensor([0, 1])],
        lambda x, host, number: torch.stack([x.sum(), number]),
        lambda x, host, number: torch._foreach_lerp_([x], [host], 0.1),
        lambda x, host, number: _fused_adamw(x, step=number),
    ],
    WAITS: [
        lambda x, host, number: x[x > 0],
        lambda x, host, number: x.__setitem__(x > 0, x.sum()),
        lambda x, host, number: x.nonzero(),
        lambda x, host, number: torch.equal(x, x),
    ],
    READS: [
        lambda x, host, number: x.sum().item(),
        lambda x, host, number: bool(x.sum() > 0),
        lambda x, host, number: x[0].tolist(),
        lambda x, host, number: x[: x.long().sum()],
    ],
    COPIES: [
        lambda x, host, number: x.cpu(),
        lambda x, host, number: x.to("cpu", non_blocking=True),
        lambda x, host, number: host.copy_(x),
    ],
    SENDS: [
        lambda x, host, number: torch.tensor([1.0], device=DEVICE),
        lambda x, host, number: host.to(DEVICE, non_blocking=True),
        lambda x, host, number: host.pin_memory().to(DEVICE),
        lambda x, host, number: x.copy_(host),
    ],
}


@pytest.mark.parametrize(
    "expected, operation", [(expected, operation) for expected, group in OPERATIONS.items() for operation in group]
)
def test_an_operation_is_free_or_refused_or_waits(expected, operation):
    with FakeCuda() as gpu:
        try:
            operation(torch.ones(4, 3, device=DEVICE), torch.ones(4, 3), torch.tensor(2.0))
            found = {wait.why for wait in gpu.waits}
        except AssertionError as error:
            found = {str(error).split(":")[0]}
    assert found == ({expected} if expected else set())


def test_the_graph_is_walked_as_torchs_engine_does(tiny_corpus):
    """Real tensors of the host, by both: every node of the step's graph, and every gradient."""
    path, *given = tiny_corpus.arguments(Path("runs"), "run", *tiny.OBJECTIVES["all of it"])[1:]
    config = load_config(Path(path), given)
    corpus = read_corpus(config)
    learner = make_learner(config, World(0, 1, 0, torch.device("cpu")), corpus, None)
    batch = next(train_loader(corpus.index, corpus.tokeniser, corpus.plan, config, rank=0, world_size=1))
    loss = learner.losses(batch, step=1).sum()
    loss.backward(retain_graph=True)
    expected = [parameter.grad for parameter in learner.model.parameters()]
    learner.discard()
    backward(loss)
    for parameter, gradient in zip(learner.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
