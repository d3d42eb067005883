"""One schema for what is measured: accuracy, speed and fidelity, in ``bench.jsonl`` and ``student.json``."""
