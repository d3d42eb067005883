"""``.eval_results/*.yaml``: a score on a benchmark registered on the Hub, for its leaderboard.

Only for datasets that are registered as benchmarks, which is checked on the Hub where it can be reached. Only
scores on the whole test split count, and only those of the listed file itself. The format has no field for
quantization or hardware, so `notes` has both (hub-docs: eval-results). Values are in percent, as in the entries
of other models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arte_edge.cache import is_offline
from arte_edge.errors import InputError
from arte_edge.publish import publishable
from arte_edge.publish.card.front_matter import dump_yaml
from arte_edge.results.student_json import Artifact, Evaluation, StudentFile
from arte_edge.store import write_atomic

__all__ = ["FOLDER", "Benchmark", "check_registered", "parse_benchmark", "write_eval_results"]

FOLDER = ".eval_results"
_SPEC = re.compile(r"(?P<dataset>[\w-][\w.-]*/[\w-][\w.-]*):(?P<task_id>[\w.-]+)(?:=(?P<task>.+))?")
_ANSWER_S = 10.0


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the Hub, and the task here whose test split is that benchmark's."""

    dataset: str
    task_id: str
    task: str = ""  # empty: the only one that was measured

    @property
    def slug(self) -> str:
        return re.sub(r"[^\w.-]+", "-", f"{self.dataset.partition('/')[2]}-{self.task_id}".lower())


def parse_benchmark(text: str) -> Benchmark:
    """Return the benchmark that ``DATASET:TASK_ID[=TASK]`` names, as in ``openai/gsm8k:gsm8k=gsm8k``.

    Raises:
        InputError: it is not of that form.
    """
    if not (found := _SPEC.fullmatch(text.strip())):
        raise InputError(
            f"--benchmark {text}: not DATASET:TASK_ID", "For example --benchmark openai/gsm8k:gsm8k"
        )
    return Benchmark(found["dataset"], found["task_id"], found["task"] or "")


def check_registered(benchmark: Benchmark) -> str:
    """Check on the Hub that `benchmark` is registered; return a note if the Hub is not available, else "".

    Raises:
        InputError: the Hub does not list the dataset as a benchmark.
    """
    unchecked = f"{benchmark.dataset}: not checked on the Hub that it is a registered benchmark"
    if is_offline():
        return f"{unchecked} (offline)"
    from huggingface_hub import HfApi

    from arte_edge.models.hub import HubError, endpoint, probe

    try:
        probe()
        listed = HfApi(endpoint=endpoint()).list_datasets(benchmark=True, search=benchmark.dataset)
        if benchmark.dataset in {found.id for found in listed}:
            return ""
    except HubError:
        return f"{unchecked} (it cannot be reached)"
    except Exception as error:  # httpx's and the Hub's own; a missing answer is no verdict
        return f"{unchecked} ({type(error).__name__})"
    raise InputError(
        f"--benchmark {benchmark.dataset}: the Hub does not list it as a benchmark",
        "Leave it out: the score is in the card's model-index.",
    )


def write_eval_results(
    folder: Path,
    student: StudentFile,
    benchmarks: Sequence[Benchmark],
    *,
    repo: str = "",
    note: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write one file for each benchmark and measured file; return those that changed.

    Raises:
        InputError: nothing was measured on a whole test split, or several tasks were and none is named.
    """
    found = [(benchmark, *pair) for benchmark in benchmarks for pair in _scores(student, benchmark)]
    for benchmark in benchmarks:  # check all before the first file is written
        if (text := check_registered(benchmark)) and note:
            note(text)
    written = []
    for benchmark, artifact, evaluation in found:
        path = folder / FOLDER / f"{benchmark.slug}-{artifact.quantization.lower()}.yaml"
        data = dump_yaml(_entry(benchmark, artifact, evaluation, repo)).encode()
        if not path.is_file() or path.read_bytes() != data:
            write_atomic(path, data)
            written.append(path)
    return written


def _scores(student: StudentFile, benchmark: Benchmark) -> list[tuple[Artifact, Evaluation]]:
    """Return one score a file: on the whole test split, of the first device in order."""
    found: list[tuple[Artifact, Evaluation]] = []
    for artifact in publishable.files(student):
        tests = [one for one in publishable.evaluations(artifact.evaluations) if one.split == "test"]
        if benchmark.task:
            tests = [one for one in tests if one.task == benchmark.task]
        elif len({one.task for one in tests}) > 1:
            names = ", ".join(sorted({one.task for one in tests}))
            raise InputError(
                f"--benchmark {benchmark.dataset}: which of {names}?",
                f"Name it: --benchmark {benchmark.dataset}:{benchmark.task_id}=TASK",
            )
        found += [(artifact, one) for one in tests[:1]]
    if not found:
        raise InputError(
            f"--benchmark {benchmark.dataset}: no file was measured on the whole test split of "
            f"{benchmark.task or 'a task'}",
            "Measure it first: arte-edge bench FILE --task TASK, without --limit.",
        )
    return found


def _entry(benchmark: Benchmark, artifact: Artifact, evaluation: Evaluation, repo: str) -> Any:
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    kind = {"gguf": "GGUF"}.get(artifact.format, artifact.format)
    notes = (
        f"{kind} {artifact.quantization}, {evaluation.runtime}, greedy, n={evaluation.n}, 95 % interval "
        f"{100 * evaluation.low:.1f}-{100 * evaluation.high:.1f}, on {publishable.device_title(evaluation)}"
    )
    url = f"https://huggingface.co/{repo}/blob/main/bench.jsonl" if repo else None
    entry = EvalResultEntry(
        dataset_id=benchmark.dataset,
        task_id=benchmark.task_id,
        value=round(100 * evaluation.accuracy, 2),
        date=evaluation.test_time[:10] or None,
        source_url=url,
        source_name="arte-edge bench" if url else None,
        notes=notes,
    )
    return eval_result_entries_to_yaml([entry])
