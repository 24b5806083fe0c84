"""How large are the prompts of a step, while a model is led from small ones to full ones?

In d dimensions with N points a prompt begins with d₀ = max(k, ⌊d/4⌋) of the coordinates (the others
are 0; the function asks for k of them, 1 as a rule) and n₀ = 1 + ⌊(N − 1)/4⌋ of the points. Every
u/(d − d₀) steps a dimension is added, and points in proportion: prompts have full size from step u
on.

    stage = ⌊step (d − d₀) / u⌋,   dims = d₀ + stage,   points = n₀ + ⌊(N − n₀) stage / (d − d₀)⌋

With d = 20 and u = 30 000 this is the paper's: dims 5, 6, … 20 every 2000 steps, points 11, 13, …
41 or 26, 31, … 101 (Garg et al. 2022, arXiv 2208.01066; Campbell et al. 2024).

Where it misleads. A task whose only loss is at the last point cannot have its points cut, and small
tasks have few stages: with 5 dimensions there are 5. With d = k there are only the points.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Curriculum:
    """Sizes of prompts by step.

    Attributes:
        dims, points: of full prompts.
        until: the step from which on they are full; 0 when they always are.
        least: coordinates that a function cannot do without.
    """

    dims: int
    points: int
    until: int
    least: int = 1

    @property
    def first(self) -> tuple[int, int]:
        """d₀ and n₀."""
        return max(self.least, self.dims // 4), 1 + (self.points - 1) // 4

    def at(self, step: int) -> tuple[int, int]:
        """Dimensions and points of the prompts that step `step` (from 0) reads."""
        if step >= self.until:
            return self.dims, self.points
        dims, points = self.first
        grown = self.dims - dims
        if not grown:
            return self.dims, points + (self.points - points) * step // self.until
        stage = step * grown // self.until
        return dims + stage, points + (self.points - points) * stage // grown
