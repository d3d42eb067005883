"""Does the influence of a draft, one backward pass, predict what training on it does? On the recorded studies.

    python benchmarks/studies/score_worth_first_order.py record NAME STUDENT    # NAME-first-order.npz; one core
    python benchmarks/studies/score_worth_first_order.py read                   # first-order.json, a table on stdout

NAME is a study's, `home_intents` or `home_intents-1.5b`; STUDENT the checkpoint folder that was trained there. The
prompts are those that the recorded students were trained with. Whole questions in a random order, so that any part of
a record is a sample; killed, it goes on where it was. Compared on the drafts that have an influence.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from score_worth_record import RESULTS, Record
from score_worth_scores import Floats, draft_scores
from score_worth_stats import centred, groups_of, spearman, with_interval

from arte_edge.cache import atomic_file, write_atomic
from arte_edge.distill.preference.influence import PARTS, Influence, Question, standard_error
from arte_edge.distill.preference.scoring import length_effect
from arte_edge.distill.prompts import ANSWER_CLOSE, ANSWER_PREFILL, STEP_BY_STEP, student_messages
from arte_edge.runtimes.prompt_render import render
from arte_edge.tasks.loaders import load_task
from arte_edge.transformers_load import load_tokenizer

BASELINES = ("length-controlled", "likelihood", "shortest", "random")
LAYERS = (15, 8, 4)  # of 30, from the top
PATTERN = "*-first-order.npz"
SAVE_EVERY = 5


class _Template:
    """What `render` needs of an engine."""

    def __init__(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        self.chat_template: str | None = tokenizer.chat_template
        self.special_tokens = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}


def record(name: str, student: Path, layers: float, most: int) -> None:
    """Measure drafts that `NAME-first-order.npz` does not hold yet: those trained on alone come first."""
    work = json.loads((RESULTS / f"{name}-work.json").read_text("utf-8"))
    task, template, study = load_task(work["task"]), _Template(student), Record(name)

    def prompt(question: str, opening: str) -> str:
        return render(template, student_messages(task, question, []), opening)

    questions = []
    for row in (work["validation"][i] for i in work["preferred"]):
        options = task.answer.options(row["input"])
        choices = tuple(option + ANSWER_CLOSE for option in options)
        asked = prompt(row["input"], ANSWER_PREFILL)
        questions.append(Question(asked, choices, options.index(row["target"])))
    began = time.process_time()
    influence = Influence(student, questions, free=True, layers=layers)
    gradient_s = time.process_time() - began
    print(f"gradient of the right answers: {gradient_s:.1f} CPU s", flush=True)
    out = RESULTS / f"{name}-first-order.npz"
    known = dict(np.load(out)) if out.is_file() else {}
    d = len(work["drafts"])
    products = known.get("products", np.full((d, len(influence.names), PARTS), np.nan, dtype=np.float32))
    seconds = known.get("cpu_s", np.full(d, np.nan))
    for n, place in enumerate([i for i in _order(study) if np.isnan(seconds[i])][:most], 1):
        draft, began = work["drafts"][place], time.process_time()
        products[place] = influence.by_weight(prompt(draft["input"], STEP_BY_STEP), f" {draft['text'].strip()}")
        seconds[place] = time.process_time() - began
        if n % SAVE_EVERY == 0:
            arrays: dict[str, Any] = {"products": products, "cpu_s": seconds, "gradient_cpu_s": gradient_s}
            with atomic_file(out) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, names=np.array(influence.names), **arrays)
            print(f"{n}: {np.nanmean(seconds):.2f} CPU s a draft", flush=True)


def _order(study: Record) -> list[int]:
    """Return the places of drafts by whole questions in a random order; those that no student had alone come last."""
    alone = np.zeros(len(study.question), dtype=bool)
    alone[study.alone] = True
    alone &= ~study.parroted
    parts = groups_of(study.question)
    shuffled = [parts[i] for i in np.random.default_rng(0).permutation(len(parts))]
    first = [int(i) for part in shuffled for i in part if alone[i]]
    return first + [int(i) for part in shuffled for i in part if not alone[i]]


def read() -> dict[str, Any]:
    """Return, by study, how the influence and the scores before it agree with training on one draft, and costs."""
    return {path.name.removesuffix("-first-order.npz"): _of_study(path) for path in sorted(RESULTS.glob(PATTERN))}


def _of_study(path: Path) -> dict[str, Any]:
    study, found = Record(path.name.removesuffix("-first-order.npz")), dict(np.load(path))
    products = found["products"].astype(float)
    there = np.isfinite(found["cpu_s"])
    gain = np.full(len(there), np.nan)
    gain[study.alone] = study.gain
    there &= np.isfinite(gain) & ~study.parroted
    clusters = [part[there[part]] for part in groups_of(study.question)]
    clusters = [part for part in clusters if part.size]
    places = np.sort(np.concatenate(clusters))
    several = [part for part in clusters if part.size > 1]
    tokens = study.grid["tokens"].astype(float)
    layer = np.array(
        [int(name.split("layers.")[1].split(".")[0]) if "layers." in name else -1 for name in found["names"]]
    )
    scores = {"influence": products.sum((1, 2))}
    scores |= {f"influence, {n} layers": products[:, layer > layer.max() - n].sum((1, 2)) for n in LAYERS}
    level = scores["influence"].copy()
    level[places] -= length_effect(level[places], tokens[places])
    scores["influence, length regressed out"] = level
    scores |= {key: value for key, value in draft_scores(study.grid).items() if key in BASELINES}
    own = _inside(gain, study, places)
    table = {}
    for key, score in scores.items():
        mine = _inside(score, study, places)
        table[key] = {
            "one draft": with_interval(lambda at, s=score: spearman(s[at], gain[at]), clusters),
            "within its question": with_interval(lambda at, s=mine: spearman(s[at], own[at]), several),
        }
    parts = products.sum(1)[places]
    return {
        "drafts": int(places.size),
        "questions": len(several),
        "cpu_s": {
            "gradient of the right answers": round(float(found["gradient_cpu_s"]), 1),
            "a draft": round(float(np.nanmedian(found["cpu_s"])), 3),
        },
        "standard error, in standard deviations between drafts": round(
            standard_error(parts) / float(parts.sum(1).std()), 3
        ),
        "scores": table,
    }


def _inside(values: Floats, study: Record, places: Any) -> Floats:
    """Return `values` less the mean of their question's drafts in `places`, NaN elsewhere."""
    out = np.full(len(values), np.nan)
    out[places] = centred(values[places], study.question[places])
    return out


def table(found: Mapping[str, Any]) -> str:
    """Return the comparison as Markdown."""
    lines = []
    for name, study in found.items():
        cost = study["cpu_s"]
        lines += [f"## {name}: {study['drafts']} drafts, {study['questions']} questions with several", ""]
        lines += [f"{cost['a draft']} CPU s a draft, {cost['gradient of the right answers']} once", ""]
        lines += ["| score | one draft | within its question |", "|---|---|---|"]
        for key, row in study["scores"].items():
            cells = ["{:+.2f} ({:+.2f} to {:+.2f})".format(*row[of]) for of in ("one draft", "within its question")]
            lines.append(f"| {key} | {cells[0]} | {cells[1]} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record")
    recording.add_argument("name")
    recording.add_argument("student", type=Path)
    recording.add_argument("--layers", type=float, default=1.0, help="share of the layers, from the top")
    recording.add_argument("--most", type=int, default=10_000, help="drafts in this call")
    verbs.add_parser("read")
    options = parser.parse_args()
    if options.verb == "record":
        return record(options.name, options.student, options.layers, options.most)
    found = read()
    write_atomic(RESULTS / "first-order.json", (json.dumps(found, indent=1) + "\n").encode())
    print(table(found))
    return None


if __name__ == "__main__":
    main()
