"""Does the device side run as real ARM code and answer as it answers here? Correctness only; no speed is claimed.

    apt-get install qemu-user-static debootstrap openssh-server
    python benchmarks/arm_emulation.py --root DIR --gguf student-Q8_0.gguf --onnx student-onnx-int4

Needs root for debootstrap and chroot, and an x86-64 Linux. An arm64 Debian 12 is made in DIR (kept, used
again); every process in it is ARM code under QEMU's user-mode emulation. An OpenSSH server on
loopback puts its sessions into it, and from there on it is a remote device like any other:
`arte_edge.bench.remote` looks at it, finds that it reaches no package index, fetches aarch64 wheels
(numpy, pydantic-core, onnxruntime, onnxruntime-genai, xllamacpp), installs them, copies the models,
runs ``arte-edge bench`` and brings the rows back. Then the same prompts are answered there and
here, greedily, and compared letter by letter; and a text is read token by
token on both sides, since a kernel of another processor rounds otherwise and may turn a near tie.

Writes summary.json, answers.json and rows.jsonl under benchmarks/results/arm_emulation/.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arte_edge.bench.remote import bench_remote
from arte_edge.bench.runner import Reporter, Row
from arte_edge.bench.settings import BenchSettings
from arte_edge.device.profiles import Profile, Remote
from arte_edge.device.ssh.connection import ReconnectPolicy, Ssh
from arte_edge.device.ssh.workdir import blobs_of, clean, place, send

RESULTS = Path(__file__).parent / "results" / "arm_emulation"
BINFMT = Path("/proc/sys/fs/binfmt_misc")
PACKAGES = "python3,python3-venv,ca-certificates,libgomp1,libstdc++6"
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Q: Is 7 odd or even?\nA:",
    "def add(a, b):\n    return",
)
N_NEW = 8
# Read token by token on both sides: where a text branches off after a near tie, this says how near.
READ = "The Eiffel Tower is a wrought-iron lattice tower in Paris, France. It was built in 1889 and is 330 metres tall."
WORK = "/root/.cache/arte-edge-device"
ANSWER = """
import json, sys
from pathlib import Path
from arte_edge.runtimes.loader import open_model
for path in sys.argv[3:]:
    model = open_model(Path(path), threads=int(sys.argv[2]))
    for prompt in json.loads(sys.argv[1]):
        (text,) = model.generate([prompt], {n_new})
        print(json.dumps([model.runtime, Path(path).name, prompt, text]), flush=True)
    if path.endswith(".gguf"):  # answered by xllamacpp there, which gives no logits
        model.close()
        continue
    ids = model.tokenize({text!r})
    logits = model.logits(ids).astype("float64")
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - __import__("numpy").log(__import__("numpy").exp(logits).sum(axis=1, keepdims=True))
    chosen = [float(row[token]) for row, token in zip(logprobs, ids[1:])]
    print(json.dumps([model.runtime, Path(path).name, logprobs.argmax(axis=1).tolist()[:-1], chosen]), flush=True)
    model.close()
"""


class Said(Reporter):
    """Prints progress with the time."""

    def note(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def run(*words: str | Path, **extra: Any) -> str:
    done = subprocess.run([str(word) for word in words], check=True, stdout=subprocess.PIPE, text=True, **extra)
    return done.stdout


@contextmanager
def emulation() -> Iterator[None]:
    """Have the kernel start arm64 programs through QEMU; what was registered here is taken back at the end."""
    if not (BINFMT / "status").exists():
        run("mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT)
    entry = BINFMT / "qemu-aarch64"
    made = not entry.exists()
    if made:
        shipped = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
        (BINFMT / "register").write_bytes(shipped.read_bytes().strip())
    try:
        yield
    finally:
        if made:
            entry.write_bytes(b"-1")


def make_root(root: Path) -> None:
    """Unpack and configure an arm64 Debian 12 in `root`, unless one is there."""
    if (root / "usr/bin/python3").exists() and not (root / "debootstrap").exists():
        return
    mirror = "http://deb.debian.org/debian"
    words = ["--arch=arm64", "--foreign", "--variant=minbase", f"--include={PACKAGES}", "bookworm"]
    run("debootstrap", *words, root, mirror)
    run("chroot", root, "/debootstrap/debootstrap", "--second-stage")


@contextmanager
def mounted(root: Path) -> Iterator[None]:
    """Give the root its /proc and /dev."""
    places = [name for name in ("proc", "dev") if not os.path.ismount(root / name)]
    for name in places:
        run("mount", "--bind", f"/{name}", root / name)
    try:
        yield
    finally:
        for name in reversed(places):
            subprocess.run(["umount", "-l", root / name], check=False)


@contextmanager
def server(root: Path, folder: Path, cpu: str) -> Iterator[Path]:
    """Run an OpenSSH server whose sessions are in `root`; yield the client's configuration."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("host_key", "login"):
        (folder / name).unlink(missing_ok=True)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / name)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    env = f"env -i HOME=/root PATH=/usr/bin:/bin LC_ALL=C.UTF-8 QEMU_CPU={cpu} OMP_NUM_THREADS=1"
    inside = f"{shutil.which('chroot')} {shlex.quote(str(root))} /bin/sh -c"
    session = folder / "session"
    session.write_text(f'#!/bin/sh\nexec {env} {inside} "cd; $SSH_ORIGINAL_COMMAND"\n', encoding="ascii")
    session.chmod(0o755)
    lines = [
        *(f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {folder}/host_key", "PidFile none"),
        *(f"AuthorizedKeysFile {folder}/login.pub", "StrictModes no", "UsePAM no", f"ForceCommand {session}"),
        *("PasswordAuthentication no", "PermitRootLogin yes"),
    ]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n", encoding="ascii")
    key = " ".join((folder / "host_key.pub").read_text(encoding="ascii").split()[:2])
    (folder / "known_hosts").write_text(f"arm {key}\n", encoding="ascii")
    lines = [
        *("Host arm", "HostName 127.0.0.1", f"Port {port}", "HostKeyAlias arm", f"User {getpass.getuser()}"),
        *(f"IdentityFile {folder}/login", "IdentitiesOnly yes", f"UserKnownHostsFile {folder}/known_hosts"),
    ]
    (folder / "ssh_config").write_text("\n".join(lines) + "\n", encoding="ascii")
    Path("/run/sshd").mkdir(exist_ok=True)
    binary = shutil.which("sshd", path="/usr/sbin") or "sshd"
    process = subprocess.Popen([binary, "-D", "-f", folder / "sshd_config"])
    try:
        time.sleep(1)
        yield folder / "ssh_config"
    finally:
        process.terminate()
        process.wait()


def answers(command: Sequence[str]) -> list[list[str]]:
    return [json.loads(line) for line in run(*command).splitlines() if line.startswith("[")]


def sizes(ssh: Ssh, work: str) -> dict[str, int]:
    """Return the bytes that the environment takes on the disk, whole and by package, the largest first."""
    script = 'cd "$1"/env-*/ && du -sk . && du -sk lib/python3*/site-packages/* | sort -rn | head -12'
    lines = [line.split("\t") for line in ssh.run(script, work, timeout_s=600).splitlines()]
    return {Path(name).name or "environment": int(kilobytes) * 1024 for kilobytes, name in lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, action="append", default=[])
    parser.add_argument("--onnx", type=Path, action="append", default=[])
    parser.add_argument("--task", type=Path, help="a task's folder: its accuracy too")
    parser.add_argument("--limit", type=int, default=1, help="examples of it, minutes each")
    parser.add_argument("--cpu", default="cortex-a76", help="as QEMU names it; the default is a Pi 5's")
    parser.add_argument("--keep", action="store_true", help="an environment of an earlier run; sizes are then its")
    given = parser.parse_args()
    root = given.root.absolute()
    RESULTS.mkdir(parents=True, exist_ok=True)
    with emulation():
        make_root(root)
        with mounted(root), server(root, root.with_name(root.name + ".sshd"), given.cpu) as config:
            return measure(given, str(config))


def measure(given: argparse.Namespace, config: str) -> int:
    remote = Remote(host="arm", ssh_config=config)
    profile = Profile(name="arm", title="emulated", cores=1, memory_bytes=(8 << 30,), remote=remote)
    summary: dict[str, Any] = {"cpu": given.cpu, "emulator": run("qemu-aarch64-static", "--version").split("\n")[0]}
    if not given.keep:
        clean(profile)
    # Emulated, a token takes seconds: the shortest tests that still go through prefill and decode.
    settings = BenchSettings(n_prompt=(8,), n_gen=(4,), repetitions=1, threads=(1,), warmup=False)
    rows: list[Row] = []

    def keep() -> None:
        with (RESULTS / "rows.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(row.model_dump_json() + "\n" for row in rows)
        text = json.dumps(summary, indent=1, ensure_ascii=False)
        (RESULTS / "summary.json").write_text(text + "\n", encoding="utf-8")

    for kind, models in (("gguf", given.gguf), ("gguf and onnx", given.onnx)):
        if models:
            rows += bench_remote(profile, models, settings, reporter=Said())
            with Ssh("arm", config=config) as ssh:
                summary[f"environment_bytes, {kind}"] = sizes(ssh, WORK)
            keep()
    summary |= compare(given, config)
    keep()
    if given.task is not None:
        rows += bench_remote(
            profile,
            given.gguf,
            BenchSettings(threads=(1,)),
            reporter=Said(),
            task=given.task,
            limit=given.limit,
            speed=False,
        )
        keep()
    print(json.dumps(summary, indent=1, ensure_ascii=False))
    return 0 if all(found["same_top_token"] > 0.9 for found in summary["reading"]) else 1


def compare(given: argparse.Namespace, config: str) -> dict[str, Any]:
    """Answer the prompts there and here, and say where they differ."""
    models = [*given.gguf, *given.onnx]
    code = ANSWER.format(n_new=N_NEW, text=READ)
    here = answers([sys.executable, "-c", code, json.dumps(PROMPTS), "1", *map(str, models)])
    with Ssh("arm", config=config) as ssh:
        work = WORK
        script = 'cd "$3" && exec "$1"/env-*/bin/python -c "$2" "$4" 1 $5'
        ssh.run('mkdir -p "$1/answers"', work)
        blobs = [blob for model in models for blob in blobs_of(model)]
        send(ssh, work, blobs, policy=ReconnectPolicy(print))
        place(ssh, work, f"{work}/answers", blobs)
        names = " ".join(model.name for model in models)
        out = ssh.run(script, work, code, f"{work}/answers", json.dumps(PROMPTS), names, timeout_s=1500)
        machine = ssh.run("uname -m").strip()
    there = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
    pairs, reading = [], []
    for (runtime, model, prompt, text), theirs in zip(there, here, strict=True):
        runtimes = {machine: runtime, platform.machine(): theirs[0]}
        if isinstance(text, list):
            reading.append({"model": model, "runtimes": runtimes, **distance(prompt, text, theirs[2], theirs[3])})
            continue
        texts = {machine: text, platform.machine(): theirs[3]}
        row = {"model": model, "prompt": prompt, "runtimes": runtimes, "texts": texts}
        pairs.append(row | {"same": text == theirs[3]})
    text = json.dumps(pairs, indent=1, ensure_ascii=False)
    (RESULTS / "answers.json").write_text(text + "\n", encoding="utf-8")
    same = {Path(model).name: [pair["same"] for pair in pairs if pair["model"] == Path(model).name] for model in models}
    return {
        "machine": machine,
        "same_answers": {model: f"{sum(hits)} of {len(hits)}" for model, hits in same.items()},
        "reading": reading,
    }


def distance(top: list[int], chosen: list[float], other_top: list[int], other_chosen: list[float]) -> dict[str, Any]:
    """Return how far two readings of one text are: the share of equal most likely tokens, and the text's own tokens."""
    n = len(top)
    gaps = [abs(a - b) for a, b in zip(chosen, other_chosen, strict=True)]
    return {
        "n_tokens": n,
        "same_top_token": round(sum(a == b for a, b in zip(top, other_top, strict=True)) / n, 3),
        "mean_nll": [round(-sum(values) / n, 4) for values in (chosen, other_chosen)],
        "mean_abs_logprob_difference": round(sum(gaps) / n, 5),
        "max_abs_logprob_difference": round(max(gaps), 5),
    }


if __name__ == "__main__":
    sys.exit(main())
