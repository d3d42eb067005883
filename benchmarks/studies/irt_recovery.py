"""How far does a response matrix carry? Parameter recovery of `arte_edge.distill.stages.calibrate`, simulated.

    python benchmarks/studies/irt_recovery.py                        # 30 seeds, about 2 minutes on one core
    python benchmarks/studies/irt_recovery.py --girth-seeds 5        # beside it the girth library, 5 minutes more

For each scenario, number of respondents and seed: draw a truth, draw a matrix of 100
items from it, fit, and ask three things. Are α and β those of the truth? Are the 40
items of largest estimated α those of largest true α? And, what the preference set is
for: does the score on the chosen 40 put *fresh* respondents into their true order?
The last is asked of a wide population, N(0, 1), and of a narrow one, N(-1, 0.4²): one
weak student under many one-shot examples, which is what the preference score ranks.

Scenarios:
    textbook  α log-normal(0, 0.5), β ~ N(0, 1), independent respondents ~ N(0, 1).
    hard      textbook, but β ~ N(1.2, 1): small models and questions too hard for most.
    rough     what a real matrix is like: β ~ N(0.7, 1), 20 % of the items answered by
              coin, 10 % with the wrong label (α negative), and respondents that are
              models under four shot counts, alike in ability and in their quirks.
    floor     textbook, but half of the unknown answers are right by luck (True/False).

Writes rows.jsonl (one line a matrix, every figure) and summary.json under
benchmarks/results/irt_recovery/, and prints the summary as Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from score_worth_stats import spearman

from arte_edge.distill.stages.calibrate import ItemParameters, fit_2pl, probability, top_k

Floats = NDArray[np.float64]
RESULTS = Path(__file__).parents[1] / "results" / "irt_recovery"
RESPONDENTS = (8, 12, 16, 20, 40, 80, 200)
GIRTH_RESPONDENTS = (8, 20, 200)
N_ITEM, K, N_FRESH, SHOTS = 100, 40, 400, 4
MEAN_DIFFICULTY = {"textbook": 0.0, "hard": 1.2, "rough": 0.7, "floor": 0.0}


def draw(scenario: str, n_respondent: int, rng: np.random.Generator) -> tuple[Floats, Floats, Floats, Floats]:
    """Return true α and β ``[N_ITEM]``, abilities ``[n_respondent]`` and the matrix."""
    alpha = rng.lognormal(0, 0.5, N_ITEM)
    beta = rng.normal(MEAN_DIFFICULTY[scenario], 1, N_ITEM)
    ability = rng.normal(0, 1, n_respondent)
    quirks = np.zeros((n_respondent, N_ITEM))
    if scenario == "rough":
        alpha[:20], alpha[20:30] = 0, -alpha[20:30]
        family = np.arange(n_respondent) // SHOTS
        ability = rng.normal(0, 1, family.max() + 1)[family] + rng.normal(0, 0.3, n_respondent)
        quirks = rng.normal(0, 1, (family.max() + 1, N_ITEM))[family]
    chance = probability_of(scenario, ability, alpha, beta, quirks)
    return alpha, beta, ability, (rng.random(chance.shape) < chance).astype(np.float64)


def probability_of(scenario: str, ability: Floats, alpha: Floats, beta: Floats, quirks: Floats | float = 0.0) -> Floats:
    """Return the chance ``[n, N_ITEM]`` of a right answer under the scenario's own law."""
    logit = alpha * (ability[:, None] - beta) + quirks
    floor = 0.5 if scenario == "floor" else 0.0
    return floor + (1 - floor) * probability(logit.ravel(), [1.0], [0.0]).reshape(logit.shape)


def item_total(matrix: Floats) -> Floats:
    """Return the baseline: correlation ``[N_ITEM]`` of each item with the score on all the others."""
    rest = matrix.sum(axis=1, keepdims=True) - matrix
    item, rest = matrix - matrix.mean(axis=0), rest - rest.mean(axis=0)
    scale = np.sqrt((item**2).sum(axis=0) * (rest**2).sum(axis=0))
    correlation: Floats = np.full(N_ITEM, -1.0)  # an item without variation: last
    np.divide((item * rest).sum(axis=0), scale, out=correlation, where=scale > 0)
    return correlation


def best(score: Floats) -> NDArray[np.intp]:
    return np.argsort(-score, kind="stable")[:K]


def one_matrix(scenario: str, n_respondent: int, seed: int, girth: bool) -> dict[str, Any]:
    """Return every figure of one simulated matrix."""
    rng = np.random.default_rng([seed, n_respondent, *scenario.encode()])
    alpha, beta, ability, matrix = draw(scenario, n_respondent, rng)
    started = time.process_time()
    params = fit_2pl(matrix)
    row: dict[str, Any] = {
        "scenario": scenario,
        "respondents": n_respondent,
        "seed": seed,
        "fit_seconds": time.process_time() - started,
        "unsolved_items": int((~params.solved).sum()),
        "solved_by_all": int(matrix.all(axis=0).sum()),
        **recovery(params, alpha, beta),
        "ability_correlation": np.corrcoef(params.ability, ability)[0, 1],
    }
    at_student = probability([-1.0], params.discrimination, params.difficulty)[0]
    information = params.discrimination**2 * at_student * (1 - at_student)
    varied = params.solved & ~matrix.all(axis=0)
    chosen = {
        "fit": top_k(params, K),
        "fit_alpha_only": best(params.discrimination),  # unsolved items where their α puts them
        "fit_varied_first": best(np.where(varied, params.discrimination, 0)),  # solved by all last, too
        "information": best(information),  # of the fit, at the narrow population's ability
        "item_total": best(item_total(matrix)),
        "random": rng.permutation(N_ITEM)[:K],
        "true_alpha": best(alpha),
        "all_items": np.arange(N_ITEM),
    }
    if girth:
        for name, (other, seconds) in girth_fits(matrix).items():
            chosen[name] = best(other.discrimination)
            row[name] = {"seconds": seconds, **recovery(other, alpha, beta)}
            row[name]["alpha_with_ours"] = np.corrcoef(other.discrimination, params.discrimination)[0, 1]
            row[name]["alpha_on_bound"] = int(np.sum(np.abs(other.discrimination - [[0.2], [5]]) < 1e-3))
    truth = set(best(alpha).tolist())
    wide, narrow = rng.normal(0, 1, N_FRESH), rng.normal(-1, 0.4, N_FRESH)
    fresh_wide = rng.random((N_FRESH, N_ITEM)) < probability_of(scenario, wide, alpha, beta)
    fresh_narrow = rng.random((N_FRESH, N_ITEM)) < probability_of(scenario, narrow, alpha, beta)
    row["sets"] = {
        name: {
            "overlap": len(truth & set(items.tolist())) / K,
            "wide": spearman(fresh_wide[:, items].sum(axis=1), wide),
            "narrow": spearman(fresh_narrow[:, items].sum(axis=1), narrow),
        }
        for name, items in chosen.items()
    }
    return row


def recovery(params: ItemParameters, alpha: Floats, beta: Floats) -> dict[str, float]:
    sound = alpha > 0  # β of an item answered by coin or labelled wrong means nothing
    return {
        "alpha_correlation": float(np.corrcoef(params.discrimination, alpha)[0, 1]),
        "alpha_spearman": spearman(params.discrimination, alpha),
        "beta_correlation": float(np.corrcoef(params.difficulty[sound], beta[sound])[0, 1]),
    }


def girth_fits(matrix: Floats) -> dict[str, tuple[ItemParameters, float]]:
    """Fit the same matrix with girth: maximum marginal likelihood, and its small-sample variant."""
    from girth import twopl_mml, twopl_mml_eap

    fits = {}
    for name, estimate in (("girth_mml", twopl_mml), ("girth_mml_eap", twopl_mml_eap)):
        started = time.process_time()
        found = estimate(matrix.T.astype(int))
        fits[name] = (
            ItemParameters(found["Discrimination"], found["Difficulty"], found["Ability"], np.ones(N_ITEM, bool)),
            time.process_time() - started,
        )
    return fits


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry a scenario and size: mean and standard deviation over the seeds of every figure."""
    cells: dict[tuple[str, int], list[dict[str, float]]] = {}
    for row in rows:
        cells.setdefault((row["scenario"], row["respondents"]), []).append(dict(flatten(row)))
    return [
        {
            "scenario": scenario,
            "respondents": n,
            "matrices": len(cell),
            **{
                name: {
                    "n": len(values := [flat[name] for flat in cell if name in flat]),
                    "mean": round(float(np.mean(values)), 4),
                    "sd": round(float(np.std(values)), 4),
                }
                for name in dict.fromkeys(key for flat in cell for key in flat)
            },
        }
        for (scenario, n), cell in cells.items()
    ]


def flatten(row: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        elif key not in ("scenario", "respondents", "seed"):
            yield prefix + key, value


def table(summary: list[dict[str, Any]], scenario: str) -> str:
    """Return one scenario as a Markdown table of means."""
    shown = {"respondents": "", "α": "alpha_correlation", "β": "beta_correlation"}
    names = {"fit": "fit", "item-total": "item_total", "random": "random"}
    shown |= {f"overlap: {label}": f"sets.{name}.overlap" for label, name in names.items()}
    names["all 100"] = "all_items"
    for key in ("wide", "narrow"):
        shown |= {f"{key}: {label}": f"sets.{name}.{key}" for label, name in names.items()}
    lines = [" | ".join(shown), " | ".join("---" for _ in shown)]
    for cell in summary:
        if cell["scenario"] == scenario:
            means = [f"{cell[name]['mean']:.2f}" for name in shown.values() if name]
            lines.append(" | ".join([str(cell["respondents"]), *means]))
    return f"**{scenario}**\n\n" + "".join(f"| {line} |\n" for line in lines)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(float(value), 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=30, help="matrices a cell")
    parser.add_argument("--girth-seeds", type=int, default=0, help="of which girth fits as well (textbook)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for scenario in MEAN_DIFFICULTY:
        for n in RESPONDENTS:
            for seed in range(args.seeds):
                girth = scenario == "textbook" and n in GIRTH_RESPONDENTS and seed < args.girth_seeds
                rows.append(rounded(one_matrix(scenario, n, seed, girth)))
            print(f"{scenario}, {n} respondents: {args.seeds} matrices", file=sys.stderr, flush=True)
    summary = summarise(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    about = {
        "command": f"python benchmarks/studies/irt_recovery.py {shlex.join(sys.argv[1:])}".strip(),
        "items": N_ITEM,
        "k": K,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    cells = ",\n".join(json.dumps(cell) for cell in summary)
    document = f'{{"about": {json.dumps(about)},\n"cells": [\n{cells}\n]}}\n'
    (args.out / "summary.json").write_text(document, encoding="utf-8")
    for scenario in MEAN_DIFFICULTY:
        print(table(summary, scenario))


if __name__ == "__main__":
    main()
