"""The training side of a run: DPO of the teacher, SFT of the student, and the checks around both.

TRL runs the loops. This package is responsible for the input (token ids, order), the checks while
they run (`collapse`), the output (plain checkpoints and PEFT folders that appear whole), and that a
killed training resumes to the same result (`checkpoints`).
"""

from __future__ import annotations
