"""Training of the networks of recordings through Lightning: checkpoints, resuming on the same loss curve, several devices.

Every step is seeded by the seed of the run, its number and its device. What is drawn in a step (masks, mixtures, dropout) is therefore the
same whether the run was interrupted before it or not.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from nissl.arguments import as_path, at_least, is_number
from nissl.errors import InputError, NonFiniteError, RunFolderError, said
from nissl.recordings.extras import need
from nissl.seeds import seeded

pytorch = need("lightning.pytorch", "training")

Batch = tuple[Tensor, ...]
Loss = Callable[[Batch, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Player:
    """A loss, and the optimiser of the parameters that lower it; adversaries are two.

    Attributes
    ----------
    loss : function (batch, generator) -> dict of name and Tensor
        The sum is minimised.
    parameters : sequence of Parameter
    learning_rate, weight_decay, betas, clip
        As of `train`.
    """

    loss: Loss
    parameters: Sequence[nn.Parameter]
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None


@dataclass(frozen=True, eq=False)
class History:
    """What a training run measured.

    Attributes
    ----------
    losses : array (n_steps, n_players)
        The sum of the losses of each step.
    parts : dict of name and array (n_epochs,)
        Mean of each named loss over the steps of an epoch.
    validation : array (n_epochs,)
        Empty without `validate`.
    best_epoch : int or None
        The epoch (from 0) whose weights the model has now; None: those of the last.
    """

    losses: np.ndarray
    parts: dict[str, np.ndarray]
    validation: np.ndarray
    best_epoch: int | None


def train(
    model: nn.Module, data: Sequence[Tensor], loss: Loss | None = None, *, epochs: int, batch_size: int = 32,
    learning_rate: float = 1e-3, final_learning_rate: float | None = None, warm_up: int = 0, weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999), clip: float | None = None, parameters: Sequence[nn.Parameter] | None = None,
    players: Sequence[Player] | None = None, validate: Callable[[nn.Module], float] | None = None, patience: int | None = None,
    folder: str | Path | None = None, resume: bool = False, seed: int = 0, device: str | torch.device | None = None,
    devices: int = 1, precision: Any = "32-true", progress: bool = True,
) -> History:  # fmt: skip
    """Train a model in place with AdamW, and leave it in evaluation mode.

    Parameters
    ----------
    model : Module
        Holds every parameter that is trained; saved in checkpoints. It is put in training mode once: a loss that needs a part
        of it in evaluation mode (what is frozen) puts it there.
    data : sequence of Tensor
        With one first axis: examples, in a new order in each epoch. Batches are tuples of their rows.
    loss : function (batch, generator) -> dict of name and Tensor
        The sum is minimised. Calls the model; draws random numbers from `generator` (on the CPU) or by torch's own functions.
    epochs : int
    batch_size : int, default 32
        On each device.
    learning_rate : float, default 1e-3
    final_learning_rate : float, optional
        The rate falls along a cosine to this one; constant unless given.
    warm_up : int, default 0
        Epochs over which the rate rises along a line from 0.
    weight_decay : float, default 0
        Not on parameters of one axis (biases, norms).
    betas : pair of float, default (0.9, 0.999)
    clip : float, optional
        Gradients are scaled down to this norm.
    parameters : sequence of Parameter, optional
        Those to train; all that require a gradient unless given.
    players : sequence of Player, optional
        In place of `loss`: each makes one step on each batch, in turn. Learning rates fall and rise as above, each from its own.
    validate : function (model) -> float, optional
        After each epoch, with the model in evaluation mode and without gradients; higher is better. The weights of the best epoch
        (the earliest of several) are kept.
    patience : int, optional
        Stop after this many epochs without a better one.
    folder : path, optional
        Where ``last.ckpt`` is written after each epoch.
    resume : bool, default False
        Go on from the checkpoint in `folder`, if it holds one.
    seed : int, default 0
    device : str or device, optional
        That of the model's parameters unless given.
    devices : int, default 1
        Several of one host train together, each on its share of the examples (Lightning's "ddp").
    precision : default "32-true"
        As of Lightning's Trainer: "bf16-mixed" runs autocast.
    progress : bool, default True

    Returns
    -------
    History

    Raises
    ------
    InputError
        Arguments that do not fit each other; a checkpoint of another run.
    RunFolderError
        The folder holds a checkpoint and `resume` is False; the checkpoint cannot be read.
    NonFiniteError
        A loss became NaN or infinite.
    """
    at_least("epochs", epochs, 1)
    at_least("batch_size", batch_size, 1)
    at_least("warm_up", warm_up, 0)
    at_least("devices", devices, 1)
    at_least("seed", seed, 0)
    if patience is not None:
        at_least("patience", patience, 1)
        if validate is None:
            raise InputError("patience needs validate: nothing else says whether an epoch was better")
    if (loss is None) == (players is None):
        raise InputError("give either loss or players")
    if not data or len({len(t) for t in data}) != 1 or not len(data[0]):
        raise InputError(f"data must be tensors with one first axis, got shapes {[tuple(t.shape) for t in data]}")
    if players is None:
        assert loss is not None
        chosen = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
        players = [Player(loss, chosen, learning_rate, weight_decay, betas, clip)]
    for number, player in enumerate(players):
        if not player.parameters:
            raise InputError(f"player {number} has no parameters to train")
        if not is_number(player.learning_rate) or not player.learning_rate > 0:
            raise InputError(f"learning_rate must be above 0, got {player.learning_rate!r}")
    if final_learning_rate is not None and not final_learning_rate >= 0:
        raise InputError(f"final_learning_rate must not be negative, got {final_learning_rate!r}")
    held = {id(p) for p in model.parameters()}
    if any(id(p) not in held for player in players for p in player.parameters):
        raise InputError("a parameter to train is not in the model, so no checkpoint would hold it")

    where = torch.device(device) if device is not None else next(model.parameters()).device
    run = {"epochs": epochs, "batch_size": batch_size, "examples": len(data[0]), "seed": seed, "devices": devices}
    run |= {"final_learning_rate": final_learning_rate, "warm_up": warm_up}
    for k, player in enumerate(players):
        run |= {f"{name} of player {k}": getattr(player, name) for name in ("learning_rate", "weight_decay", "clip")}
    module = _Training(model, tuple(data), list(players), run, final_learning_rate, warm_up, validate, patience)
    callbacks: list[Any] = [_Bar(epochs)] if progress else []
    checkpoint = None
    if folder is not None:
        checkpoint = as_path("folder", folder) / "last.ckpt"
        callbacks.append(
            pytorch.callbacks.ModelCheckpoint(
                checkpoint.parent, checkpoint.stem, save_on_train_epoch_end=True, enable_version_counter=False
            )
        )
    elif resume:
        raise InputError("resume=True needs the folder of the checkpoint")
    again = checkpoint is not None and checkpoint.exists()
    if checkpoint is not None and again:
        if not resume:
            raise RunFolderError(f"{checkpoint} is there already: give resume=True to go on from it, or another folder")
        saved = _read(checkpoint)
        module.compare(saved["_extra_state"]["run"], checkpoint)
        if module.ended(saved["_extra_state"]):
            module.load_state_dict(saved)
            return module.finish(where)
    cpu = where.type == "cpu"
    strategy = "ddp_fork_find_unused_parameters_true" if cpu else "ddp_find_unused_parameters_true"
    with _quiet(), seeded(seed):
        trainer = pytorch.Trainer(
            accelerator={"cuda": "gpu"}.get(where.type, where.type),
            devices=[where.index] if devices == 1 and where.index is not None and not cpu else devices,
            strategy="auto" if devices == 1 else strategy, precision=precision, max_epochs=epochs, callbacks=callbacks,
            logger=False, enable_checkpointing=folder is not None, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        model.train()
        try:
            trainer.fit(module, ckpt_path=checkpoint if again else None, weights_only=True if again else None)
        finally:
            model.to(where).eval()
    return module.finish(where)


class _Rows(Dataset[Batch]):
    """Rows of tensors, a whole batch taken at once."""

    def __init__(self, data: Batch) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitems__(self, rows: list[int]) -> Batch:
        index = torch.tensor(rows)
        return tuple(t[index.to(t.device)] for t in self.data)


class _Training(pytorch.LightningModule):
    """Players in turn on each batch; what was measured travels in the state, and so in checkpoints and between processes."""

    def __init__(
        self, model: nn.Module, data: Batch, players: list[Player], run: dict[str, Any], final: float | None,
        warm_up: int, validate: Callable[[nn.Module], float] | None, patience: int | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.data, self.players, self.run = data, players, run
        self.final, self.warm_up, self.validate, self.patience = final, warm_up, validate, patience
        self.measured: dict[str, Any] = {"losses": [], "parts": [], "validation": [], "best": None}
        self.epoch_losses: list[Tensor] = []
        self.epoch_parts: list[Tensor] = []
        self.names: list[str] = []

    def get_extra_state(self) -> dict[str, Any]:
        return {"run": self.run, "measured": self.measured}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.measured = state["measured"]

    def compare(self, run: dict[str, Any], checkpoint: Path) -> None:
        """Refuse the checkpoint of another run."""
        other = {k: v for k, v in self.run.items() if run.get(k) != v}
        if other:
            was = ", ".join(f"{k}={run.get(k)} there, {v} here" for k, v in other.items())
            raise InputError(f"{checkpoint} is of another run: {was}; give the same arguments, or another folder")

    def ended(self, state: dict[str, Any]) -> bool:
        """Whether a saved run has nothing left to do."""
        done = len(state["measured"]["parts"])
        return done >= self.run["epochs"] or self._stale(state["measured"])

    def finish(self, where: torch.device) -> History:
        """The best weights into the model, and what was measured."""
        best = self.measured["best"]
        if best is not None:
            self.model.load_state_dict(best["state"])
        self.model.to(where).eval()
        parts = self.measured["parts"]
        return History(
            np.array(self.measured["losses"]).reshape(-1, len(self.players)),
            {name: np.array([p[name] for p in parts]) for name in (parts[0] if parts else ())},
            np.array(self.measured["validation"]),
            None if best is None else best["epoch"],
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        rows = _Rows(self.data)
        sampler = DistributedSampler(rows, self.trainer.world_size, self.trainer.global_rank, seed=self.run["seed"])
        return DataLoader(rows, self.run["batch_size"], sampler=sampler, collate_fn=_as_is)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        made: list[torch.optim.Optimizer] = []
        for player in self.players:
            decayed = [p for p in player.parameters if p.ndim > 1]
            plain = [p for p in player.parameters if p.ndim <= 1]
            groups = [{"params": decayed, "weight_decay": player.weight_decay}, {"params": plain, "weight_decay": 0.0}]
            kept = [g for g in groups if g["params"]]
            made.append(torch.optim.AdamW(kept, lr=player.learning_rate, betas=player.betas))
        return made

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        steps = int(self.trainer.num_training_batches)
        step = self.current_epoch * steps + batch_idx
        seeds = np.random.SeedSequence([self.run["seed"], step, self.global_rank]).generate_state(1 + len(self.players))
        torch.manual_seed(int(seeds[0]))
        optimisers = self.optimizers()
        optimisers = optimisers if isinstance(optimisers, list) else [optimisers]
        totals: list[Tensor] = []
        named: dict[str, Tensor] = {}
        for player, optimiser, seed in zip(self.players, optimisers, seeds[1:], strict=True):
            for group in optimiser.param_groups:
                group["lr"] = self._rate(player.learning_rate, step / steps)
            with self.toggled_optimizer(optimiser):
                parts = player.loss(batch, torch.Generator().manual_seed(int(seed)))
                total = torch.stack(list(parts.values())).sum()
                if not torch.isfinite(total):
                    found = ", ".join(f"{name} {float(value.detach()):g}" for name, value in parts.items())
                    raise NonFiniteError(f"the loss of step {step} is not finite ({found}); look at the data, or lower learning_rate")  # fmt: skip
                optimiser.zero_grad()
                self.manual_backward(total)
                if player.clip is not None:
                    self.clip_gradients(optimiser, player.clip, "norm")
                optimiser.step()
            totals.append(total.detach())
            named |= {name: value.detach() for name, value in parts.items()}
        self.names = list(named)
        self.epoch_losses.append(torch.stack(totals))
        self.epoch_parts.append(torch.stack(list(named.values())))

    def on_train_epoch_end(self) -> None:
        mean = partial(self.trainer.strategy.reduce, reduce_op="mean")
        parts = mean(torch.stack(self.epoch_parts).mean(0))
        self.measured["losses"] += mean(torch.stack(self.epoch_losses)).tolist()
        self.measured["parts"].append(dict(zip(self.names, parts.tolist(), strict=True)))
        self.epoch_losses, self.epoch_parts = [], []
        if self.validate is None:
            return
        modes = {m: m.training for m in self.model.modules()}
        self.model.eval()
        with torch.no_grad():
            score = float(self.validate(self.model))
        for m, mode in modes.items():
            m.training = mode
        if score != score:
            raise NonFiniteError(f"validate gave NaN after epoch {self.current_epoch}")
        earlier = self.measured["validation"]
        if not earlier or score > max(earlier):
            state = {k: deepcopy(v.detach().cpu()) if isinstance(v, Tensor) else v for k, v in self.model.state_dict().items()}  # fmt: skip
            self.measured["best"] = {"epoch": self.current_epoch, "state": state}
        earlier.append(score)
        if self._stale(self.measured):
            self.trainer.should_stop = True

    def _stale(self, measured: dict[str, Any]) -> bool:
        """Whether the last `patience` epochs brought nothing better."""
        if self.patience is None or measured["best"] is None:
            return False
        return len(measured["validation"]) - 1 - measured["best"]["epoch"] >= self.patience

    def _rate(self, rate: float, epoch: float) -> float:
        """The learning rate at a time in epochs: up along a line, down along a cosine."""
        if epoch < self.warm_up:
            return (
                rate
                * (epoch * self.trainer.num_training_batches + 1)
                / (self.warm_up * self.trainer.num_training_batches)
            )
        if self.final is None:
            return rate
        gone = (epoch - self.warm_up) / max(self.run["epochs"] - self.warm_up, 1)
        return self.final + 0.5 * (rate - self.final) * (1 + cos(pi * gone))


class _Bar(pytorch.Callback):
    """Progress on the terminal, in epochs."""

    def __init__(self, epochs: int) -> None:
        self.bar = Progress(console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task("training", total=epochs)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.bar.start()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.bar.update(self.task, completed=trainer.current_epoch + 1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.bar.stop()


def _read(checkpoint: Path) -> dict[str, Any]:
    """The state in a checkpoint; only tensors and plain values are unpickled."""
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        state = saved["state_dict"]
        if set(state["_extra_state"]) != {"run", "measured"}:
            raise KeyError("run, measured")
    except Exception as error:  # a damaged file fails in many ways
        raise RunFolderError(f"{checkpoint} cannot be read as a checkpoint of training: {said(error)}") from error
    return state


def _as_is(batch: Any) -> Any:
    """`_Rows` hands over whole batches."""
    return batch


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notes on the machine and its advice on loaders."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            yield
    finally:
        log.setLevel(level)
