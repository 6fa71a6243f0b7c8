"""Part ``captured``: forward, backward and optimizer of a step in one CUDA graph, replayed T times a round.

``scheduler.step(loss)`` is called after every replay, outside of the graph: it writes the next learning rate into the
tensor that the captured optimizer reads, and converges at the round's end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

import hdet
from hdet.bench.gpu_check.place import VOCABULARY, Place, Row, random_walks
from hdet.bench.kernels import wall
from hdet.bench.measure import OURS, alternate, repeated, spread_of
from hdet.train.config import ModelConfig
from hdet.train.models import GPT, loss_of

_BATCH, _EVERY, _ROUNDS, _WARM_UP = 8, 20, 3, 3
_LR, _STEPS = 3e-3, 10_000
_TOLERANCE = 1e-2


class Run:
    """A training run whose step can be captured: fixed memory for its inputs, learning rates in tensors.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        config: of the model.
        ours: whether hdet schedules it, or torch's OneCycleLR.
    """

    def __init__(self, device: str, config: ModelConfig, *, ours: bool) -> None:
        torch.manual_seed(0)
        self.model = GPT(config, VOCABULARY).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=torch.tensor(_LR, device=device), capturable=device == "cuda"
        )
        # A graph holds the momentum that it was captured with.
        settings: dict[str, Any] = {"max_lr": _LR, "total_steps": _STEPS, "cycle_momentum": False}
        ensemble: dict[str, Any] = {"model": self.model, "spread": 0.1, "converge_every": _EVERY, "auto_lr": True}
        self.scheduler: OneCycleLR = (
            hdet.OneCycleLR(self.optimizer, **settings, **ensemble) if ours else OneCycleLR(self.optimizer, **settings)
        )
        self.steps = 0
        self._batches = random_walks(_BATCH, config.block_size, 0)
        self._tokens = next(random_walks(_BATCH, config.block_size, 1)).to(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss: Tensor | None = None

    def capture(self) -> None:
        """Take the steps from here on by replaying a graph. At least one step must have been taken."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._compute()

    def step(self) -> None:
        """A step of training and of the scheduler."""
        self._tokens.copy_(next(self._batches))
        self.again()

    def again(self) -> None:
        """The same with the inputs that are there."""
        if self._graph is None:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._compute()
        else:
            self._graph.replay()
            assert self._loss is not None
            loss = self._loss
        if isinstance(self.scheduler, hdet.OneCycleLR):
            self.scheduler.step(loss)
        else:
            self.scheduler.step()
        self.steps += 1

    @torch.no_grad()
    def loss(self) -> float:
        """On tokens that are the same for all runs."""
        tokens = next(random_walks(_BATCH, self._tokens.shape[1] - 1, 2)).to(self._tokens.device)
        return loss_of(self.model(tokens[:, :-1]), tokens[:, 1:]).item()

    def _compute(self) -> Tensor:
        loss = loss_of(self.model(self._tokens[:, :-1]), self._tokens[:, 1:])
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def measure(place: Place) -> Iterator[Row]:
    """Without a card the same runs, without graphs.

    Raises:
        RuntimeError: if captured steps lead elsewhere than the same steps without a graph.
    """
    small = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16)
    config = small if place.is_small else ModelConfig(n_layer=8, n_head=8, n_embd=512, block_size=256)
    runs = {
        name: Run(place.device, config, ours="hdet" in name)
        for name in ("hdet_graph", "hdet_eager", "torch_graph", "torch_eager")
    }
    before = runs["hdet_eager"].loss()
    _warm_up(place.device, runs)
    for name, run in runs.items():
        if name.endswith("graph") and place.device == "cuda":
            run.capture()
    while runs["hdet_graph"].steps < _ROUNDS * _EVERY:
        for run in runs.values():
            run.step()
    yield _compared(runs["hdet_graph"], runs["hdet_eager"], before)
    yield _synchronisations(place.device, runs["hdet_graph"])

    clock = wall if place.device == "cuda" else repeated
    turns: dict[str, Callable[[], float]] = {name: clock(_round_of(run)) for name, run in runs.items()}
    samples = alternate(turns, repeat=3 if place.is_small else 25, seconds=0.1 if place.is_small else 15)
    medians = {name: spread_of(values).median / _EVERY for name, values in samples.items()}
    graph = " in a CUDA graph" if place.device == "cuda" else ", no graph: there is no card"
    said = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in medians.items())
    yield Row(f"a step, of a round of {_EVERY} with its converge{graph}", said, {"seconds": medians, "name": OURS})


def _warm_up(device: str, runs: dict[str, Run]) -> None:
    """The first steps, on a stream of their own, as a capture needs them."""
    if device == "cpu":
        for run in runs.values():
            for _ in range(_WARM_UP):
                run.step()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs.values():
            for _ in range(_WARM_UP):
                run.step()
    torch.cuda.current_stream().wait_stream(stream)


def _compared(captured: Run, eager: Run, before: float) -> Row:
    ours, theirs = ([p.detach() for p in run.model.parameters()] for run in (captured, eager))
    apart = torch.stack(torch._foreach_norm(torch._foreach_sub(ours, theirs))).norm()
    distance = (apart / torch.stack(torch._foreach_norm(theirs)).norm()).item()
    assert isinstance(captured.scheduler, hdet.OneCycleLR)
    assert isinstance(eager.scheduler, hdet.OneCycleLR)
    gains = captured.scheduler.ensemble.gains[0], eager.scheduler.ensemble.gains[0]
    rates = [float(run.optimizer.param_groups[0]["lr"]) for run in (captured, eager)]
    losses = captured.loss(), eager.loss()
    values = {"distance": distance, "gains": gains, "learning_rates": rates, "losses": losses, "loss_before": before}
    equal = all(abs(a / b - 1) < _TOLERANCE for a, b in (gains, rates, losses))
    if not (equal and losses[1] < before):
        raise RuntimeError(f"{captured.steps} captured steps lead elsewhere than the same without a graph: {values}")
    return Row(
        f"{captured.steps} steps in {_ROUNDS} rounds, captured and not",
        f"parameters differ by {distance:.1e} of their norm, gains are {gains[0]:.4f} and {gains[1]:.4f}, losses "
        f"{losses[0]:.4f} and {losses[1]:.4f} (before: {before:.4f})",
        values,
    )


def _synchronisations(device: str, run: Run) -> Row:
    """How often the host waits for the card between two converges."""
    case = f"host synchronisations in {_EVERY - 1} steps between converges"
    if device == "cpu":
        return Row(case, "needs a GPU")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(_EVERY - 1):
                run.again()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    count = sum("called a synchronizing" in str(one.message) for one in caught)
    run.again()  # the round ends here
    return Row(case, str(count), {"count": count})


def _round_of(run: Run) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(_EVERY):
            run.again()

    return steps
