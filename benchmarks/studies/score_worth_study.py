"""One task's drafts and questions as tokens of one student, and the two ways to ask a student.

For `score_worth_measure.py`. Prompts are the pipeline's own (`arte_edge.distill.prompts`), rendered with the
student's chat template; answers are read and choices are compared as the pipeline does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from score_worth_students import Students
from transformers import AutoTokenizer

from arte_edge.distill.prompts import ANSWER_CLOSE, STEP_BY_STEP, Shot, student_messages
from arte_edge.runtimes.choice_scoring import spans
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.answers import extract, matches
from arte_edge.tasks.loaders import load_task

__all__ = ["Study", "half"]

_TURN = "<|im_start|>"  # opens every turn of the students' templates


class Study:
    """One task's drafts and questions, as tokens of one student."""

    def __init__(self, work: dict[str, Any], folder: Path, device: str, rows: int) -> None:
        self.work, self.folder, self.device, self.rows = work, folder, device, rows
        self.task = load_task(work["task"])
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.engine = SimpleNamespace(
            chat_template=self.tokenizer.chat_template,
            special_tokens={"bos_token": self.tokenizer.bos_token, "eos_token": self.tokenizer.eos_token},
        )
        self.ends = frozenset({self.tokenizer.eos_token_id})
        self.drafts = work["drafts"]
        self.questions = [draft["question"] for draft in self.drafts]
        self._known: dict[str, list[int]] = {}
        self._choices: dict[tuple[str, tuple[str, ...]], list[list[tuple[tuple[int, ...], int]]]] = {}

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a rendered prompt; its turns are tokenised apart, since they begin with a special token."""
        ids: list[int] = []
        for i, turn in enumerate(text.split(_TURN)):
            piece = turn if i == 0 else _TURN + turn
            if piece not in self._known:
                self._known[piece] = self.tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += self._known[piece]
        return ids

    def prompt(self, question: str, opening: str, shot: Shot | None = None) -> str:
        messages = student_messages(self.task, question, [shot] if shot else ())
        return render(self.engine, messages, opening)  # type: ignore[arg-type]

    def right(
        self, students: Students, prompts: Sequence[tuple[str, str]], new: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Write up to `new` tokens after each (prompt, target).

        Returns 1 for right, 0 for wrong, -1 for no answer, ``[m][n]``, and the answers' lengths in tokens.
        """
        w = students.cast(half(self.device))
        written = students.write(w, [self.tokens(p) for p, _ in prompts], new, self.ends, 4 * self.rows)
        kind, table, lengths = self.task.answer, [], []
        for mine in written:
            texts = self.tokenizer.batch_decode([self._until_end(ids) for ids in mine])
            texts = [
                text[: text.find(ANSWER_CLOSE) + len(ANSWER_CLOSE)] if ANSWER_CLOSE in text else "" for text in texts
            ]
            answers = [extract(text, kind) for text in texts]
            table.append(
                [-1 if a is None else int(matches(a, t, kind)) for a, (_, t) in zip(answers, prompts, strict=True)]
            )
            lengths.append([len(self.tokens(text)) for text in texts])
        return table, lengths

    def _until_end(self, ids: list[int]) -> list[int]:
        return next((ids[:i] for i, token in enumerate(ids) if token in self.ends), ids)

    def chosen(self, students: Students, prompts: Sequence[tuple[str, Sequence[str]]]) -> np.ndarray[Any, Any]:
        """Return log-probabilities ``[m, n_prompt, n_choice]`` of the choices after each prompt (`choices.spans`)."""
        contexts: dict[tuple[int, ...], set[int]] = {}
        terms = []
        for text, options in prompts:
            head, mark, tail = text.rpartition(_TURN)
            before = self.tokens(head)
            own = [
                [((*before, *ids), token) for ids, token in choice]
                for choice in self._terms(mark + tail, tuple(options))
            ]
            for context, token in (term for choice in own for term in choice):
                contexts.setdefault(context, set()).add(token)
            terms.append(own)
        rows = list(contexts)
        wanted = [sorted(contexts[row]) for row in rows]
        w = students.cast(half(self.device))
        values = students.next_logp(w, rows, wanted, self.rows)
        out = np.zeros((students.m, len(prompts), max(len(options) for _, options in prompts)))
        for m in range(students.m):
            known = {row: dict(zip(ids, v, strict=True)) for row, ids, v in zip(rows, wanted, values[m], strict=True)}
            for p, choices in enumerate(terms):
                out[m, p, : len(choices)] = [sum(known[before][token] for before, token in one) for one in choices]
        return out

    def _terms(self, tail: str, options: tuple[str, ...]) -> list[list[tuple[tuple[int, ...], int]]]:
        """Return for each choice after the last turn's opening `tail` what is added up: (tokens before, token)."""
        if (tail, options) not in self._choices:
            lists = [self.tokens(tail + option + ANSWER_CLOSE) for option in options]
            ranges = spans(lists, self.tokens(tail))
            self._choices[tail, options] = [
                [(tuple(ids[:i]), ids[i]) for i in range(*ends)] for ids, ends in zip(lists, ranges, strict=True)
            ]
        return self._choices[tail, options]

    def forget(self) -> None:
        """Drop the tokens of turns seen so far: tens of thousands of drafts' prompts do not come again."""
        self._known.clear()

    def training_row(self, draft: dict[str, Any]) -> tuple[list[int], int]:
        """Return (tokens, how many are the prompt) of a draft as `tune` would train on it."""
        prompt = self.tokens(self.prompt(draft["input"], STEP_BY_STEP))
        completion = self.tokenizer(f" {draft['text'].strip()}", add_special_tokens=False)["input_ids"]
        return [*prompt, *completion, self.tokenizer.eos_token_id], len(prompt)


def half(device: str) -> torch.dtype:
    return torch.float16 if device != "cpu" else torch.float32
