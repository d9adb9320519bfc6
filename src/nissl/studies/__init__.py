"""One file a paper: its claim, measured. Each has ``run(quick=False, seed=0, progress=True) -> list of dict``."""
