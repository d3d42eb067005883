"""Measure, on a GPU, what a draft's score says of what training on the draft does.

    python benchmarks/studies/score_worth_measure.py WORK.json STUDENT_FOLDER OUT --copies 16

WORK.json is from `score_worth_work.py`; STUDENT_FOLDER a Llama checkpoint (SmolLM2). Three measurements:

1. *The full grid.* Every draft as the one example before every validation question: what the student writes,
   and the log-probability of every answer with its tag opened (``grid.npz``).
2. *One draft's influence.* Fresh copies of the student each take two Adam steps on one draft; the change of
   the right answers' probability on 96 fresh questions (``influence.npz``).
3. *Groups.* Drafts are sorted by each score on the preference set: every question's best and worst rationale,
   the top and bottom quarter of the questions, five quintiles of the drafts; and random groups of the same
   size. Each group trains a student, as `tune` does, under several seeds; it is judged on fresh questions,
   written and forced (``groups.jsonl``).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from score_worth_scores import Floats, draft_scores, forced_outcome
from score_worth_students import Students
from score_worth_study import Study, half

from arte_edge.distill.prompts import ANSWER_PREFILL, STEP_BY_STEP, Shot
from arte_edge.store import read_jsonl

GRID_TOKENS, ANSWER_TOKENS = 64, 48  # that a student may write
RATE, WARMUP, BATCH, EPOCHS = 1e-4, 0.03, 4, 2  # tune's, at the quick start's rate for few examples
INFLUENCE_RATE, INFLUENCE_STEPS, INFLUENCE_ITEMS = 2e-5, 2, 96
BEST_SEEDS, QUINTILE_SEEDS, RANDOM_GROUPS = 6, 3, 32


def grid(study: Study, students: Students, limit: int) -> dict[str, Any]:
    """Measure every draft before every validation question, and the questions without a draft."""
    asked = study.work["validation"][:limit]
    options = [study.task.answer.options(row["input"]) for row in asked]
    shots = [Shot(draft["input"], draft["text"]) for draft in study.drafts]
    right, logp = [], []
    for start in range(0, len(shots), 40):  # forty drafts at once: the table of tokens stays small
        some = shots[start : start + 40]
        steps = [(study.prompt(row["input"], STEP_BY_STEP, shot), row["target"]) for shot in some for row in asked]
        force = [
            (study.prompt(row["input"], ANSWER_PREFILL, shot), own)
            for shot in some
            for row, own in zip(asked, options, strict=True)
        ]
        right += study.right(students, steps, GRID_TOKENS)[0][0]
        logp.append(study.chosen(students, force)[0])
        study.forget()
    d, v = len(shots), len(asked)
    zero = study.chosen(
        students, [(study.prompt(r["input"], ANSWER_PREFILL), o) for r, o in zip(asked, options, strict=True)]
    )
    own = own_likelihood(study, students)
    return {
        "right": np.array(right, dtype=np.int8).reshape(d, v),
        "logp": np.concatenate(logp).reshape(d, v, -1).astype(np.float32),
        "zero_shot": zero[0].astype(np.float32),
        "truth": np.array([o.index(r["target"]) for o, r in zip(options, asked, strict=True)]),
        "question": np.array(study.questions),
        "tokens": np.array([len(study.training_row(d)[0]) - study.training_row(d)[1] for d in study.drafts]),
        "own": own,
        "preferred": np.array(study.work["preferred"]),
    }


def own_likelihood(study: Study, students: Students) -> Floats:
    """Return the student's own mean log-probability a token of each draft, asked without an example ``[d]``."""
    rows, wanted, whose = [], [], []
    for place, draft in enumerate(study.drafts):
        tokens, prompt = study.training_row(draft)
        for i in range(prompt, len(tokens)):
            rows.append(tokens[:i])
            wanted.append([tokens[i]])
            whose.append(place)
    values = students.next_logp(students.cast(half(study.device)), rows, wanted, study.rows)[0]
    logp, owner = np.array([v[0] for v in values]), np.array(whose)
    return np.array([logp[owner == place].mean() for place in range(len(study.drafts))])


def judged(study: Study, students: Students, n: int, *, written: bool) -> list[dict[str, Any]]:
    """Ask every copy the first `n` fresh questions; return a row a copy."""
    asked = study.work["outcome"][:n]
    n = len(asked)
    options = [study.task.answer.options(row["input"]) for row in asked]
    truth = np.array([o.index(r["target"]) for o, r in zip(options, asked, strict=True)])
    logp = study.chosen(
        students, [(study.prompt(r["input"], ANSWER_PREFILL), o) for r, o in zip(asked, options, strict=True)]
    )
    rows = [forced_outcome(one, truth) for one in logp]
    if written:
        asks = [(study.prompt(r["input"], STEP_BY_STEP), r["target"]) for r in asked]
        table, lengths = study.right(students, asks, ANSWER_TOKENS)
        for row, mine, tokens in zip(rows, table, lengths, strict=True):
            answered = [t for t, x in zip(tokens, mine, strict=True) if x >= 0]
            row |= {"right": sum(x == 1 for x in mine), "answered": len(answered)}
            row["answer_tokens"] = round(float(np.mean(answered)), 2) if answered else None
    return rows


def influence(study: Study, students: Students) -> dict[str, Any]:
    """Train copies on one draft each; return what it did to the fresh questions ``[d]``."""
    students.reset()
    base = judged(study, students, INFLUENCE_ITEMS, written=False)[0]
    found: list[dict[str, Any]] = []
    for start in range(0, len(study.drafts), students.m):
        some = study.drafts[start : start + students.m]
        rows = [study.training_row(draft) for draft in (some * students.m)[: students.m]]
        students.reset()
        students.train([[[row] for row in rows]] * INFLUENCE_STEPS, INFLUENCE_RATE, 0.0)
        found += judged(study, students, INFLUENCE_ITEMS, written=False)[: len(some)]
    return {key: np.array([row[key] - base[key] for row in found]) for key in base}


def groups(study: Study, scores: dict[str, Floats]) -> list[dict[str, Any]]:
    """Return the groups to train on: name of the score, which part, members, seed."""
    by_question: dict[int, list[int]] = {}
    for place, key in enumerate(study.questions):
        by_question.setdefault(key, []).append(place)
    several = [places for places in by_question.values() if len(places) > 1]
    planned = []
    for name, score in scores.items():
        means = sorted(by_question.values(), key=lambda places: -float(np.mean(score[places])))
        quarter = max(1, len(means) // 4)
        order = np.argsort(-score, kind="stable")
        parts = {
            "best": [max(places, key=lambda p: score[p]) for places in several],
            "worst": [min(places, key=lambda p: score[p]) for places in several],
            "top questions": [p for places in means[:quarter] for p in places],
            "bottom questions": [p for places in means[-quarter:] for p in places],
        }
        quintiles = {f"quintile {i + 1}": part.tolist() for i, part in enumerate(np.array_split(order, 5))}
        for part, members in (*parts.items(), *quintiles.items()):
            n = QUINTILE_SEEDS if part in quintiles else BEST_SEEDS
            planned += [{"score": name, "part": part, "members": members, "seed": seed} for seed in range(n)]
    size = len(several)
    for i in range(RANDOM_GROUPS):
        rng = random.Random(f"random/{i}")
        members = [rng.choice(places) for places in several] if i % 2 else rng.sample(range(len(study.drafts)), size)
        planned.append({"score": "none", "part": ("any drafts", "any rationale")[i % 2], "members": members, "seed": i})
    return planned


def train_groups(study: Study, students: Students, planned: list[dict[str, Any]], out: Path, until: float) -> None:
    """Train and judge group after group until the time `until` (monotonic seconds); one row each into `out`."""
    done = {(r["score"], r["part"], r["seed"]) for r in read_jsonl(out) if r["part"] != "base"}
    planned = [group for group in planned if (group["score"], group["part"], group["seed"]) not in done]
    # The same order of work whatever the time: by seed first, so that a cut leaves whole seeds of all scores.
    planned = sorted(planned, key=lambda g: (g["seed"] if g["score"] != "none" else g["seed"] // 8, len(g["members"])))
    n = len(study.work["outcome"])
    encoded = [study.training_row(draft) for draft in study.drafts]
    with out.open("a", encoding="utf-8") as file:
        for start in range(0, len(planned), students.m):
            if time.monotonic() > until:
                break
            some = planned[start : start + students.m]
            lanes = (some * students.m)[: students.m]
            students.reset()
            losses = students.train(_batches(lanes, encoded), RATE, WARMUP)
            for i, (group, row) in enumerate(zip(some, judged(study, students, n, written=True), strict=False)):
                row |= {"score": group["score"], "part": group["part"], "seed": group["seed"], "n": n}
                row |= {"members": group["members"], "loss": round(losses[-1][i], 4)}
                file.write(json.dumps(row) + "\n")
            file.flush()


def _batches(
    lanes: Sequence[dict[str, Any]], encoded: Sequence[tuple[list[int], int]]
) -> list[list[list[tuple[list[int], int]]]]:
    """Return ``[step][m][b]``; a group that is smaller than the lane's longest goes round once more for the rest."""
    steps = max(-(-len(g["members"]) * EPOCHS // BATCH) for g in lanes)
    table = []
    for group in lanes:
        rng, order = random.Random(f"{group['seed']}/order"), []
        while len(order) < steps * BATCH:
            members = list(group["members"])
            rng.shuffle(members)
            order += members
        table.append(order)
    return [[[encoded[i] for i in row[s * BATCH : (s + 1) * BATCH]] for row in table] for s in range(steps)]


def measure(study: Study, options: argparse.Namespace, began: float) -> None:
    """Do what is not done yet of the three measurements, each into a file of its own."""
    name, out = study.work["task"], options.out

    def say(what: str) -> None:
        print(f"{name} {time.monotonic() - began:6.1f} s {what}", flush=True)

    grid_file, effect_file, rows_file = (
        out / f"{name}-{what}" for what in ("grid.npz", "influence.npz", "groups.jsonl")
    )
    if not grid_file.is_file():
        one = Students(options.student, 1, study.device)
        np.savez_compressed(grid_file, **grid(study, one, options.items))
        del one
    measured = dict(np.load(grid_file))
    answered, right = (measured["right"] >= 0).mean(), (measured["right"] == 1).mean()
    say(f"grid {measured['right'].shape}: {answered:.1%} answered, {right:.1%} right")
    many = Students(options.student, options.copies, study.device)
    if not effect_file.is_file():
        effect = influence(study, many)
        np.savez_compressed(effect_file, **effect)
        say(f"influence of single drafts: sd of the probability {effect['probability'].std():.5f}")
    if not rows_file.is_file():
        many.reset()
        n = len(study.work["outcome"])
        base = {"score": "none", "part": "base", "n": n, **judged(study, many, n, written=True)[0]}
        rows_file.write_text(json.dumps(base) + "\n", "utf-8")
    planned = groups(study, draft_scores(measured))
    train_groups(study, many, planned, rows_file, began + options.seconds)
    say(f"{len(rows_file.read_text().splitlines()) - 1} of {len(planned)} groups trained")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--copies", type=int, default=16)
    parser.add_argument("--rows", type=int, default=300_000, help="rows times tokens in one forward pass")
    parser.add_argument("--items", type=int, default=100, help="validation questions of the grid")
    parser.add_argument("--outcome", type=int, default=240, help="fresh questions that a trained group is asked")
    parser.add_argument("--seconds", type=float, default=600.0, help="no new training begins after that")
    options = parser.parse_args()
    began = time.monotonic()
    work = json.loads(options.work.read_text("utf-8"))
    work["outcome"] = work["outcome"][: options.outcome]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    print(torch.cuda.get_device_name() if device == "cuda" else "cpu", torch.__version__, flush=True)
    measure(Study(work, options.student, device, options.rows), options, began)


if __name__ == "__main__":
    main()
