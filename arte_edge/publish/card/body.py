"""The sections of a model card's body that are generated from ``student.json``, each between two markers.

A rerun replaces the text between a section's markers and nothing else. A section whose markers a
person removed stays removed.

How the student is asked is said in commands and snippets that work as printed; `tests/export/test_use.py` runs them
against the files that they are printed for. A bare user message is enough, since every file's chat template holds the
instruction.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from arte_edge.cache import megabytes
from arte_edge.errors import InputError
from arte_edge.publish import publishable
from arte_edge.publish.card.metadata import CardOptions
from arte_edge.results.accuracy import NOT_KNOWN, PairedAccuracy
from arte_edge.results.comparison import OWN, OWN_ALL, TUNED
from arte_edge.results.student_json import Evaluation, Speed, StudentFile

_SPEED_HEAD = (
    *("file", "runtime", "threads", "prefill tokens/s", "decode tokens/s"),
    *("time to first token", "peak memory", "max temperature"),
)
_COMPARED = {TUNED: "this student", OWN: "trained on the own labels alone"}
_COMPARED[OWN_ALL] = "trained on own labels and validation examples"
_WITH_GRAMMAR = ", with grammar"
_START, _END = "<!-- arte-edge:{}:start -->", "<!-- arte-edge:{}:end -->"
_ANY_MARK = re.compile(r"<!--\s*arte-edge:[a-z]+:(?:start|end)\s*-->")


def wrapped(name: str, text: str) -> str:
    """Return `text` between the markers of the part `name`."""
    return f"{_START.format(name)}\n{text.rstrip()}\n{_END.format(name)}\n"


def put_section(body: str, name: str, text: str, newline: str) -> str | None:
    """Return `body` with the text between the markers of `name` replaced; None without markers.

    Raises InputError: one of the two is missing, or a marker occurs twice.
    """
    start, end = (re.compile(rf"<!--\s*arte-edge:{name}:{which}\s*-->") for which in ("start", "end"))
    starts, ends = list(start.finditer(body)), list(end.finditer(body))
    if not starts and not ends:
        return None
    paired = len(starts) == len(ends) == 1 and starts[0].end() <= ends[0].start()
    if not paired or _ANY_MARK.search(body[starts[0].end() : ends[0].start()]):
        raise InputError(
            f"README.md: the markers of '{name}' are not one start and one end",
            f"Leave one {_START.format(name)} and, below it, one {_END.format(name)}; or remove both.",
        )
    new = f"\n{text.rstrip()}\n".replace("\n", newline)
    return body[: starts[0].end()] + new + body[ends[0].start() :]


def lineage_section(student: StudentFile, options: CardOptions) -> str:
    """What the student is, and its lineage."""
    lineage, tuning = student.lineage, student.lineage.tuning
    base, teacher = (
        ", ".join(filter(None, (parent.name, parent.quantization, parent.license))) if parent else ""
        for parent in (lineage.base, lineage.teacher)
    )
    tuned = []
    if tuning:
        tuned = [tuning.method, tuning.data]
        rates = (("learning rate", tuning.learning_rate), ("epochs", tuning.epochs))
        tuned += [f"{name} {value:g}" for name, value in rates if value is not None]
    arte = "ARTE: teaching aligned with the student, [arXiv:2406.19227](https://arxiv.org/abs/2406.19227)"
    parameters = f"{student.student.parameter_count / 1e6:,.1f} M parameters"
    rows = {
        "student": f"{student.student.name}, {student.student.architecture}, {parameters}",
        "base": base,
        "teacher": teacher,
        "task": lineage.task,
        "method": arte if lineage.is_arte else (tuning.data if tuning else lineage.method),
        "answers": student.asking.form if student.asking else "",
        "tuning": ", ".join(filter(None, tuned)),
        "data": f"{lineage.data.rows} rows, sha256 {lineage.data.sha256[:16]}…" if lineage.data else "",
        "seed": "" if lineage.seed is None else str(lineage.seed),
        "made with": f"arte-edge {student.arte_edge_version}",
    }
    return _table(("", ""), ((name, text if text is arte else _cell(text)) for name, text in rows.items() if text))


def files_section(student: StudentFile, options: CardOptions) -> str:
    """The files, and the fidelity of each to the 16-bit student."""
    passed = publishable.files(student)
    if not passed:
        return "No file passed the gate."
    rows, tokens = [], ""
    has_answers = any(a.fidelity.metrics and a.fidelity.metrics.answers for a in passed)
    for artifact in passed:
        kl = top1 = perplexity = answers = None
        if metrics := artifact.fidelity.metrics:
            kl, top1, perplexity = metrics.kl_mean, metrics.top1, metrics.perplexity_ratio
            answers = metrics.answers.kl_mean if metrics.answers else None
            tokens = tokens or f": {metrics.n_tokens} tokens of {metrics.n_prompts} prompts"
        rows.append(
            (
                f"`{_cell(artifact.file)}`",
                _cell(artifact.quantization),
                megabytes(artifact.size_bytes),
                f"{artifact.bits_per_weight:.2f}",
                _number(kl, ".4f"),
                *([_number(answers, ".4f")] if has_answers else []),
                _number(top1, ".1%"),
                _number(perplexity, ".4f"),
            )
        )
    kls = ("KL mean", *(["KL of answers"] if has_answers else []))
    head = ("file", "type", "size", "bits/weight", *kls, "top-1 agreement", "perplexity ratio")
    reference = f"Compared with the 16-bit student ({student.student.dtype}) on the same tokens"
    return f"{_table(head, rows)}\n{reference}{tokens}; KL divergence in nats a token."


def accuracy_section(student: StudentFile, options: CardOptions) -> str:
    """The run's closing table, then the accuracy of each file, the 16-bit student in a line of its own."""
    compared = _comparison(student)
    rows: list[tuple[str, ...]] = []
    for accuracy in publishable.accuracies(student):
        rows += _accuracy_rows(f"16-bit student ({student.student.dtype})", accuracy, student)
    for artifact in [] if options.checkpoint else publishable.files(student):
        found, name = publishable.accuracies(artifact), f"`{_cell(artifact.file)}`"
        for accuracy in found:
            rows += _accuracy_rows(name, accuracy, student)
        if not found:
            rows.append((name, "not measured", *[NOT_KNOWN] * 5))
    if not rows:
        return compared or "Not measured yet."
    head = ("file", "examples", "n", "accuracy", "95 % interval", "difference to the student", "measured on")
    note = "Wilson intervals; the difference is paired, in points, with its 95 % interval."
    if any(name.endswith(_WITH_GRAMMAR) for name, *_ in rows):
        note += " With grammar nothing but answers of the task can be written; the difference is to the line above."
    return f"{compared}{_table(head, rows)}\n{note}"


def _comparison(student: StudentFile) -> str:
    """Return what the tuned student is worth: beside its base, the student of the own labels alone, and the teacher."""
    if not student.comparison:
        return ""
    rows = [
        (
            _cell(_COMPARED.get(row.model, row.model)),
            _cell(row.setting),
            str(row.n),
            row.with_slots,
            f"{row.low:.1%} to {row.high:.1%}",
            row.difference_points,
        )
        for row in student.comparison
    ]
    head = ("model", "prompting", "n", "accuracy", "95 % interval", "this student minus it")
    part = " Only a part of the test split: for orientation." if any(r.partial for r in student.comparison) else ""
    where = f"Test split of {_cell(student.lineage.task or 'the task')}, before quantization"
    return f"{_table(head, rows)}\n{where}; paired differences in points with 95 % intervals.{part}\n\n"


def bench_section(student: StudentFile, options: CardOptions) -> str:
    """Speed of each file, one table a device."""
    devices: dict[str, list[tuple[str, Speed]]] = defaultdict(list)
    for artifact in publishable.files(student):
        for speed in publishable.speeds(artifact, options.allow_throttled):
            devices[publishable.device_title(speed)].append((artifact.file, speed))
    parts = []
    for device, found in sorted(devices.items()):
        cpu = next((speed.cpu for _, speed in found if speed.cpu and speed.cpu != device), "")
        title = f"**{_cell(device)}**" + (f" ({_cell(cpu)})" if cpu else "")
        rows = (_speed_row(file, speed, options.allow_throttled) for file, speed in found)
        parts.append(f"{title}\n\n{_table(_SPEED_HEAD, rows)}")
    if not parts:
        parts.append("Not measured on a device yet: `arte-edge bench`.")
    parts += publishable.left_out(student, options.allow_throttled)
    if devices:
        parts.append("Medians of repeated runs; every sample is in `bench.jsonl` beside the files.")
    return "\n\n".join(part.rstrip() for part in parts)


def _accuracy_rows(name: str, accuracy: PairedAccuracy, student: StudentFile) -> list[tuple[str, ...]]:
    """Return the row of an accuracy, and below it that of the same file with a grammar, where that was measured."""
    rows = [_accuracy_row(name, accuracy, student)]
    if isinstance(accuracy, Evaluation) and (bound := accuracy.with_grammar) is not None:
        found = {key: getattr(bound, key) for key in PairedAccuracy.model_fields}
        rows.append(_accuracy_row(name + _WITH_GRAMMAR, accuracy.model_copy(update=found), student))
    return rows


def _accuracy_row(name: str, accuracy: PairedAccuracy, student: StudentFile) -> tuple[str, ...]:
    place = "at export"
    if isinstance(accuracy, Evaluation):
        place = f"{publishable.device_title(accuracy)}, {accuracy.runtime}"
    return (
        name,
        _cell(f"{accuracy.task or student.lineage.task}, {accuracy.split}".lstrip(", ")),
        str(accuracy.n),
        accuracy.with_slots,
        f"{accuracy.low:.1%} to {accuracy.high:.1%}",
        accuracy.difference_points,
        _cell(place),
    )


def _speed_row(file: str, speed: Speed, show_throttled: bool) -> tuple[str, ...]:
    mark = " (throttled)" if show_throttled and speed.throttled else ""
    depth = f", {speed.n_depth} tokens of context" if speed.n_depth else ""
    return (
        f"`{_cell(file)}`{depth}{mark}",
        _cell(speed.runtime),
        str(speed.threads),
        _number(speed.prefill_tokens_per_s, ".1f"),
        _number(speed.decode_tokens_per_s, ".1f"),
        _number(speed.ttft_ms, ".0f", " ms"),
        NOT_KNOWN if speed.peak_rss_bytes is None else megabytes(speed.peak_rss_bytes),
        _number(speed.temperature_c_max, ".0f", " °C"),
    )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NOT_KNOWN if value is None else f"{value:{form}}{unit}"


def _cell(text: str) -> str:
    """Return `text` so that it stays in its cell: no markup, no line ends, no markers."""
    flat = " ".join(text.split())
    for sign, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "'")):
        flat = flat.replace(sign, escaped)
    return flat


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_TRANSFORMERS = """\
from transformers import pipeline

chat = pipeline("text-generation", model={model})
messages = [{{"role": "user", "content": {question}}}]
answer = chat(messages, max_new_tokens={tokens}, do_sample=False)
print(answer[0]["generated_text"][-1]["content"])"""
_LLAMA_CPP = """\
from llama_cpp import Llama

model = Llama({model}, n_ctx=2048, verbose=False)
messages = [{{"role": "user", "content": {question}}}]
answer = model.create_chat_completion(messages, max_tokens={tokens}, temperature=0, stop={stops})
print(answer["choices"][0]["message"]["content"])"""
_GENAI = """\
import json
import onnxruntime_genai as og

model = og.Model({model})
tokenizer = og.Tokenizer(model)
messages = json.dumps([{{"role": "user", "content": {question}}}])
prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(prompt) + {tokens}, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)[len(prompt):]))"""


def use_section(student: StudentFile, options: CardOptions) -> str:
    """What to send, and the commands that send it, for the smallest file of each runtime."""
    how, name = student.asking, student.student.name
    question, tokens, stops = (how.example, how.answer_tokens, how.stops) if how else ("", 256, ())
    question = question or "Hello!"
    shown = {"question": _quoted(question), "tokens": tokens, "stops": _quoted(stops)}
    parts = []
    if how:
        parts.append(
            "Send the bare input as user message: the chat template holds the instruction. A system text of your own "
            "takes its place."
        )
    if options.checkpoint or options.base_model:
        model = options.repo if options.checkpoint else options.base_model
        parts.append(_code("python", _TRANSFORMERS.format(model=_quoted(model or "."), **shown)))
    # Files are sorted, the smallest last: the one for the smallest device.
    files = {} if options.checkpoint else {file.format: file.file for file in publishable.files(student)}
    if gguf := files.get("gguf"):
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0}
        body["repeat_penalty"] = 1  # llama-cpp-python's server has 1.1, which changes short answers
        data = _quoted(body | ({"stop": stops} if stops else {}))
        lines = (
            f"llama-server -m {gguf} --jinja  # then, in another terminal:",
            'curl http://localhost:8080/v1/chat/completions -H "Content-Type: application/json" '
            f"-d {shlex.quote(data)}",
            f"llama-cli -m {gguf} --jinja -st --temp 0 -n {tokens} -p {shlex.quote(question)}",
            f"ollama create {name} -f Modelfile && ollama run {name} {shlex.quote(question)}",
        )
        parts += [_code("sh", "\n".join(lines)), _code("python", _LLAMA_CPP.format(model=_quoted(gguf), **shown))]
    if folder := files.get("onnx-genai"):
        parts.append(_code("python", _GENAI.format(model=_quoted(folder.rstrip("/")), **shown)))
    if folder := files.get("onnx-optimum"):
        parts.append(f"`{folder}` runs in plain onnxruntime, optimum and transformers.js.")
    if how and how.grammar and files:
        schema = f"; `{how.json_schema}` is their JSON schema" if how.json_schema else ""
        parts.append(f"`{how.grammar}` permits answers alone (`llama-cli --grammar-file {how.grammar}`){schema}.")
    return "\n\n".join(parts) or "No file passed the gate."


def _quoted(value: object) -> str:
    """Return texts, and lists of them, as JSON: Python reads them alike."""
    return json.dumps(value, ensure_ascii=False)


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


SECTIONS: dict[str, tuple[str, Callable[[StudentFile, CardOptions], str]]] = {
    "use": ("How to use", use_section),
    "lineage": ("Lineage", lineage_section),
    "files": ("Files", files_section),
    "accuracy": ("Accuracy", accuracy_section),
    "bench": ("Speed", bench_section),
}
