"""Train a model so that a killed run resumes as if nothing had happened.

One checkpoint file holds everything a step depends on: trained parameters, buffers, optimiser
state, RNG states, the step, and the curve so far. It is written beside the old one and renamed,
so a `kill -9` at any instant leaves either the old state or the new one. Batches are pure
functions of the step (`batch_at(step)`), so the step is the data cursor.

A schedule of the kind wsd has a trunk of constant rate before its decay, so what a shorter run
would have given can be had from the longer one: `ended_at` forks the trunk and decays.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from experiments import checkpoints
from experiments.objectives import Batch, loss

DECAY_SHARE = 0.2
"""Share of the steps that a wsd schedule decays over."""


def is_decayed(name: str, axes: int) -> bool:
    """Whether a parameter has weight decay: matrices do; gains and biases have no scale to shrink,
    and the logarithms of an SSM's decay rates no origin to shrink to."""
    return axes > 1 and not name.endswith("A_log")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, then down to `final_share` of it at `steps`.

    Attributes:
        kind: cosine decays from the warm-up on; wsd (warm-up, stable, decay) linearly over the last
            DECAY_SHARE of the steps; constant never; cyclical along `cycles` cosines, each from
            the peak on (Loshchilov & Hutter 2017, "SGDR").
    """

    peak: float
    steps: int
    warmup: int
    final_share: float = 0.05
    kind: Literal["cosine", "wsd", "constant", "cyclical"] = "cosine"
    cycles: int = 1

    @property
    def stable(self) -> int:
        """The step that a wsd schedule begins to decay at."""
        return self.steps - round(DECAY_SHARE * self.steps)

    def rate(self, step: int) -> float:
        """Learning rate of the update that starts at `step` (0-based)."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "constant":
            return self.peak
        if self.kind == "wsd":
            decayed = max(0, step - self.stable) / max(1, self.steps - self.stable)
            return self.peak * (1 - (1 - self.final_share) * min(1.0, decayed))
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.kind == "cyclical":
            progress = self.cycles * progress % 1.0
        floor = self.peak * self.final_share
        return floor + (self.peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def log_spaced(steps: int, per_decade: float, first: int = 1) -> list[int]:
    """0, about `per_decade` whole steps a decade from `first` on, and `steps`: when to measure."""
    first = min(first, steps)
    count = 1 + math.ceil(per_decade * math.log10(steps / first))
    points = np.logspace(math.log10(first), math.log10(steps), count)
    return sorted({0, steps, *(round(float(p)) for p in points)})


@dataclass
class Trainer:
    """The state of one training run; `run` advances it, `save` and `resume` move it to disk.

    Attributes:
        model: called as `model(**batch.inputs).logits`; parameters with requires_grad are trained.
        batch_at: step → batch; pure.
        schedule: learning rate by step, and the number of steps.
        checkpoint: path of the one checkpoint file (safetensors).
        identity: what the run is; a checkpoint with another identity is refused.
        autocast: dtype of matrix products, or None for the parameters' own.
        clip: largest gradient norm.
        rows: measurements so far, one dict each; kept in the checkpoint.
    """

    model: nn.Module
    batch_at: Callable[[int], Batch]
    schedule: Schedule
    checkpoint: Path
    identity: dict[str, Any]
    device: torch.device
    autocast: torch.dtype | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        groups = [
            {
                "params": [p for n, p in trained.items() if is_decayed(n, p.ndim) is decayed],
                "weight_decay": self.weight_decay if decayed else 0.0,
            }
            for decayed in (True, False)
        ]
        # A cache of keys is for generation alone; encoders know no such argument.
        known = inspect.signature(self.model.forward).parameters
        self.quietly = {"use_cache": False} if "use_cache" in known else {}
        self.optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    def run(self, *, save_every: float = 60.0) -> Iterator[float]:
        """Advance to the schedule's end; yields each step's loss (nats per token).

        The checkpoint is written every `save_every` seconds, and at the end.
        """
        saved = time.monotonic()
        while self.step < self.schedule.steps:
            started = time.monotonic()
            nats, count = self._update()
            self.step += 1
            self.tokens += count
            self.seconds += time.monotonic() - started
            yield nats
            if time.monotonic() - saved > save_every:
                self.save()
                saved = time.monotonic()
        self.save()

    def _update(self) -> tuple[float, int]:
        batch = self.batch_at(self.step).to(self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        self.model.train()
        with self.precision():
            nats = loss(self.model(**batch.inputs, **self.quietly).logits, batch)
        nats.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if not torch.isfinite(norm):
            raise ValueError(
                f"the gradient is not finite at step {self.step}: give a lower --rate "
                f"than {self.schedule.peak:g}; the checkpoint before it is kept"
            )
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return float(nats.detach()), batch.tokens

    def ended_at(self, steps: int) -> nn.Module:
        """The model that a wsd run of `steps` steps ends with; this run is left as it is.

        To be called at the step where that run would begin to decay: up to there they are one.
        """
        schedule = replace(self.schedule, steps=steps)
        assert self.step == schedule.stable, f"step {self.step} is not where {steps} steps fork"
        fork = replace(self, model=copy.deepcopy(self.model), schedule=schedule, rows=[])
        fork.optimiser.load_state_dict(copy.deepcopy(self.optimiser.state_dict()))
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            while fork.step < steps:
                fork._update()
                fork.step += 1
        return fork.model

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast context of this run's forward passes."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def save(self) -> None:
        """Write the checkpoint, by rename."""
        tensors = {f"model/{n}": t for n, t in _own_tensors(self.model).items()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{i}/{n}": t for n, t in state.items()}
        state = {
            "identity": self.identity,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "rows": self.rows,
        }
        checkpoints.write(self.checkpoint, tensors, state, self.device)

    def resume(self) -> bool:
        """Take up the checkpoint if there is one; False when there is none.

        Raises ValueError when it belongs to another run.
        """
        if not self.checkpoint.exists():
            return False
        tensors, state = checkpoints.read(self.checkpoint, self.device)
        if state["identity"] != json.loads(json.dumps(self.identity)):
            raise ValueError(
                f"{self.checkpoint} belongs to another run ({state['identity']}): "
                "give another --runs folder, or remove it"
            )
        own = _own_tensors(self.model)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[f"model/{name}"])
        optimiser = self.optimiser.state_dict()
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser/"):
                _, index, key = name.split("/")
                states.setdefault(int(index), {})[key] = tensor
        optimiser["state"] = states
        self.optimiser.load_state_dict(optimiser)
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds, self.rows = state["seconds"], state["rows"]
        return True


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
