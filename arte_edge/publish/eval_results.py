"""``.eval_results/*.yaml``: a score on a benchmark registered on the Hub, for its leaderboard.

Only for datasets that are registered as benchmarks, which is checked on the Hub where it can be reached. Only scores on
the whole test split count, and only those of the listed file itself. The format has no field for quantization or
hardware, so `notes` has both (hub-docs: eval-results). Values are in percent, as in the entries of other models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from arte_edge.cache import is_offline, slug, write_atomic
from arte_edge.errors import InputError
from arte_edge.publish import publishable
from arte_edge.publish.card.front_matter import dump_yaml
from arte_edge.results.student_json import Artifact, Evaluation, StudentFile

FOLDER = ".eval_results"
_SPEC = re.compile(r"(?P<dataset>[\w-][\w.-]*/[\w-][\w.-]*):(?P<task_id>[\w.-]+)(?:=(?P<task>.+))?")
_OURS = ", greedy, n="  # in the notes of every file that this module wrote


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

    Raises InputError: it is not of that form.
    """
    if not (found := _SPEC.fullmatch(text.strip())):
        raise InputError(f"--benchmark {text}: not DATASET:TASK_ID", "For example --benchmark openai/gsm8k:gsm8k")
    return Benchmark(found["dataset"], found["task_id"], found["task"] or "")


def check_registered(benchmark: Benchmark) -> str:
    """Check on the Hub that `benchmark` is registered; return a note if the Hub is not available, else "".

    Raises InputError: the Hub does not list the dataset as a benchmark.
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

    What an earlier call wrote for these benchmarks and this one does not, as of a file that was rejected since, goes.

    Raises InputError: nothing was measured on a whole test split, or several tasks were and none is named.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    found = [(benchmark, *pair) for benchmark in benchmarks for pair in _scores(student, benchmark)]
    for benchmark in benchmarks:  # check all before the first file is written
        if (text := check_registered(benchmark)) and note:
            note(text)
    written, current = [], set()
    for benchmark, artifact, score in found:
        kind = "GGUF" if artifact.format == "gguf" else artifact.format
        interval = f"95 % interval {100 * score.low:.1f}-{100 * score.high:.1f}"
        notes = f"{kind} {artifact.quantization}, {score.runtime}{_OURS}{score.n}, {interval}"
        entry = EvalResultEntry(
            dataset_id=benchmark.dataset,
            task_id=benchmark.task_id,
            value=round(100 * score.accuracy, 2),
            date=score.test_time[:10] or None,
            source_url=f"https://huggingface.co/{repo}/blob/main/bench.jsonl" if repo else None,
            source_name="arte-edge bench" if repo else None,
            notes=f"{notes}, on {publishable.device_title(score)}",
        )
        path = folder / FOLDER / f"{benchmark.slug}-{slug(artifact.file.rstrip('/')).lower()}.yaml"
        current.add(path)
        data = dump_yaml(eval_result_entries_to_yaml([entry])).encode()
        if not path.is_file() or path.read_bytes() != data:
            write_atomic(path, data)
            written.append(path)
    for benchmark in benchmarks:
        for path in {*(folder / FOLDER).glob(f"{benchmark.slug}-*.yaml")} - current:
            if _OURS in path.read_text("utf-8", errors="replace"):
                path.unlink()
    return written


def _scores(student: StudentFile, benchmark: Benchmark) -> list[tuple[Artifact, Evaluation]]:
    """Return one score a file: on the whole test split, of the first device in order."""
    found: list[tuple[Artifact, Evaluation]] = []
    flag = f"--benchmark {benchmark.dataset}"
    for artifact in publishable.files(student):
        tests = [one for one in publishable.evaluations(artifact.evaluations) if one.split == "test"]
        tasks = sorted({one.task for one in tests})
        if not benchmark.task and len(tasks) > 1:
            raise InputError(f"{flag}: which of {', '.join(tasks)}?", f"Name it: {flag}:{benchmark.task_id}=TASK")
        found += [(artifact, one) for one in tests if benchmark.task in ("", one.task)][:1]
    if not found:
        raise InputError(
            f"{flag}: no file was measured on the whole test split of {benchmark.task or 'a task'}",
            "Measure it first: arte-edge bench FILE --task TASK, without --limit.",
        )
    return found
