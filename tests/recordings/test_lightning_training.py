"""Training: a known optimum, the same curve after a kill, two processes as one, adversaries, best epochs, bad input."""

import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.errors import InputError, NonFiniteError, RunFolderError
from nissl.recordings.training import History, Player, train
from nissl.seeds import seeded


def problem(n: int = 96) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    X = torch.randn(n, 4, generator=g)
    y = X @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]]) + 3
    with seeded(0):
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1)), (X, y)


def fit(model: nn.Module, data: tuple[Tensor, Tensor], **how: object) -> History:
    def loss(batch: tuple[Tensor, ...], g: torch.Generator) -> dict[str, Tensor]:
        x, y = batch
        return {"squares": F.mse_loss(model(x + 0.01 * torch.randn(x.shape, generator=g)), y)}

    given = {"epochs": 4, "batch_size": 32, "progress": False, "learning_rate": 1e-2} | how
    return train(model, data, loss, **given)


def test_a_linear_map_is_found_and_the_history_has_every_step():
    _, data = problem()
    line = nn.Linear(4, 1)
    before = torch.get_rng_state()
    found = fit(line, data, epochs=150, learning_rate=0.1, final_learning_rate=1e-3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.allclose(line.weight[0], torch.tensor([1.0, -2.0, 0.5, 0.0]), atol=0.02)
    assert abs(line.bias.item() - 3) < 0.02
    assert found.losses.shape == (450, 1)
    assert found.parts["squares"].shape == (150,)
    assert np.allclose(found.parts["squares"], found.losses.reshape(150, 3).mean(1), rtol=1e-5)
    assert found.validation.size == 0
    assert found.best_epoch is None
    assert not line.training


def test_one_step_is_adamw_at_the_learning_rate_of_the_warm_up():
    _, data = problem(32)
    line = nn.Linear(4, 1)
    twin = nn.Linear(4, 1)
    twin.load_state_dict(line.state_dict())

    def loss(batch: tuple[Tensor, ...], g: torch.Generator) -> dict[str, Tensor]:
        return {"squares": F.mse_loss(line(batch[0]), batch[1])}

    train(line, data, loss, epochs=3, batch_size=32, learning_rate=0.3, warm_up=3, weight_decay=0.5, progress=False)
    optimiser = torch.optim.AdamW(
        [{"params": [twin.weight], "weight_decay": 0.5}, {"params": [twin.bias], "weight_decay": 0.0}]
    )
    for rate in (0.1, 0.2, 0.3):
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        F.mse_loss(twin(data[0]), data[1]).backward()
        optimiser.step()
    assert torch.allclose(line.weight, twin.weight, atol=1e-6)
    assert torch.allclose(line.bias, twin.bias, atol=1e-6)


def test_the_same_seed_gives_the_same_curve_and_another_one_does_not():
    runs = [fit(*problem(), seed=s).losses for s in (0, 0, 1)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_a_resumed_run_has_the_curve_and_the_weights_of_an_uninterrupted_one(tmp_path):
    whole_model, data = problem()
    whole = fit(whole_model, data, epochs=6, final_learning_rate=1e-3)

    class StopError(Exception):
        pass

    model, data = problem()
    calls = []

    def broken(batch: tuple[Tensor, ...], g: torch.Generator) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == 11:  # in the middle of epoch 3
            raise StopError
        x, y = batch
        return {"squares": F.mse_loss(model(x + 0.01 * torch.randn(x.shape, generator=g)), y)}

    how = {"epochs": 6, "batch_size": 32, "learning_rate": 1e-2, "final_learning_rate": 1e-3, "progress": False}
    with pytest.raises(StopError):
        train(model, data, broken, folder=tmp_path, **how)
    assert not model.training
    again, data = problem()  # a new process would start from new weights
    resumed = fit(again, data, epochs=6, final_learning_rate=1e-3, folder=tmp_path, resume=True)
    assert np.array_equal(resumed.losses, whole.losses)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole_model.parameters(), strict=True))
    third, data = problem()  # a finished run hands over what it has
    known = fit(third, data, epochs=6, final_learning_rate=1e-3, folder=tmp_path, resume=True)
    assert np.array_equal(known.losses, whole.losses)
    assert torch.equal(third[0].weight, whole_model[0].weight)


KILLED = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from test_lightning_training import fit, problem
model, data = problem()
forward = model.forward
def slow(x):
    time.sleep(0.02)
    return forward(x)
model.forward = slow
fit(model, data, epochs=60, folder={folder!r})
"""


def test_a_killed_process_leaves_a_checkpoint_to_go_on_from(tmp_path):
    here = os.path.dirname(__file__)
    run = subprocess.Popen([sys.executable, "-c", KILLED.format(tests=here, folder=str(tmp_path))])
    end = time.monotonic() + 90
    while not (tmp_path / "last.ckpt").exists() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    assert run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait()
    model, data = problem()
    resumed = fit(model, data, epochs=60, folder=tmp_path, resume=True)
    other, data = problem()
    whole = fit(other, data, epochs=60)
    assert resumed.losses.shape == (180, 1)
    assert np.array_equal(resumed.losses, whole.losses)


def test_two_processes_give_the_gradient_of_their_batches_together():
    one, data = problem()
    two, _ = problem()
    for model in (one, two):
        model[1].p = 0.0

    def run(model: nn.Module, batch_size: int, devices: int) -> History:
        def loss(batch: tuple[Tensor, ...], g: torch.Generator) -> dict[str, Tensor]:
            return {"squares": F.mse_loss(model(batch[0]), batch[1])}

        return train(model, data, loss, epochs=2, batch_size=batch_size, devices=devices, progress=False)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        both = run(two, 48, 2)
    single = run(one, 96, 1)
    assert both.losses.shape == single.losses.shape
    assert np.allclose(both.losses, single.losses, rtol=1e-4)
    assert torch.allclose(one[0].weight, two[0].weight, atol=1e-5)


def test_adversaries_step_in_turn_and_only_their_own_parameters():
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    model["a"].weight.data.fill_(2.0)
    model["b"].weight.data.fill_(1.0)

    def product(sign: float, name: str):
        def loss(batch: tuple[Tensor, ...], g: torch.Generator) -> dict[str, Tensor]:
            return {name: sign * model["a"](batch[0]).mean() * model["b"](batch[0]).mean()}

        return loss

    players = [
        Player(product(1.0, "first"), list(model["a"].parameters()), learning_rate=0.1),
        Player(product(-1.0, "second"), list(model["b"].parameters()), learning_rate=0.1),
    ]
    found = train(model, (torch.ones(4, 1),), players=players, epochs=1, batch_size=4, progress=False)
    # Adam's first step is the learning rate: a falls to 1.9 before b rises to 1.1.
    assert np.allclose(found.losses, [[2.0, -1.9]], atol=1e-5)
    assert float(model["a"].weight.detach()) == pytest.approx(1.9, abs=1e-4)
    assert float(model["b"].weight.detach()) == pytest.approx(1.1, abs=1e-4)
    assert all(p.requires_grad for p in model.parameters())


def test_the_earliest_best_epoch_is_kept_and_patience_stops(tmp_path):
    model, data = problem()
    scores = iter([0.1, 0.5, 0.5, 0.4, 0.3, 0.2])
    seen = []

    def validate(m: nn.Module) -> float:
        assert not m.training
        assert not torch.is_grad_enabled()
        seen.append(m[0].weight.clone())
        return next(scores)

    found = fit(model, data, epochs=6, validate=validate, patience=3, folder=tmp_path)
    assert found.best_epoch == 1
    assert np.allclose(found.validation, [0.1, 0.5, 0.5, 0.4, 0.3])
    assert torch.equal(model[0].weight, seen[1])
    other, data = problem()
    again = fit(other, data, epochs=6, validate=validate, patience=3, folder=tmp_path, resume=True)
    assert again.best_epoch == 1
    assert torch.equal(other[0].weight, seen[1])


def test_clipping_bounds_the_step_of_plain_gradients():
    model, data = problem()
    found = fit(model, data, clip=1e-6, epochs=1)
    assert np.isfinite(found.losses).all()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"patience": 2}, "validate"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"final_learning_rate": -1.0}, "final_learning_rate"),
        ({"resume": True}, "folder"),
        ({"parameters": []}, "no parameters"),
        ({"parameters": [nn.Parameter(torch.ones(1))]}, "not in the model"),
    ],
)
def test_bad_input_raises_and_changes_nothing(how, says):
    model, data = problem()
    before = model[0].weight.clone()
    with pytest.raises(InputError, match=says):
        fit(model, data, **how)
    assert torch.equal(model[0].weight, before)


def test_data_of_different_lengths_and_two_kinds_of_loss_are_refused():
    model, (X, y) = problem()
    with pytest.raises(InputError, match="first axis"):
        fit(model, (X, y[:-1]))
    with pytest.raises(InputError, match="either loss or players"):
        train(model, (X, y), epochs=1)


def test_folders_are_not_overwritten_nor_taken_from_another_run(tmp_path):
    model, data = problem()
    fit(model, data, folder=tmp_path, epochs=1)
    with pytest.raises(RunFolderError, match="resume=True"):
        fit(model, data, folder=tmp_path, epochs=1)
    with pytest.raises(InputError, match="epochs=1 there, 2 here"):
        fit(model, data, folder=tmp_path, epochs=2, resume=True)
    (tmp_path / "last.ckpt").write_bytes(b"nothing of the kind")
    with pytest.raises(RunFolderError, match="cannot be read"):
        fit(model, data, folder=tmp_path, epochs=1, resume=True)


def test_a_loss_that_is_not_finite_is_said():
    model, (X, y) = problem()
    with pytest.raises(NonFiniteError, match="step 0"):
        fit(model, (X * torch.nan, y))
    assert not model.training
