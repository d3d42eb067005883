"""The training side of a run: DPO of the teacher, SFT of the student, and the checks around both.

TRL owns the loops. This room owns what goes in (token ids, order), what is watched
while they run (`collapse`), what comes out (plain checkpoints and PEFT folders that
appear whole), and that a killed training goes on to the same result (`workspace`).
"""

from __future__ import annotations

__all__: list[str] = []
