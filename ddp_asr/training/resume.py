"""What an attempt goes on from, and what must match; this module only reads.

path = find_checkpoint(run, "auto", checkpoint_saved, message)   # rank 0 decides; None: the run begins at step 0
state = read_state(path, config)                                 # every rank; UserError: it is of another run
require_same_corpus(path, state, config, corpus.whole, corpus.clips)  # the same
progress = make_progress(path, state, run)
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddp_asr.config import Config, Pieces, config_from_dict
from ddp_asr.data.index import Index
from ddp_asr.errors import UserError
from ddp_asr.features import NO_CLIPS
from ddp_asr.files import read_json_lines
from ddp_asr.runs import checkpoint
from ddp_asr.runs.directory import read_lines
from ddp_asr.settings import differences
from ddp_asr.text import Tokeniser, make_tokeniser, tokeniser_from_state
from ddp_asr.training.loop import Progress


def has_results(run: Path) -> bool:
    """Whether the run directory holds metrics or a best checkpoint."""
    return (run / "best.pt").exists() or any(read_json_lines(run / "metrics.jsonl"))


def checkpoint_was_saved(run: Path, status: Mapping[str, Any]) -> bool | None:
    """Whether the run ever had a complete checkpoint, by its status.json; None: unknown."""
    return status.get("checkpoint_saved") if has_results(run) else False


def find_checkpoint(
    run: Path,
    resume: str,
    checkpoint_saved: bool | None,
    message: Callable[[str], None],
    *,
    requeued: bool = False,
) -> Path | None:
    """The checkpoint to go on from; None where the run begins at step 0.

    Args:
        resume: auto, never, or the path of a checkpoint.
        checkpoint_saved: see `checkpoint_was_saved`.
        requeued: Slurm starts this job again with the same command line; `resume` was for its first attempt.
        message: is told of each damaged checkpoint on the way.

    Raises:
        UserError: the run must not begin anew, or the checkpoint that was named is missing or damaged.
    """
    if requeued and (resume == "never" or checkpoint.numbered(run)):
        resume = "auto"
    if resume not in ("auto", "never"):
        checkpoint.read(Path(resume))
        return Path(resume)
    found = checkpoint.newest_good(
        run, on_damage=lambda path, why: message(f"{path} is damaged ({why}): trying the one before")
    )
    if found is None:
        return _find_without_checkpoints(run, resume, checkpoint_saved)
    if resume == "never":
        raise UserError(
            f"{run} holds checkpoints, the newest of step {found.step}, and --resume never was given: choose another "
            "--run.name, or remove the directory"
        )
    return found.path


def _find_without_checkpoints(run: Path, resume: str, checkpoint_saved: bool | None) -> Path | None:
    """Where a run goes on whose checkpoints/ is empty or missing; refuses to train over results.

    A run that was killed before its first checkpoint must start again without a human, because Slurm requeues it.
    Its status.json says `checkpoint_saved: false`. Any other run with results has lost its checkpoints: somebody
    deleted them, or copied the directory without them.
    """
    if not has_results(run):
        return None
    best = run / "best.pt"
    if resume == "auto" and checkpoint_saved is False:
        return best if best.exists() else None  # an evaluation may come before the first checkpoint is due
    step = max((line["step"] for line in read_lines(run / "metrics.jsonl")), default=0)
    go_on = f"go on from its best one with --resume {best}, " if best.exists() else ""
    raise UserError(
        f"{run} holds the results of a run up to step {step} and no checkpoint in {run}/checkpoints: "
        f"{go_on}choose another --run.name, or remove the directory to begin anew"
    )


def read_state(path: Path | None, config: Config) -> dict[str, Any] | None:
    """The state in `path`, which must be of a run with these settings and the vocabulary that they name."""
    if path is None:
        return None
    state = checkpoint.read(path)
    is_whole = {"progress", "config", "fingerprint", "model", "optimizer", "tokeniser"} <= state.keys()
    if not (is_whole and isinstance(state["config"], dict) and _is_progress(state["progress"])):
        raise UserError(f"{path} is no checkpoint of ddp_asr.train: choose one under runs/NAME/checkpoints")
    theirs = config_from_dict(state["config"], f"the checkpoint {path}")
    for name, ours, other in differences(config, theirs):
        if (name, ours) == ("train.precision", "auto"):  # a dry run, which may be on another machine than the run
            continue
        if name == "vocabulary.model":  # its content is compared below, and not its path
            continue
        raise UserError(
            f"{path} was trained with {name} = {other!r} and this run has {ours!r}: set --{name}={_shown(other)} "
            f"to go on, or {_begin_anew(name, path)}"
        )
    _require_same_tokeniser(path, tokeniser_from_state(state["tokeniser"]), config)
    return state


def _require_same_tokeniser(path: Path, theirs: Tokeniser, config: Config) -> None:
    """Raises a UserError unless the tokeniser of a checkpoint is the one that the settings name."""
    vocabulary = config.vocabulary
    if isinstance(vocabulary, Pieces) and not Path(vocabulary.model).is_file():
        return  # they were learnt, or their file is gone: the checkpoint has them, and nothing to be compared with
    if make_tokeniser(vocabulary).state() != theirs.state():
        named = f"vocabulary.model = {vocabulary.model}" if isinstance(vocabulary, Pieces) else "its settings"
        raise UserError(
            f"{path} was trained with another vocabulary than that of {named}: leave vocabulary.model as it was, or "
            "choose another --run.name to begin anew"
        )


def require_same_corpus(
    path: Path | None,
    state: dict[str, Any] | None,
    config: Config,
    corpus: Index,
    clips: Mapping[str, Index] = NO_CLIPS,
) -> None:
    """Raises a UserError unless the state is of a run on this training corpus, all rows of it.

    Args:
        clips: the recordings that augmentations mix in, see `Corpus.clips`; they must be the same, too.
    """
    if state is None:
        return
    if state["fingerprint"] != corpus.fingerprint():
        raise UserError(
            f"{path} was trained on other utterances than those in {', '.join(config.data.train)}: name the "
            "shards it was trained on in data.train, or choose another --run.name to begin anew"
        )
    known = state.get("clips")  # a checkpoint from before there were any has none
    for name, index in clips.items():
        if not isinstance(known, dict) or known.get(name) != index.fingerprint():
            raise UserError(
                f"{path} was trained with other recordings for augment.{name} than those in "
                f"{', '.join(config.clips[name])}: name the shards it was trained with, or choose another --run.name "
                "to begin anew"
            )


def _is_progress(record: Any) -> bool:
    """Whether these are fields of Progress, each of its type."""
    if not isinstance(record, dict):
        return False
    types: dict[str, Any] = {name: type(value) for name, value in vars(Progress()).items()}
    types |= {"best": (tuple, list, type(None)), "trained_s": (int, float)}
    return all(name in types and isinstance(value, types[name]) for name, value in record.items())


def _begin_anew(name: str, path: Path) -> str:
    if name != "train.epochs":
        return "choose another --run.name to begin anew"
    # The learning rate's cycle spans all epochs, so more of them are another training from the first step on.
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return (
        "to train longer begin a new run from its weights, with a learning rate cycle of its own: "
        f"--run.name=NEW --train.init_from={run}"
    )


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def is_of_run(path: Path, run: Path) -> bool:
    """Whether the checkpoint lies in the run's own directory."""
    return run.resolve() in path.resolve().parents


def make_progress(path: Path | None, state: dict[str, Any] | None, run: Path) -> Progress:
    """Where the run stands that goes on from this state."""
    if path is None or state is None:
        return Progress()
    progress = Progress(**state["progress"])
    if not is_of_run(path, run):  # another run's best checkpoint and evaluations are not in this directory
        progress.best, progress.best_step, progress.evaluated_step = None, 0, 0
    return progress
