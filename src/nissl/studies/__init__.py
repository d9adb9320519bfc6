"""One file a paper: its claim, measured; `claims` is how they are written down. Each study has ``run(quick=False, seed=0, progress=True) -> list of dict``."""
