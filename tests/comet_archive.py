"""What stands in a run's archive for `comet upload`."""

import json
import zipfile
from collections import Counter
from pathlib import Path

from ddp_asr.runs.comet import archive_path


def in_archive(run: Path) -> tuple[Counter, list[dict], dict]:
    """Returns how often each (context, metric, step) is in the archive, the messages of other kinds, and the head."""
    counts: Counter = Counter()
    others = []
    with zipfile.ZipFile(archive_path(run)) as archive:
        assert archive.testzip() is None
        for line in archive.read("messages.json").splitlines():
            message = json.loads(line)
            metric = message["payload"].get("metric")
            if metric is None:
                others.append(message)
            elif metric["metricName"] != "process duration":  # comet_ml's own, of its process
                counts[message["payload"]["context"], metric["metricName"], metric["step"]] += 1
        return counts, others, json.loads(archive.read("experiment.json"))
