"""The contributor's commands are the same on a machine, in a commit hook and in every CI."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def load(path: Path) -> dict[Any, Any]:
    parsed: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return parsed


def make_targets(text: str) -> list[str]:
    return re.findall(r"^(?:run: )?make ([a-z ]+?)\b(?: \|\|.*)?$", text, flags=re.MULTILINE)


def test_the_workflow_runs_what_ci_and_the_contributor_run() -> None:
    job = load(WORKFLOW)["jobs"]["test"]
    here = make_targets("\n".join(step["run"] for step in job["steps"] if "run" in step))
    assert here == make_targets((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    defined = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"check", "test"} <= set(here)
    assert all(f"make {target} " in guide and target in defined for target in here)


def test_the_workflow_covers_x86_arm_and_macos_and_may_only_read() -> None:
    workflow = load(WORKFLOW)
    job = workflow["jobs"]["test"]
    rows = [(row["os"], row["python"]) for row in job["strategy"]["matrix"]["include"]]
    systems = {os for os, _ in rows}
    assert any(os.startswith("ubuntu") and not os.endswith("-arm") for os in systems)
    assert any(os.startswith("ubuntu") and os.endswith("-arm") for os in systems)
    assert any(os.startswith("macos") for os in systems)
    assert {os for os, python in rows if python == "3.11"} == systems
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    used = [step["uses"] for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", name) for name in used), "pin by commit"


def test_the_commit_hooks_run_the_environments_own_tools() -> None:
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert set(hooks) == {"ruff-check", "ruff-format", "mypy"}
    assert all(
        hook["language"] == "system" and hook["entry"].startswith(".venv/bin/") for hook in hooks.values()
    )
    assert "pre-commit" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_issue_forms_ask_for_what_a_fix_needs() -> None:
    forms = ROOT / ".github" / "ISSUE_TEMPLATE"
    for name in ("bug.yml", "device.yml"):
        form = load(forms / name)
        assert form["name"] and form["description"] and form["labels"]
        required = [field for field in form["body"] if field.get("validations", {}).get("required")]
        assert required
