"""What is inside a trained regressor: which parts its score needs, where they look, what they hold?

`ablations` removes every head, FFN and mixer alone, `label_attention` says where heads and mixers
look, `weight_probes` reads the function's weights off the residual stream. All on prompts that
nothing was trained, stopped or selected on, and probes are fitted on others than they are judged
on. Components are named as everywhere: L1H2, L0F, L3M.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pandas as pd
import torch

from ablate.hooked import HookedModel
from experiments.hybrids.inside.ablations import FillName, ablations
from experiments.hybrids.inside.label_attention import asking_again, prompt_attention
from experiments.hybrids.inside.weight_probes import weight_probes
from experiments.hybrids.learning.streams import held_out
from experiments.hybrids.measuring.denominators import denominator
from experiments.hybrids.regression.prompts import Prompts
from experiments.hybrids.regression.task_table import Task

PURPOSE = "inside"
"""Of the held-out prompts."""
ABLATED = 256
"""Prompts at most that components are removed on."""
LOOKED_AT = 128
"""Prompts whose patterns are read."""
FITTED = 1024
"""Prompts that probes are fitted on; judged on half as many others."""
FILLS: tuple[FillName, ...] = ("zero", "mean")


def inside(folder: Path, task: Task, seed: int, prompts: int) -> dict[str, pd.DataFrame]:
    """Frames of one model: ablations, attention, probes."""
    model = HookedModel.from_pretrained(str(folder))
    cpu = torch.device("cpu")
    asked, beside = _asked(task, min(prompts, ABLATED))
    reference = held_out(task, min(prompts, ABLATED), cpu, f"{PURPOSE} means")
    removed = [
        ablations(model, asked, fill=fill, reference=reference).frame(beside, seed=seed)
        for fill in FILLS
    ]
    generator = torch.Generator().manual_seed(seed)
    some = held_out(task, LOOKED_AT, cpu, f"{PURPOSE} attention")
    looking = [prompt_attention(model, some, generator, seed=seed).assign(prompts="as drawn")]
    if task.name != "mqar":
        again = asking_again(some, generator)
        looking.append(
            prompt_attention(model, again, generator, seed=seed, by_examples=()).assign(
                prompts="last x again"
            )
        )
    return {
        "ablations": pd.concat(removed, ignore_index=True),
        "attention": pd.concat(looking, ignore_index=True),
        "probes": _probes(model, task, seed, generator),
    }


@lru_cache(maxsize=4)
def _asked(task: Task, count: int) -> tuple[Prompts, dict[str, torch.Tensor]]:
    """The prompts that components are removed on, with the baseline's errors: the same for all
    models of a function class."""
    prompts = held_out(task, count, torch.device("cpu"), PURPOSE)
    name, errors = denominator(task.name, prompts)
    return prompts, {name: errors}


def _probes(model: HookedModel, task: Task, seed: int, generator: torch.Generator) -> pd.DataFrame:
    cpu = torch.device("cpu")
    fitted = held_out(task, FITTED, cpu, f"{PURPOSE} probes")
    if "w" not in fitted.hidden:
        return pd.DataFrame()
    judged = held_out(task, FITTED // 2, cpu, f"{PURPOSE} probes judged")
    examples = sorted({task.d // 2, task.d, task.points - 1} & set(range(task.points)))
    return weight_probes(model, fitted, judged, generator, examples=examples, seed=seed)
