"""The method: the six steps of ARTE, a check before them and an evaluation after."""
