"""A pruning run nobody made: every number follows from a rule that a test can work out by hand.

A component's need is planted. An answer is right while the need that is left, plus the luck of its
text, of its example and of its seed, is above a bar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ablate.components import FFN, Component, Head
from ablate.importance import Importance
from experiments.prune.measured import ALONE, GRID, WHOLE, Key, Measured

FRACTIONS = (0.25, 0.5, 0.75)
KEYS = ["task", "shots", "seed"]


@dataclass(frozen=True)
class Settings:
    """What the findings read of a study."""

    model: str = "invented"
    fill: str = "zero"
    tolerance: float = 0.02
    fractions: tuple[float, ...] = (0.0, *FRACTIONS)
    convention: str = "gate"
    shots: tuple[int, ...] = (0, 5)
    seed: int = 0
    limit: int | None = 40
    rankings: tuple[str, ...] = ("importance", "random")
    quota: str = "global"
    grid: bool = False
    export: Path | None = None


def heads(layers: int = 4, of_layer: int = 4, stack: str = "") -> tuple[Component, ...]:
    return tuple(Head(l, h, stack) for l in range(layers) for h in range(of_layer))  # type: ignore[arg-type]  # noqa: E741


def ffns(layers: int = 4) -> tuple[Component, ...]:
    return tuple(FFN(layer) for layer in range(layers))


def measured(
    units: Mapping[str, Sequence[Component]],
    *,
    tasks: Sequence[str] = ("copy", "recall"),
    shots: Sequence[int] = (0, 5),
    seeds: Sequence[int] = (0, 1, 2),
    texts: int = 20,
    of_text: int = 2,
    rankings: Sequence[str] = ("importance", "random"),
    needed: Mapping[str, float] | None = None,
    alone: Sequence[str] = (),
    grid: bool = False,
    induction: bool = False,
    exact: bool = True,
    chance: Mapping[str, float] | None = None,
) -> Measured:
    """`needed`: the components that count, and how much (a third of the layers' heads, if None)."""
    generator = np.random.default_rng(7)
    every = [c for components in units.values() for c in components]
    names = [str(c) for c in every]
    need = pd.Series(0.0, index=names)
    for name, much in (needed or {names[0]: 1.0, names[-1]: 0.5}).items():
        need[name] = much
    docs = pd.DataFrame(
        [
            {"task": task, "doc_id": text * of_text + i, "group": f"text {text}"}
            for task in tasks
            for text in range(texts)
            for i in range(of_text)
        ]
    )
    docs["luck"] = generator.normal(0, 0.25, len(docs)) + np.repeat(
        generator.normal(0, 0.25, len(docs) // of_text), of_text
    )
    conditions = [Key(task, s, seed) for task in tasks for s in shots for seed in seeds]
    skill = {s: 0.75 + 0.05 * i for i, s in enumerate(shots)}
    rows, places, partners, effects = [], [], [], []
    importance, groups = {}, {}
    for key in conditions:
        own = docs.loc[docs["task"] == key.task]
        lucky = own["luck"].to_numpy() + 0.02 * (key.seed % 3)

        def answered(gone, lucky=lucky, own=own, key=key, **says) -> pd.DataFrame:
            left = skill[key.shots] - 0.4 * float(need[sorted(gone)].sum()) + lucky - 0.5
            frame = own[["task", "doc_id", "group"]].assign(
                shots=key.shots, seed=key.seed, score=(left > 0).astype(float), loss=1 - left
            )
            return frame.assign(
                **({"ranking": "", "removed": 0, "ffns": 0, "component": ""} | says)
            )

        rows.append(answered([], unit=WHOLE, ranking=WHOLE))
        rows += [answered([c], unit=ALONE, ranking=ALONE, removed=1, component=c) for c in alone]
        noise = generator.normal(0, 0.1, (len(own), len(every)))
        signed = need.to_numpy() + noise
        gate = torch.tensor(signed, dtype=torch.float32)
        importance[key] = Importance(tuple(every), gate, gate.abs() * 2)
        groups[key] = tuple(own["group"])
        if exact:
            for name in names:
                effects.append(
                    own[["task", "doc_id", "group"]].assign(
                        shots=key.shots,
                        seed=key.seed,
                        component=name,
                        loss_rise=0.4 * need[name] + generator.normal(0, 0.02, len(own)),
                        score_change=-(generator.random(len(own)) < 0.3 * need[name]).astype(float),
                    )
                )
        orders: dict[tuple[str, str], list[str]] = {}
        for unit, components in units.items():
            own_names = [str(c) for c in components]
            mean = dict(zip(names, np.abs(signed).mean(axis=0), strict=True))
            for ranking in rankings:
                if ranking == "random":
                    shuffle = np.random.default_rng(key.seed)
                    order = list(shuffle.permutation(own_names))
                elif ranking == "weights":
                    order = own_names[::-1]
                else:
                    order = sorted(own_names, key=mean.__getitem__)
                orders[unit, ranking] = order
                places += [(unit, ranking, *key, name, place) for place, name in enumerate(order)]
                for fraction in FRACTIONS:
                    count = round(fraction * len(order))
                    rows.append(answered(order[:count], unit=unit, ranking=ranking, removed=count))
            if len(tasks) > 1:
                other = tasks[(list(tasks).index(key.task) + 1) % len(tasks)]
                for which in ("highest", "lowest"):
                    partners.append((*key, unit, which, other, 0.5))
        if grid:
            one, other = (orders[unit, "importance"] for unit in ("heads", "ffns"))
            for a in FRACTIONS:
                for b in FRACTIONS:
                    h, f = round(a * len(one)), round(b * len(other))
                    rows.append(
                        answered(
                            one[:h] + other[:f], unit=GRID, ranking="importance", removed=h, ffns=f
                        )
                    )
    columns = ["unit", "ranking", *KEYS, "component", "place"]
    return Measured(
        units={unit: tuple(components) for unit, components in units.items()},
        importance=importance,
        groups=groups,
        effects=pd.concat(effects, ignore_index=True) if effects else pd.DataFrame(),
        rankings=pd.DataFrame(places, columns=pd.Index(columns)),
        partners=pd.DataFrame(
            partners, columns=pd.Index([*KEYS, "unit", "which", "partner", "value"])
        ),
        answers=pd.concat(rows, ignore_index=True),
        induction=pd.DataFrame(
            {
                "component": [str(c) for c in units["heads"]],
                "prefix_matching": need[[str(c) for c in units["heads"]]].to_numpy() * 0.8 + 0.05,
                "copying": generator.normal(0.1, 0.2, len(units["heads"])),
            }
        )
        if induction
        else None,
        chances=chance or dict.fromkeys(tasks, 0.25),
        truncated=0,
    )
