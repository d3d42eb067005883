"""What a card prints is run as it stands, beside the files that it was written for."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import Folders

pytest.importorskip("llama_cpp")
pytest.importorskip("onnxruntime_genai")

from arte_edge.console import Reporter
from arte_edge.export.chat import read_chat
from arte_edge.export.pipeline import export
from arte_edge.export.recipe import build
from arte_edge.export.source import open_source
from arte_edge.gguf.reader import read_model_header
from arte_edge.model_folder import chat_templates, tokenizer_files
from arte_edge.models.artifact import parse_list
from arte_edge.publish.card.card import card
from arte_edge.results.student_json import read_student
from arte_edge.tasks.loaders import load_task

FILE, FOLDER = "tiny-F16.gguf", "tiny-onnx-fp32"


@pytest.fixture(scope="module")
def out(tiny_run: Path, tmp_path_factory: Folders) -> Iterator[Path]:
    """An export of the run in each format, with its card."""
    folder = tmp_path_factory.mktemp("exports") / "out"
    recipe = build("loose", {"gguf": {"imatrix": False}, "verify": {"examples": 0}})
    passed = SimpleNamespace(checks=(), passed=True, fidelity=None, reason="")
    passed.as_dict = lambda: {"passed": True, "fidelity": None, "checks": [], "reason": ""}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARTE_EDGE_HOME", str(folder.parent / "home"))
        patch.setattr("arte_edge.verify.gate.verify_file", lambda *_, **__: passed)
        patch.setattr("arte_edge.export.pipeline._Reference.open", lambda *_: None)
        patch.setattr("arte_edge.export.pipeline._beside_origin", lambda *_: passed.as_dict())
        formats = parse_list("F16", "fp32")
        outcome = export(open_source(str(tiny_run)), formats, recipe, folder, Reporter(quiet=True))
        assert outcome.failures == ()
        card(folder)
    yield folder


def blocks(text: str, language: str, holding: str) -> str:
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)\n```", text, re.DOTALL) if holding in b]
    return str(found)


def runs(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("holding", ["llama_cpp", "onnxruntime_genai"])
def test_a_snippet_of_the_card_prints_an_answer(holding: str, out: Path) -> None:
    code = blocks((out / "README.md").read_text("utf-8"), "python", holding)
    assert runs(code, out).strip()


def test_the_checkpoint_s_card_prints_an_answer(out: Path, tiny_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run / "tune" / "student", tmp_path / "student"))
    text = card(out, checkpoint=folder).text
    assert runs(blocks(text, "python", "transformers"), folder).strip()
    assert "llama-server" not in text  # the folder holds no file for it


def test_the_curl_line_of_the_card_is_answered_by_a_server(out: Path, closed_port: int) -> None:
    text = blocks((out / "README.md").read_text("utf-8"), "sh", "curl")
    (line,) = [line for line in text.splitlines() if line.startswith("curl ")]
    words = ["-m", "llama_cpp.server", "--model", FILE, "--port", str(closed_port), "--n_ctx", "1024"]
    server = subprocess.Popen([sys.executable, *words], cwd=out, stderr=subprocess.DEVNULL)
    try:
        line = line.replace(":8080", f":{closed_port}").replace("curl ", "curl -s --noproxy '*' ", 1)
        for _ in range(120):
            done = subprocess.run(line, shell=True, cwd=out, capture_output=True, text=True)
            if done.returncode == 0:
                break
            time.sleep(1)
        answer = json.loads(done.stdout)["choices"][0]["message"]["content"]
    finally:
        server.kill()
        server.wait()
    assert answer.strip()


def test_every_file_holds_the_student_s_template(out: Path, tiny_run: Path) -> None:
    own = read_chat(tiny_run / "tune" / "student").chat_template
    assert own and load_task("home_intents").description.strip()[:40] in own
    assert read_model_header(out / FILE).chat_template == own
    for folder in (FOLDER, "tokenizer"):
        assert chat_templates(tokenizer_files(out / folder)) == {"default": own}


def test_genai_itself_renders_a_bare_question_as_the_student_does(out: Path, tiny_run: Path) -> None:
    import onnxruntime_genai as og

    model = og.Model(str(out / FOLDER))
    asked = [{"role": "user", "content": "Lights on?"}]
    text = og.Tokenizer(model).apply_chat_template(json.dumps(asked), add_generation_prompt=True)
    assert text == read_chat(tiny_run / "tune" / "student").render(asked)


def test_student_json_says_how_the_student_is_asked(out: Path) -> None:
    student, task = read_student(out), load_task("home_intents")
    assert student is not None and student.asking is not None
    how = student.asking
    assert (how.form, how.choices, how.stops) == ("answer", task.answer.choices, ("\n",))
    assert task.description.strip() in how.instruction and how.answer_tokens > 1
    assert how.example in {seed.input for seed in task.seed}
    assert json.loads((out / how.json_schema).read_text()) == {"enum": list(task.answer.choices)}
    from llama_cpp import LlamaGrammar

    grammar = (out / how.grammar).read_text()
    assert all(f'"{choice}"' in grammar for choice in how.choices)
    assert LlamaGrammar.from_string(grammar, verbose=False)
    assert {artifact.file for artifact in student.artifacts} == {FILE, f"{FOLDER}/"}
