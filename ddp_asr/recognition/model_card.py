"""The model card of an export: README.md with the front matter that Hugging Face reads.

    trained checkpoint, its run's files, evaluations --make--> Markdown

What only whoever publishes the model can know, licence and language, is left to be filled in.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

import ddp_asr
from ddp_asr.errors import UserError
from ddp_asr.files import Fields, is_count, is_number, is_text, read_json
from ddp_asr.model import count_parameters
from ddp_asr.recognition.recogniser import Recogniser, Trained
from ddp_asr.runs.directory import read_lines

_FACTS: Fields = {
    "checkpoint": is_text,
    "step": is_count,
    "utterances": is_count,
    **dict.fromkeys(("hours", "wer", "cer"), is_number),
    **dict.fromkeys(
        ("wer_interval", "cer_interval"),
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(is_number, value)),
    ),
    "decoder": lambda value: isinstance(value, dict) and is_text(value.get("kind")),
}


def read_evaluation(path: Path, trained: Trained) -> dict[str, Any]:
    """What `ddp-asr evaluate --json` printed of the same checkpoint, with the file's name as `name`.

    Raises:
        UserError: the file holds something else, or an evaluation of another checkpoint.
    """
    facts = read_json(path, _FACTS)
    if facts is None or (lacking := [name for name in _FACTS if name not in facts]):
        what = f"has no valid {lacking[0]!r}" if facts is not None else "is missing, or not one JSON object"
        raise UserError(f"{path} {what}: make it with ddp-asr evaluate {trained.path} SHARDS --json > {path}")
    if (Path(facts["checkpoint"]).resolve(), facts["step"]) != (Path(trained.path).resolve(), trained.step):
        raise UserError(
            f"{path} is of {facts['checkpoint']} at step {facts['step']}, and {trained.path} at step {trained.step} is "
            f"exported: evaluate that one"
        )
    return {**facts, "name": path.stem}


def make(
    trained: Trained, recogniser: Recogniser, evaluations: list[dict[str, Any]], difference: float, name: str
) -> str:
    """The text of README.md.

    Args:
        evaluations: as `read_evaluation` returns them.
        difference: between the log-probabilities of the ONNX model and the recogniser.
        name: of the model.
    """
    config, tokeniser = recogniser.config, recogniser.tokeniser
    encoder = {key: value for key, value in asdict(config.encoder).items() if key != "kind"}
    averaged = "their moving average" if trained.weights is not trained.plain_weights else "as they were trained"
    features = f"{config.features.mel_bands} log-mel bands, {config.features.window_ms:g} ms windows every "
    rows = {
        "encoder": f"{config.encoder.kind} ({', '.join(f'{key} {value}' for key, value in encoder.items())})",
        "parameters": f"{count_parameters(recogniser.model):,}",
        "weights": f"{averaged}, at step {trained.step} in epoch {trained.epoch}",
        "input": f"{ddp_asr.SAMPLE_RATE_HZ:,} Hz, mono; {features}{config.features.hop_ms:g} ms",
        "output": f"{tokeniser.size} classes (kind {config.vocabulary.kind}, the blank is the last), one frame every "
        f"{1000 * config.frame_s:g} ms",
        "training": f"{config.train.epochs} epochs in {config.train.precision}, AdamW, learning rate "
        f"{config.optim.learning_rate:g}, {config.batch.micro_batches} x {config.batch.max_seconds:g} s a step",
        "made with": f"ddp_asr {ddp_asr.__version__}; all settings are in settings.yaml",
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    data = "\n".join(f"- {role}: {_data(path)}" for role in ("train", "test") for path in getattr(config.data, role))
    return _PAGE.format(
        front=_front_matter(name, evaluations),
        name=name,
        table=table,
        data=data or "- not recorded",
        results=_results(trained, evaluations),
        difference=difference,
        classes=tokeniser.size,
        bands=config.features.mel_bands,
    )


def _front_matter(name: str, evaluations: list[dict[str, Any]]) -> str:
    fields: dict[str, Any] = {
        "library_name": "onnx",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["automatic-speech-recognition", "ctc", "onnx", "safetensors"],
    }
    if evaluations:
        task = {"type": "automatic-speech-recognition"}
        results = [
            {
                "task": task,
                "dataset": {"name": each["name"], "type": each["name"]},
                "metrics": [{"type": key, "value": round(100 * each[key], 2)} for key in ("wer", "cer")],
            }
            for each in evaluations
        ]
        fields["model-index"] = [{"name": name, "results": results}]
    return yaml.dump(fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True).strip()


class _Dumper(yaml.SafeDumper):
    """Without anchors, which readers of front matter may not know."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _data(path: str) -> str:
    """A shard directory with what its dataset.json says, where it can be read."""
    try:
        found = read_json(Path(path) / "dataset.json", {"hours": is_number, "utterances": is_count}) or {}
    except OSError:
        found = {}
    facts = [f"{found['hours']:.2f} h"] if "hours" in found else []
    facts += [f"{found['utterances']:,} utterances"] if "utterances" in found else []
    return f"`{path}`" + (f" ({', '.join(facts)})" if facts else " (hours unknown: its dataset.json is not there)")


def _results(trained: Trained, evaluations: list[dict[str, Any]]) -> str:
    none = ["No evaluation was given to `ddp-asr export --evaluation`."]
    table = [
        "| data | WER | 95 % interval | CER | 95 % interval | decoder |\n| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {_cell(each['name'])}, {each['hours']:.2f} h, {each['utterances']:,} utterances "
            f"| {_percent(each['wer'])} | {_interval(each['wer_interval'])} "
            f"| {_percent(each['cer'])} | {_interval(each['cer_interval'])} | {_cell(each['decoder']['kind'])} |"
            for each in evaluations
        ),
    ]
    run = Path(trained.path).resolve().parent
    run = run.parent if run.name == "checkpoints" else run
    along: list[str] = []
    for line in read_lines(run / "metrics.jsonl"):
        if line.get("kind") == "test" and line["step"] == trained.step and is_number(line.get("wer")):
            along = [f"\nAlong the training, on the data named test above: WER {_percent(line['wer'])}, no interval."]
    return "\n".join([*(table if evaluations else none), *along])


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f} %"


def _interval(ends: list[float]) -> str:
    return f"{100 * ends[0]:.2f} to {_percent(ends[1])}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_PAGE = """\
---
license:   # to be filled in, such as apache-2.0 or cc-by-4.0: the licences of the data count, too
language:  # to be filled in, such as en
{front}
---

# {name}

A CTC speech recogniser, trained with ddp_asr. It writes text as its training data had it.

{table_head}
{table}

## Data

{data}

## Error rates

{results}

## How to use it

`transcribe.py` needs numpy and onnxruntime, and 16-bit WAV files of 16 kHz:

```sh
pip install numpy onnxruntime
python transcribe.py hello.wav
```

`model.onnx` takes `features` (batch, time, {bands}) float32 and `frames` (batch,) int64, the length of each row; it
gives `log_probs` (batch, output time, {classes}) and `output_frames` (batch,). `transcribe.py` shows how features are
made of samples and a text of log-probabilities. These differ on noise by at most {difference:.1e} from those in torch.

`model.safetensors` has the weights for torch:

```python
from pathlib import Path
from safetensors.torch import load_file
from ddp_asr.config import load_config
from ddp_asr.model import make_model

model = make_model(load_config(Path("settings.yaml")), classes={classes})
model.load_state_dict(load_file("model.safetensors"))
```

## Licence

To be filled in by whoever publishes this model.
""".replace("{table_head}", "| | |\n| --- | --- |")
