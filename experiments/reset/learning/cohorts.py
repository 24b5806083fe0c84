"""How is a cohort of students trained: one AdamW, one clip, one average each?

A cohort's weights are stacks W [student, ...]. torch's own AdamW updates views W[k], one parameter
group a student with that student's rate; each student's gradient is clipped by its own norm over
all that it trains. Beside the weights runs their average,

    W̄_t = β_t W̄_{t−1} + (1 − β_t) W_t,   β_t = (1 − 1/t)^(γ+1),

a window over the last part of the way, a tenth of it wide, whatever t is (Karras et al. 2024,
"Analyzing and improving the training dynamics of diffusion models"). It shows where a falling
learning rate would end, without training another run for every t.

Weight decay is the base's, on matrices, on trained entries only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ablate.places import block_at
from ablate.reset import masks_all, weights_at
from ablate.students import Students
from experiments.reset.learning.climb import Cohort
from experiments.reset.learning.treatments import Treatment, starts
from experiments.training import is_decayed

GAMMA = 6.94
"""Of the average: its window has a standard deviation of a tenth of the way."""


@dataclass(eq=False)
class Training:
    """A cohort with what its optimiser knows; `members` says who its students are."""

    members: list[Treatment]
    cohort: Cohort
    weight_decay: float
    clip: float
    masks: dict[tuple[int, str], Bool[Tensor, "..."]] = field(default_factory=dict)
    step: int = 0
    averages: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stacks = self.cohort.parameters()
        if not self.averages:
            self.averages = [stack.detach().clone() for stack in self.stacks]
            self.first = [torch.zeros_like(stack) for stack in self.stacks]
            self.second = [torch.zeros_like(stack) for stack in self.stacks]
        self._names = names = [
            (layer, name)
            for layer, students in sorted(self.cohort.blocks.items())
            for name in students.trained()
        ]
        self._kept = {
            i: (mask, self.stacks[i].detach().clone())
            for i, name in enumerate(names)
            if (mask := self.masks.get(name)) is not None
        }
        self._tie()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        members: Sequence[Treatment],
        *,
        initial: Mapping[str, Tensor] | None = None,
        weights: Sequence[Mapping[str, Tensor]] | None = None,
        weight_decay: float = 0.1,
        clip: float = 1.0,
    ) -> Training:
        """Students of `members`, which are alike in `together`, reset as they say.

        `weights` are those to begin with instead, by name in the model, for every student.
        Raises ValueError for places the model does not have and laws that do not apply.
        """
        if weights is None:
            weights = [starts(model, member, initial) for member in members]
        one = members[0]
        trained = {name for place in one.trains for name in weights_at(model, place)}
        masks: dict[tuple[int, str], Tensor] = {}
        blocks: dict[int, Students] = {}
        for layer in one.layers:
            place = next(p for p in (*one.resets, *one.trains) if p.layer == layer)
            block = block_at(model, place)
            start = f"{block.path}."
            mine = [
                {n.removeprefix(start): t for n, t in given.items() if n.startswith(start)}
                for given in weights
            ]
            names = [n.removeprefix(start) for n in trained if n.startswith(start)]
            blocks[layer] = Students(block.module, mine, names)
            if here := [p for p in one.trains if p.layer == layer]:
                for name, mask in masks_all(model, here).items():
                    masks[layer, name.removeprefix(start)] = mask
        cohort = Cohort(blocks, one.target)
        return cls(list(members), cohort, weight_decay, clip, masks)

    def update(self, rate_share: float) -> Float[Tensor, "student"]:
        """One step of every student at `rate_share` of its rate; the norms of their gradients.

        A student whose gradient is not finite is left as it was: its norm says so.
        """
        gradients = [
            torch.zeros_like(stack) if stack.grad is None else stack.grad for stack in self.stacks
        ]
        for i, (mask, _) in self._kept.items():
            gradients[i].mul_(mask)
        norm = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        fine = norm.isfinite()
        scale = torch.where(fine, (self.clip / (norm + 1e-6)).clamp(max=1.0), 0.0)
        all_fine, unclipped = bool(fine.all()), bool((scale == 1).all())
        for gradient in gradients:
            if not all_fine:
                gradient[~fine] = 0.0
            if not unclipped:
                gradient.mul_(scale.reshape(-1, *[1] * (gradient.ndim - 1)).to(gradient))
        for i, k, view in self._views:
            view.grad = gradients[i][k]
        for group, member, ok in zip(self._groups, self._owners, fine[self._who], strict=True):
            group["lr"] = member.rate * rate_share if ok else 0.0
        self.optimiser.step()
        for stack in self.stacks:
            stack.grad = None  # the next one is taken as it comes, not added to zeros
        for _, _, view in self._views:
            view.grad = None
        for i, (mask, kept) in self._kept.items():
            self.stacks[i].data.copy_(torch.where(mask, self.stacks[i].data, kept))
        self.step += 1
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            self.averages, [s.data for s in self.stacks], window(self.step)
        )
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averages in the place of the weights, for as long as the context lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def without(self, model: nn.Module, gone: Sequence[int]) -> Training | None:
        """The same without some students; None if nobody is left."""
        stay = [k for k in range(len(self.members)) if k not in set(gone)]
        if not stay:
            return None
        made = Training.of(
            model,
            [self.members[k] for k in stay],
            weights=[self.weights(model, k) for k in stay],
            weight_decay=self.weight_decay,
            clip=self.clip,
        )
        made.load({name: tensor[stay] for name, tensor in self.state().items()}, self.step)
        return made

    def weights(self, model: nn.Module, student: int) -> dict[str, Tensor]:
        """One student's tensors by their names in the model."""
        found = {}
        for layer, students in self.cohort.blocks.items():
            one = self.members[0]
            place = next(p for p in (*one.resets, *one.trains) if p.layer == layer)
            path = block_at(model, place).path
            found |= {f"{path}.{name}": t for name, t in students.weights(student).items()}
        return found

    def state(self) -> dict[str, Tensor]:
        """Everything a later step depends on, [student, ...] each, but for frozen differences."""
        lists = {
            "weights": [stack.data for stack in self.stacks],
            "averages": self.averages,
            "first": self.first,
            "second": self.second,
        }
        return {f"{name}/{i}": t for name, ts in lists.items() for i, t in enumerate(ts)}

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Take over a state of as many students."""
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(state[name])
        self.step = step
        self._tie()

    def _swap(self) -> None:
        for i, stack in enumerate(self.stacks):
            stack.data, self.averages[i] = self.averages[i], stack.data

    def _tie(self) -> None:
        """Views of each student's tensors in groups of their own, with torch's AdamW over them."""
        groups: list[dict[str, Any]] = []
        self._owners: list[Treatment] = []
        self._who: list[int] = []
        states: list[tuple[nn.Parameter, dict[str, Tensor]]] = []
        self._views: list[tuple[int, int, nn.Parameter]] = []
        for stack in self.stacks:
            stack.grad = None
        for k, member in enumerate(self.members):
            for decayed in (True, False):
                views = []
                for i, (stack, (_, name)) in enumerate(zip(self.stacks, self._names, strict=True)):
                    if is_decayed(name, stack.ndim - 1) is not decayed:
                        continue
                    view = nn.Parameter(stack.data[k])
                    views.append(view)
                    self._views.append((i, k, view))
                    moments = {"exp_avg": self.first[i][k], "exp_avg_sq": self.second[i][k]}
                    step = torch.tensor(float(self.step), device=view.device)
                    states.append((view, {"step": step, **moments}))
                if views:
                    decay = self.weight_decay if decayed else 0.0
                    groups.append({"params": views, "weight_decay": decay})
                    self._owners.append(member)
                    self._who.append(k)
        self._groups: list[dict[str, Any]] = []
        if not groups:  # a cohort that trains nothing is evaluated once
            return
        self.optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
        for view, state in states:
            self.optimiser.state[view] = state
        self._groups = self.optimiser.param_groups


def window(step: int) -> float:
    """1 − β: the weight of the newest weights in their average after `step` ≥ 1 steps."""
    return 1 - (1 - 1 / step) ** (GAMMA + 1)
