"""The section of a card that says how the student is asked: commands and snippets that work as printed.

A bare user message is enough, since every file's chat template holds the instruction. `tests/export/test_use.py` runs
what is printed here against the files that it is printed for.
"""

from __future__ import annotations

import json
import shlex

from arte_edge.publish import publishable
from arte_edge.publish.card.metadata import CardOptions
from arte_edge.results.student_json import StudentFile

__all__ = ["use_section"]

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
        parts += [
            _code("sh", "\n".join(lines)),
            _code("python", _LLAMA_CPP.format(model=_quoted(gguf), **shown)),
        ]
    if folder := files.get("onnx-genai"):
        parts.append(_code("python", _GENAI.format(model=_quoted(folder.rstrip("/")), **shown)))
    if how and how.grammar and files:
        schema = f"; `{how.json_schema}` is their JSON schema" if how.json_schema else ""
        parts.append(
            f"`{how.grammar}` permits answers alone (`llama-cli --grammar-file {how.grammar}`){schema}."
        )
    return "\n\n".join(parts) or "No file passed the gate."


def _quoted(value: object) -> str:
    """Return texts, and lists of them, as JSON: Python reads them alike."""
    return json.dumps(value, ensure_ascii=False)


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
