"""Train a model so that a killed run resumes as if nothing had happened.

One checkpoint file holds everything a step depends on: trained parameters, buffers, optimiser
state, RNG states, the step, and the curve so far. It is written beside the old one and renamed,
so a `kill -9` at any instant leaves either the old state or the new one. Batches are pure
functions of the step (`batch_at(step)`), so the step is the data cursor.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

IGNORED = -100
"""The label that cross-entropy leaves out, as in torch."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, then a cosine decay to `final_share` of it at `steps`."""

    peak: float
    steps: int
    warmup: int
    final_share: float = 0.05

    def rate(self, step: int) -> float:
        """Learning rate of the update that starts at `step` (0-based)."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        floor = self.peak * self.final_share
        return floor + (self.peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class Trainer:
    """The state of one training run; `run` advances it, `save` and `resume` move it to disk.

    Attributes:
        model: called as `model(tokens, use_cache=False).logits`; parameters with
            requires_grad are trained.
        batch_at: step → tokens [batch, pos]; pure.
        schedule: learning rate by step, and the number of steps.
        checkpoint: path of the one checkpoint file (safetensors).
        identity: what the run is; a checkpoint with another identity is refused.
        autocast: dtype of matrix products, or None for the parameters' own.
        clip: largest gradient norm.
        rows: measurements so far, one dict each; kept in the checkpoint.
    """

    model: nn.Module
    batch_at: Callable[[int], Int[Tensor, "batch pos"]]
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
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # Weight decay on matrices only: gains and biases have no scale to shrink.
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    def run(self, *, save_every: float = 60.0) -> Iterator[float]:
        """Advance to the schedule's end; yields each step's loss (nats per token).

        The checkpoint is written every `save_every` seconds, and at the end.
        """
        saved = time.monotonic()
        while self.step < self.schedule.steps:
            started = time.monotonic()
            loss, count = self._update()
            self.step += 1
            self.tokens += count
            self.seconds += time.monotonic() - started
            yield loss
            if time.monotonic() - saved > save_every:
                self.save()
                saved = time.monotonic()
        self.save()

    def _update(self) -> tuple[float, int]:
        tokens = self.batch_at(self.step).to(self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        self.model.train()
        with self.precision():
            loss = next_token_loss(self.model(tokens, use_cache=False).logits, tokens)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if not torch.isfinite(norm):
            raise ValueError(
                f"the gradient is not finite at step {self.step}: give a lower --rate "
                f"than {self.schedule.peak:g}; the checkpoint before it is kept"
            )
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return float(loss.detach()), tokens.numel()

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast context of this run's forward passes."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def save(self) -> None:
        """Write the checkpoint, by rename."""
        from safetensors.torch import save_file

        tensors = {f"model/{n}": t for n, t in _own_tensors(self.model).items()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{i}/{n}": t for n, t in state.items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "identity": self.identity,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "rows": self.rows,
        }
        unfinished = self.checkpoint.with_suffix(".unfinished")
        save_file(
            {n: t.detach().contiguous() for n, t in tensors.items()},
            unfinished,
            metadata={"state": json.dumps(state)},
        )
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(self.checkpoint)

    def resume(self) -> bool:
        """Take up the checkpoint if there is one; False when there is none.

        Raises ValueError when it belongs to another run.
        """
        from safetensors import safe_open

        if not self.checkpoint.exists():
            return False
        with safe_open(self.checkpoint, framework="pt", device=str(self.device)) as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
        torch.set_rng_state(tensors["rng/cpu"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng/cuda"].cpu(), self.device)
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds, self.rows = state["seconds"], state["rows"]
        return True


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of token t+1 given tokens 0…t, in nats.

    The labels are shifted, not the logits: slicing the logits would copy them, and its backward
    fills a second [batch, pos, vocab] with zeros.
    """
    labels = torch.full_like(tokens, IGNORED)
    labels[:, :-1] = tokens[:, 1:]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED
    )


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
