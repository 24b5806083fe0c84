"""Which prompts does seed s read at step t, and which does nobody ever train on?

Every step's prompts are a pure function of (seed, step): their generator is seeded with a hash of
both. So a resumed run needs no cursor, seeds that run together read what each would read alone, and
all architectures of one seed read the same prompts. Held-out prompts are those of one generator a
task, the same for every model.

torch's CPU generator looks at the low 32 bits of its seed only, so the hash has 32 bits, the
highest of which says whether the prompts are held out: no training stream can draw them.

Where it misleads. Of n steps in all about n²/2³² read the prompts of another one: 6 of 200 000. On
a GPU the same generator draws other numbers: runs agree in distribution, not in prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from experiments.hybrids.regression.tasks import Prompts, Task, sample

HELD_OUT = 2**31
"""The bit that only seeds of held-out prompts have."""


def generator_at(seed: int, step: int, device: torch.device) -> torch.Generator:
    """That of the prompts that `seed` trains on at `step`."""
    hashed = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    return torch.Generator(device).manual_seed(hashed % HELD_OUT)


def held_out_generator(name: str, device: torch.device, purpose: str = "report") -> torch.Generator:
    """That of the held-out prompts of a task; those that select rates have another purpose."""
    words = [*f"{purpose} {name}".encode()]
    hashed = int(np.random.SeedSequence(words).generate_state(1)[0])
    return torch.Generator(device).manual_seed(hashed % HELD_OUT + HELD_OUT)


def held_out(task: Task, count: int, device: torch.device, purpose: str = "report") -> Prompts:
    """`count` prompts of a task at full size that no training stream draws."""
    return sample(task, count, held_out_generator(task.name, device, purpose))


def prompts_at(
    task: Task,
    seeds: Sequence[int],
    step: int,
    batch: int,
    size: tuple[int, int],
    device: torch.device,
) -> Prompts:
    """What all seeds read at a step, one seed's rows after another's; without what is hidden.

    `size` is the curriculum's dimensions and points: prompts are drawn with all points and cut, so
    that what the first points are does not depend on how many there are. Equal seeds read the same
    prompts, drawn once.
    """
    dims, points = size
    drawn = {
        seed: sample(task, batch, generator_at(seed, step, device), dims=dims)
        for seed in dict.fromkeys(seeds)
    }
    first = drawn[seeds[0]]
    xs, ys = first.xs, first.ys
    if len(seeds) > 1:
        xs = torch.cat([drawn[seed].xs for seed in seeds])
        ys = torch.cat([drawn[seed].ys for seed in seeds])
    return Prompts(xs[:, :points], ys[:, :points], first.task, {}, first.scored)
