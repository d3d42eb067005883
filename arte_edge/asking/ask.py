"""Questions to a student: one path for a run and for a file, whatever runs it.

A file is asked as its ``student.json`` says, a run's student as its task says, any other model with the bare text.
Where the answers are a closed set the answer is one of them: llama.cpp follows a grammar, other runtimes get the
same greedy answer from their logits (`choose`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from arte_edge.asking.form import ANSWER_OPEN, Asking, asking_of, instruction
from arte_edge.asking.grammar import grammar_of
from arte_edge.errors import InputError, reading
from arte_edge.files import read_json
from arte_edge.model_folder import look
from arte_edge.results.student_json import FILE_NAME, StudentFile, read_student
from arte_edge.runtimes.prompt_render import Message, render
from arte_edge.tasks.task import BOOLEANS, Answer, Task

if TYPE_CHECKING:
    from arte_edge.runtimes.protocol import Runtime

_FREE_TOKENS = 96  # limit of an answer of a model that nothing is known of
_TEXT = Answer(kind="text", exact=True)


@dataclass(frozen=True)
class Reply:
    """What a student answered. `answer` is None if its text holds none in the task's form."""

    input: str
    answer: str | None
    text: str
    tokens: int  # of the text
    seconds: float

    def __str__(self) -> str:
        return self.text if self.answer is None else self.answer

    def _repr_html_(self) -> str:
        from arte_edge.console import fragment

        rate = f"{self.tokens} tokens in {self.seconds:.1f} s"
        return fragment(self.answer or "no answer in the task's form", lines=[self.text.strip(), rate])


class QuestionTooLong(InputError):
    """A question does not fit into the context with its instruction and its answer."""


class Student:
    """A student that answers questions; its model is opened with the first one. Close it, or use it in a ``with``."""

    def __init__(
        self,
        path: Path,
        task: Task | None = None,
        *,
        grammar: bool = True,
        max_tokens: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Find out how the model at `path`, a file or a folder, is asked.

        Args:
            task: of a model without ``student.json``, or to be held against it.
            grammar: constrain the answers where the task's form allows it.
            max_tokens: limit of an answer in place of the student's own.
            threads: of the runtime.

        Raises InputError: its ``student.json`` is damaged, or the model is a student of another task.
        """
        self.path, self.task, self.grammar, self.threads = path, task, grammar, threads
        self.max_tokens = max_tokens
        self._own_grammar: str | None = None
        self.example = ""  # a question that fits, if the export holds one
        self._before: list[Message] = []
        self.asking = self._recorded()

    def _recorded(self) -> Asking | None:
        """Return how ``student.json`` beside the file says that it is asked; None if nothing does."""
        known = read_student(self.path.parent)
        if known is None or self.path.name not in {artifact.file.rstrip("/") for artifact in known.artifacts}:
            return None
        record, trained_for = known.asking, known.lineage.task
        if self.task is not None:
            same = trained_for in ("", self.task.name)
            if record is not None:
                same = record.instruction == instruction(self.task, record.form)
            if not same:
                what = f"{self.path}: a student of the task '{trained_for or '?'}', not of '{self.task.name}'"
                raise InputError(
                    what, f"Leave out --task: {self.path.with_name(FILE_NAME)} says what it was tuned for."
                )
        if record is None:
            return None
        if record.grammar:
            grammar = self.path.with_name(record.grammar)
            with reading(grammar, "Export the student again."):
                self._own_grammar = grammar.read_text("utf-8") if grammar.is_file() else None
        self.example = record.example
        answer = self.task.answer if self.task else _answer(known, self.path.parent)
        return Asking(record.instruction, record.form, answer, record.answer_tokens, record.stops)

    @cached_property
    def model(self) -> Runtime:
        """The opened model.

        Raises InputError: no model, or one that cannot be opened; ArteError: its runtime is not installed.
        """
        from arte_edge.runtimes.loader import open_model

        model = open_model(self.path, self.threads)
        if self.asking is None and self.task is not None:
            self.asking, self._before = asking_of(model, self.task)
        asking = self.asking or Asking("", "answer", _TEXT, _FREE_TOKENS)
        self.asking = replace(asking, answer_tokens=self.max_tokens or asking.answer_tokens)
        return model

    def ask(self, text: str) -> Reply:
        """Return the answer to `text`, the greedy one.

        Raises InputError: `text` is blank, not UTF-8, or longer than the context;
        ArteError: the model cannot be opened, or the runtime failed.
        """
        checked_question(text)
        model = self.model
        assert self.asking is not None
        began = time.monotonic()
        messages = [*self._before, *self.asking.messages(text)]
        prompt = render(model, messages)
        n_prompt = len(model.tokenize(prompt))
        if 0 < model.context_tokens < n_prompt + self.asking.answer_tokens:
            raise QuestionTooLong(
                f"The question is too long: with its instruction it has {n_prompt} tokens, and the context of "
                f"{model.name} has room for {model.context_tokens}, the answer's {self.asking.answer_tokens} included",
                "Shorten the question, or ask a student with a longer context.",
            )
        options = self.asking.answer.options(text) if self.grammar else ()
        written = self._written(model, self.asking, messages, prompt, options)
        seconds = time.monotonic() - began
        tokens = len(model.tokenize(prompt + written)) - n_prompt
        return Reply(text, self.asking.read(written), written, tokens, seconds)

    def _written(
        self, model: Runtime, asking: Asking, messages: list[Message], prompt: str, options: Sequence[str]
    ) -> str:
        """Return what the model writes, constrained where that is wanted and possible, a stop string included."""

        def free(*stops: str) -> str:
            if model.chat_template is None:
                return model.generate([prompt], asking.answer_tokens, stops)[0]
            return model.chat([messages], asking.answer_tokens, stops)[0]

        own = None if asking.answer.letters else self._own_grammar
        grammar = (own or grammar_of(asking, messages[-1]["content"])) if self.grammar else None
        if grammar:
            limits = asking.answer_tokens, asking.answer_stops
            if (written := model.constrained(messages, grammar, *limits)) is not None:
                return written
        if not options:
            return free(*asking.answer_stops)
        begun = ""
        if asking.form == "reasoning-first":
            begun = free(ANSWER_OPEN, *asking.stops).removesuffix(ANSWER_OPEN)
        begun += asking.opening
        return begun + choose(model, prompt + begun, options, asking.closing) + asking.closing

    def close(self) -> None:
        """Free the model's memory."""
        if "model" in vars(self):
            self.model.close()
            del self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked_question(text: str) -> str:
    """Return `text`. Raises InputError: it is blank, or holds bytes that are not UTF-8."""
    if not text.strip():
        raise InputError("The question is empty", "Give a text, in quotes if it holds blanks.")
    if text != text.encode(errors="replace").decode():
        raise InputError("The text holds bytes that are not UTF-8", "Set the terminal to UTF-8.")
    return text


def choose(model: Runtime, prompt: str, options: Sequence[str], closing: str = "") -> str:
    """Return the option that `model` writes greedily after `prompt` if it may write nothing else.

    Options are tokenized together with the prompt. Where one is the beginning of another ("C" and "C++") the end
    token competes with the next one of the longer; a `closing` text after the options decides it as well.
    """
    alive = {option: model.tokenize(prompt + option + closing) for option in options}
    at = 0
    while len(alive) > 1:
        ended = [option for option, tokens in alive.items() if len(tokens) == at]
        following = {tokens[at] for tokens in alive.values() if len(tokens) > at}
        if not following:
            break  # the tokenizer does not tell them apart
        token = next(iter(following))
        if ended or len(following) > 1:
            logits = model.logits(next(iter(alive.values()))[:at])[-1]
            ends = model.stop_tokens if ended else frozenset[int]()
            token = max(sorted(following | ends), key=lambda i: float(logits[i]))
            if token in ends:
                return ended[0]
        alive = {option: tokens for option, tokens in alive.items() if len(tokens) > at and tokens[at] == token}
        at += 1
    return next(iter(alive))


def accepted_file(export: Path) -> Path:
    """Return the first file of an export that its gate accepted and that is there.

    Raises InputError: there is none, or its ``student.json`` is damaged.
    """
    known = read_student(export)
    artifacts = known.artifacts if known else ()
    for artifact in artifacts:
        if artifact.status == "ok" and (path := export / artifact.file).exists():
            return path
    if not artifacts:
        look(export)  # says what the folder is instead
    raise InputError(f"{export}: none of its files was accepted", "Export again: arte-edge export RUN.")


def _answer(known: StudentFile, folder: Path) -> Answer:
    """Return the kind of a student's answers, from its choices and the JSON schema beside it."""
    record = known.asking
    assert record is not None
    if record.choices == BOOLEANS:
        return Answer(kind="boolean")
    if record.choices:
        return Answer(kind="choice", choices=record.choices)
    schema = read_json(folder / record.json_schema) if record.json_schema else {}
    if not schema or schema.get("type") == "number":
        return Answer(kind="number") if schema else _TEXT
    return Answer(kind="choice") if "enum" in schema else Answer(kind="json", json_schema=json.dumps(schema))
