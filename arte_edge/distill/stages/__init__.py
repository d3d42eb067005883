"""The stages of a run, one module each: check, elicit, calibrate, prefer, align, tailor, tune, evaluate."""
