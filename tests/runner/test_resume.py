"""A run that is killed outright goes on where it was, and finishes with the same scores."""

import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np

SRC = str(Path(__file__).parents[2] / "src")

SCRIPT = textwrap.dedent(
    """
    import os, sys
    import numpy as np, torch
    from torch import nn
    torch.set_num_threads(1)
    from nissl.attribution.gradients import IntegratedGradients
    from nissl.attribution.perturbation import Occlusion
    from nissl.network import Network
    from nissl.runner import Runner

    folder, counter, out, pause = sys.argv[1:]

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x):
            import time
            time.sleep(float(pause))
            y = self.body(x)
            with open(counter, "a") as f:
                f.write(f"{len(x)}\\n")
            return y

    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    methods = {"ig": IntegratedGradients(steps=20), "occ": Occlusion()}
    runner = Runner(10, folder=folder, tune=False, progress=False)
    scores = runner.attribute(methods, Network(Slow()), x, 1, seed=3)
    np.savez(out, **{k: v.values for k, v in scores.items()})
    """
)


def arguments(folder: Path, counter: Path, out: Path, pause: float) -> list[str]:
    return [str(folder), str(counter), str(out), str(pause)]


def rows(counter: Path) -> int:
    return sum(map(int, counter.read_text().split())) if counter.exists() else 0


def test_a_killed_run_repeats_no_finished_pass(tmp_path, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)

    def finish(*where: Path) -> None:
        monkeypatch.setattr(sys, "argv", [str(script), *arguments(*where, 0)])
        runpy.run_path(str(script))

    folder, counter, out = tmp_path / "answers", tmp_path / "rows.txt", tmp_path / "out.npz"
    command = [sys.executable, str(script), *arguments(folder, counter, out, 0.1)]
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": SRC})
    finish(tmp_path / "whole", tmp_path / "whole.txt", tmp_path / "whole.npz")
    deadline = time.monotonic() + 60
    while rows(counter) < 100:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait(10) == -signal.SIGKILL
    assert not out.exists()
    before, total = rows(counter), rows(tmp_path / "whole.txt")
    assert total > before >= 100
    finish(folder, counter, out)
    # what may run twice are passes under way when it was killed: parts of them were answered, but none was finished
    assert total <= rows(counter) <= total + 20 + 10
    a, b = np.load(out), np.load(tmp_path / "whole.npz")
    for name in ("ig", "occ"):
        np.testing.assert_allclose(a[name], b[name], atol=1e-6)
    after = rows(counter)
    finish(folder, counter, out)
    assert rows(counter) == after
