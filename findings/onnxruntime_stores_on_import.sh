#!/usr/bin/env bash
# onnxruntime 1.32.0: importing it is enough to store a device id and an event to send, and nothing said later undoes it.
#
# What: `import onnxruntime` on Linux, with no model and no session, writes below the home folder
# .cache/Microsoft/DeveloperTools/.onnxruntime/deviceid and onnxruntime.db (SQLite: an event that awaits its upload), and
# `.ses` into the folder for temporary files. The event holds the path of the Python in use, the processor, the memory
# and the system. Only ORT_DISABLE_TELEMETRY set before the import prevents it. Set after the import it is too late, and so is
# onnxruntime.disable_telemetry_events(); an empty value and "0" leave it on, DO_NOT_TRACK=1 is not looked at, and
# CI=true turns it off, so that a test suite in CI never sees it.
# Fails if a version behaves differently.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'onnxruntime==1.32.0'

stored() { # VARIABLE=VALUE CODE: the files that a process leaves in a fresh home folder
  rm -rf "$work/home" && mkdir "$work/home"
  env -i PATH="$PATH" HOME="$work/home" TMPDIR="$work/home" "$1" "$work/venv/bin/python" -c "$2" >&2
  (cd "$work/home" && find . -type f -printf '%f\n' | sort | xargs)
}
expect() { # EXPECTED VARIABLE=VALUE CODE
  found=$(stored "$2" "$3")
  echo "$2 | $3 | ${found:-nothing}"
  [ "$found" = "$1" ] || { echo "expected: ${1:-nothing}" >&2; exit 1; }
}
all=".ses deviceid onnxruntime.db"
expect "$all" A=1 'import onnxruntime'
"$work/venv/bin/python" - "$work" <<'PY'
import sqlite3
import sys
from pathlib import Path

(file,) = Path(sys.argv[1], "home").rglob("onnxruntime.db")
payloads = [bytes(row[-1]) for row in sqlite3.connect(file).execute("select * from events")]
python = str(Path(sys.argv[1], "venv/bin/python")).encode()
print("an event that names", [word for word in ("ProcessInfo", "cpuModel", "totalMemoryMB") if word.encode() in payloads[0]])
assert b"ProcessInfo" in payloads[0] and b"cpuModel" in payloads[0] and python in payloads[0]
PY
expect "$all" A=1 'import onnxruntime, os; os.environ["ORT_DISABLE_TELEMETRY"] = "1"'
expect "$all" A=1 'import onnxruntime; onnxruntime.disable_telemetry_events()'
expect "$all" ORT_DISABLE_TELEMETRY= 'import onnxruntime'
expect "$all" ORT_DISABLE_TELEMETRY=0 'import onnxruntime'
expect "$all" DO_NOT_TRACK=1 'import onnxruntime'
expect "" CI=true 'import onnxruntime'
expect "" ORT_DISABLE_TELEMETRY=1 'import onnxruntime'
expect "" A=1 'import os; os.environ["ORT_DISABLE_TELEMETRY"] = "1"; import onnxruntime'
