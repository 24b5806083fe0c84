"""What do the selection examples say of each component, by gradient and exactly?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from ablate.components import Component, Stack
from ablate.conventions import Importance, last_layers
from ablate.importance import answer_importance
from ablate.integrated import integrated_importance
from ablate.masks import Mask
from experiments.prune.grading import Graded, scored
from experiments.prune.measured import Key, Units
from experiments.prune.study import EXACT_LIMIT

if TYPE_CHECKING:
    from ablate import HookedModel
    from experiments.prune.conditions import Condition
    from experiments.prune.grading import Fills
    from experiments.prune.study import Pruning
    from experiments.run_folder import RunFolder


@dataclass(frozen=True, eq=False)
class Selection:
    """What was found on selection examples; fields as in `experiments.prune.measured.Measured`."""

    importance: Mapping[Key, Importance]
    groups: Mapping[Key, tuple[str, ...]]
    effects: pd.DataFrame


def selected(
    study: Pruning,
    folder: RunFolder,
    model: HookedModel,
    units: Units,
    conditions: Sequence[Condition],
    fills: Fills,
    bar: Any,
) -> Selection:
    """Importance and, unless there are too many, the exact effect of every component alone."""
    components = [c for of_unit in units.values() for c in of_unit]
    importance, groups, effects = {}, {}, []
    exact = removes_each(study, len(components))
    for condition in conditions:
        bar.set_postfix_str(f"{condition.name} selection", refresh=False)
        # Scoring comes first: it names the document where a loss is not finite.
        if exact:
            masks = [Mask(), *(Mask([component]) for component in components)]
            graded = scored(
                folder,
                f"{condition.name}-selection",
                model,
                condition.selection,
                masks,
                fills(condition),
                bar,
            )
            effects.append(_effects(condition.key, components, graded))
        importance[condition.key] = _importance(study, folder, model, condition, components)
        groups[condition.key] = tuple(f"{e.task} {e.group}" for e in condition.read)
        bar.update()
    return Selection(
        importance, groups, pd.concat(effects, ignore_index=True) if effects else _NO_EFFECTS
    )


def removes_each(study: Pruning, count: int) -> bool:
    """Whether every component is removed alone."""
    return study.exact == "yes" or (study.exact == "auto" and count <= EXACT_LIMIT)


_NO_EFFECTS = pd.DataFrame(
    columns=pd.Index(
        ["task", "shots", "seed", "component", "doc_id", "group", "loss_rise", "score_change"]
    )
)


def _effects(key: Key, components: Sequence[Component], graded: Graded) -> pd.DataFrame:
    """Every example without each component, against itself whole (the first mask)."""
    examples = len(graded.doc_id)
    frame = pd.DataFrame(
        {
            "component": np.repeat([str(component) for component in components], examples),
            "doc_id": np.tile(graded.doc_id, len(components)),
            "group": np.tile(graded.group, len(components)),
            "loss_rise": (graded.loss[1:] - graded.loss[0]).ravel(),
            "score_change": (graded.score[1:] - graded.score[0]).ravel(),
        }
    )
    return frame.assign(**key._asdict())


def _importance(
    study: Pruning,
    folder: RunFolder,
    model: HookedModel,
    condition: Condition,
    components: Sequence[Component],
) -> Importance:
    """First-order (or integrated) effects on the right answers, kept."""
    name = f"{condition.name}-importance"
    kept = folder.partial(name)
    if kept is None:
        readings = condition.readings(model)
        if study.integrated:
            found = integrated_importance(
                model,
                readings,
                steps=study.integrated,
                components=components,
                checkpointing=study.checkpointing,
            )
        else:
            found = answer_importance(
                model, readings, components=components, checkpointing=study.checkpointing
            )
        kept = _written(found)
        folder.keep(name, kept)
    return _read(kept, tuple(components), last_layers(model.components))


def _written(importance: Importance) -> pd.DataFrame:
    """A row an example and component."""
    examples, components = importance.gate.shape
    assert importance.tokens is not None
    assert importance.predictions is not None
    return pd.DataFrame(
        {
            "gate": importance.gate.numpy().ravel(),
            "token": importance.token.numpy().ravel(),
            "tokens": np.repeat(importance.tokens.numpy(), components),
            "predictions": np.repeat(importance.predictions.numpy(), components),
        }
    ).assign(example=np.repeat(np.arange(examples), components))


def _read(
    kept: pd.DataFrame, components: tuple[Component, ...], last: Mapping[Stack, int]
) -> Importance:
    def column(name: str) -> torch.Tensor:
        return torch.from_numpy(kept[name].to_numpy().reshape(-1, len(components)).copy())

    return Importance(
        components,
        column("gate"),
        column("token"),
        column("tokens")[:, 0],
        column("predictions")[:, 0],
        last,
    )
