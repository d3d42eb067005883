"""One page that holds the run's found, says what is missing, runs nothing and asks no network."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny import Make, accuracy, artifact, metrics, speed_row, student_file

from arte_edge.errors import InputError
from arte_edge.publish.report.data import read_run
from arte_edge.publish.report.page import render, report, stage_summaries
from arte_edge.results.rows import Reading, SpeedRow
from arte_edge.results.student_json import Fidelity, StudentFile, write_student

BAD = '<script>alert("pwned")</script>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def finish(folder: Path, stage: str, summary: dict[str, Any]) -> None:
    write(folder / stage / "manifest.json", {"inputs": "", "files": {}, "summary": summary})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose models wrote nasty texts, with an export and a benchmark."""
    folder = tmp_path / "myrun"
    folder.mkdir()
    settings = 'name = "my run"\nseed = 3\n[prefer]\nscore = "likelihood"\n[task]\nref = "t"\n'
    (folder / "run.toml").write_text(settings)
    share = {"accuracy": 0.5, "low": 0.4, "high": 0.6}
    check = dict.fromkeys(("teacher", "student", "student_constrained"), share)
    check |= {"n": 40, "chance": 0.2, "own_labels": share | {"rows": 31}, "role": "inputs", "why": f"worse {BAD}"}
    finish(folder, "check", check)
    finish(folder, "elicit", {"old": "run without figures"})
    scores = [
        {"question": f"q{i % 3}", "technique": i % 4, "score": 0.4 + i / 50, "text": f"{BAD} {'so ' * i}"}
        for i in range(12)
    ]
    write(folder / "prefer" / "scores.jsonl", *scores)
    questions = [{"id": f"q{i}", "input": f"{BAD} question {i}", "score": 0.5} for i in range(3)]
    write(folder / "prefer" / "questions.jsonl", *questions)
    finish(folder, "prefer", {"drafts": 12, "k": 8, "mean": 0.5, "sd": 0.1, "measured_against_bias": None})
    write(folder / "tailor" / "train.jsonl", {"input": BAD, "rationale": BAD, "label": BAD})
    finish(folder, "tailor", {"examples": 1})
    test = {"gained": 9, "lost": 1, "difference": 0.3, "low": 0.2, "high": 0.4, "p_value": 0.001}
    row = {"setting": "as asked", "n": 100, "right": 50, **share}
    rows = [{"model": name, **row} for name in ("own labels", "base student", "tuned student")]
    paired = [{"against": name, "setting": "as asked", **test} for name in ("own labels", "base student")]
    found = {"rows": rows, "paired": paired, "format_share": 0.5, "chance": 0.2, "form": "answer", "partial": False}
    finish(folder, "evaluate", found)
    write(
        folder / "events.jsonl",
        {"event": "stage", "name": "check", "state": "begin"},
        {"event": "calls", "n": 120, "tokens": 900, "kept": 20},
        {"event": "stage", "name": "check", "state": "done", "seconds": 12.5},
        {"event": "warning", "text": f"beware {BAD}"},
    )
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "sta')  # a killed process tears its last line
    write_student(folder / "export", export())
    (folder / "export" / "bench.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in bench()))
    return folder


FILES = {"Q8_0": (145_000_000, 30.0), "Q4_K_M": (105_000_000, 45.0)}


def export() -> StudentFile:
    gate = {"fidelity": Fidelity(passed=True, metrics=metrics()), "accuracy": accuracy(20, difference=-0.05)}
    return student_file(*(artifact(name, size_bytes=size, **gate) for name, (size, _) in FILES.items()))


def bench() -> list[SpeedRow]:
    times = tuple(20.0 + i % 5 for i in range(64))
    readings = tuple(Reading(t_s=float(i), temperature_c=50.0 + i) for i in range(9))
    known = {"itl_samples_ms": (times,), "readings": readings, "temperature_c_max": 58.0}
    rows = []
    for name, (_, rate) in FILES.items():
        file = artifact(name)
        mine = {"model_filename": file.file, "tensor_sha256": file.tensor_sha256}
        rows.append(speed_row("tg64", rate, **known | mine))
    lost = {"status": "out-of-memory", "reason": f"killed {BAD}", "tensor_sha256": ""}
    return [*rows, speed_row("tg64", model_filename="m-F16.gguf", **lost)]


class Page(HTMLParser):
    """Collects tags, addresses and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for name, v in attrs if name in ("src", "href", "action", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def html(run: Path) -> str:
    return render(read_run(str(run)))


def test_the_page_shows_the_run(html: str) -> None:
    page = Page(html)
    for figure in (
        "my run",
        "50% before, 50% after (as asked, 100 test examples; +30.0 points (+20.0 to +40.0), p = 0.001,",
        "Of the gain on the base student 50% is format",
        "Trained on your 31 labels alone it was right on 50%. The teacher writes inputs for given answers",
        "The first 1 of 1 inputs that the teacher wrote for given answers.",
        "12 s, 100 calls, 900 tokens generated",
        "12 candidates scored on 8 questions",
        "m-Q4_K_M.gguf on raspberry-pi-5, 4 threads",
        "at most 58 °C; not throttled",
        "m-F16.gguf, tg64: out-of-memory. killed",
        "105.0 MB",
    ):
        assert figure in page.text, figure
    # accuracy, time, three of scores, the front, two traces with temperature
    assert page.tags.count("svg") == 10


def test_first_it_says_whether_the_user_s_own_labels_would_have_done(run: Path, html: str) -> None:
    lead = "Better than your own labels alone: +30.0 (+20.0 to +40.0) points, p = 0.001."
    assert 0 < html.index(lead) < html.index("50% before")
    places = [html.index(f"<td>{name}</td>") for name in ("base student", "own labels", "tuned student")]
    assert places == sorted(places)


def test_rounds_are_told_apart_and_the_student_that_was_kept_is_named(run: Path) -> None:
    with (run / "run.toml").open("r+") as file:
        file.write("rounds = 3\n" + (run / "run.toml").read_text())
    tuned = {"examples": 9, "own_labels": 4, "steps": 5, "loss_first": 2.0, "loss_last": 1.0, "form": "answer"}
    trial = {"tokens": {"answer": 3.0, "answer-first": 30.0}, "accuracy": {"answer": 0.6, "answer-first": 0.5}}
    finish(run, "target", {"form": "answer", "rows": 40, "n": 100, "with_reasons": 9, **trial})
    for n, right in ((1, 20), (2, 30)):
        finish(run, f"tune-{n}", tuned | {"steps": 5 * n})
        finish(run, f"validate{'-2' * (n > 1)}", {"n": 40, "right": right})
    finish(run, "tailor-2", {"examples": 1, "questions": 3})
    finish(run, "tune", tuned | {"steps": 10})
    found = read_run(str(run))
    stages = {stage["name"]: stage["result"] for stage in stage_summaries(found)}
    assert "the answer alone 60% (about 3 tokens); the answer, then the reasons 50%" in stages["target"]
    assert stages["tune-2"].endswith("4 of the examples are your own labels. It writes the answer alone. "
                                     "This is the run's student.")  # fmt: skip
    assert "run's student" not in stages["tune-1"] and "tune" not in stages
    assert (stages["validate"], stages["validate-2"]) == ("20 of 40 right (50%).", "30 of 40 right (75%).")
    assert [line.partition(":")[0] for line in found.missing] == ["calibrate", "align"]  # no third round was made


def test_a_run_folder_of_the_version_before_has_a_page(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Path(__file__).parents[2] / "data/version_1/run", tmp_path / "run"))
    share = {"setting": "0-shot", "n": 8, "right": 4, "accuracy": 0.5, "low": 0.2, "high": 0.8}
    test = {"gained": 1, "lost": 1, "difference": 0.0, "low": -0.3, "high": 0.3, "p_value": 1.0}
    rows = [{"model": name, **share} for name in ("base student", "tuned student")]
    finish(folder, "evaluate", {"rows": rows, "paired": {"0-shot": test}, "format_share": None, "chance": 0.1})
    page = report(folder)
    assert page.path == folder / "report.html" and any(line.startswith("tune") for line in page.missing)
    found = read_run(str(folder))
    assert list(found.summaries) == ["check", "elicit", "calibrate", "prefer", "tailor", "evaluate"]
    assert found.summaries["prefer"]["k"] == 8 and found.cost["elicit"].calls > 0
    check = stage_summaries(found)[0]["result"]
    assert "with constrained answers" in check and "own labels" not in check and "None" not in check
    for lead in ("Not compared with a student of your own labels.", "(0-shot, 8 test examples"):
        assert lead in page.path.read_text("utf-8")


def test_what_models_wrote_stays_text_and_nothing_is_fetched(html: str) -> None:
    page = Page(html)
    assert "script" not in page.tags and "<script" not in html
    assert page.text.count(BAD) >= 6
    assert [a for a in page.addresses if a != "data:,"] == []
    assert not re.search(r"https?://|@import|url\(", html)
    assert "default-src 'none'" in html


def test_nothing_of_this_machine_is_in_it_and_it_is_the_same_each_time(run: Path, html: str) -> None:
    assert str(run.parent) not in html
    assert render(read_run(str(run))) == html


def test_what_is_missing_is_said_and_not_drawn(run: Path) -> None:
    missing = read_run(str(run)).missing
    assert [line.partition(":")[0] for line in missing] == ["calibrate", "align", "tune"]
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "prefer")
    (run / "events.jsonl").unlink()
    page = Page(render(read_run(str(run))))
    assert "files: no files yet" in page.text and "prefer: this stage has not finished" in page.text
    assert page.tags.count("svg") == 1 and "What the student prefers" not in page.text


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    page = Page(render(read_run(str(tmp_path))))
    assert "svg" not in page.tags and page.text.count("has not finished") == 8


def test_a_folder_that_is_no_run_and_a_damaged_file_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run"):
        read_run(str(tmp_path))
    (run / "prefer" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"prefer/manifest\.json"):
        read_run(str(run))


@pytest.fixture
def browse(tmp_path: Path) -> Make:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")

    def call(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
                 "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'chrome'}")  # fmt: skip
        command = [CHROMIUM, *fixed, *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    return call


def test_a_browser_draws_it_without_a_complaint(run: Path, tmp_path: Path, browse: Any) -> None:
    page = report(run, out=tmp_path / "report.html").path
    # A probe, in a copy of the page that may run it, writes down what the browser laid out and fetched.
    probe = """<script>addEventListener("load", () => { document.title = JSON.stringify({
      boxes: [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect()).map(b => [b.width, b.height]),
      fetched: performance.getEntriesByType("resource").map(e => e.name),
      wide: document.documentElement.scrollWidth - innerWidth }) })</script></body>"""
    copy = tmp_path / "probe.html"
    html = page.read_text().replace("style-src", "script-src 'unsafe-inline'; style-src")
    copy.write_text(html.replace("</body>", probe))
    done = browse(copy, "--window-size=420,900", "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(re.search(r"<title>(\{.*?)</title>", done.stdout)[1].replace("&quot;", '"'))  # type: ignore[index]
    assert len(found["boxes"]) == 10 and all(w > 250 and h > 60 for w, h in found["boxes"])
    assert found["fetched"] == []
    assert found["wide"] <= 0  # a narrow window need not scroll sideways
    for name, scheme in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{name}.png"
        colours = f"--blink-settings=preferredColorScheme={scheme}"
        assert "CONSOLE" not in browse(page, colours, f"--screenshot={shot}", "--window-size=900,1200").stderr
        assert shot.stat().st_size > 20_000  # a blank page is a tenth of that
