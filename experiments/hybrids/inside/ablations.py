"""What does a hybrid regress in context without each of its heads, FFNs and mixers?

With ξ_c(n, i) the squared error on prompt n after i examples when component c is removed, ξ that of
the whole model, 0 the prediction 0 and b a baseline, on the same prompts,

    score_drop(c, b) = S(b) − S_c(b) = Σ (ξ_c − ξ) / Σ (ξ_0 − ξ_b)      sums over prompts and points
    error_increase(c, i) = mean over prompts of ξ_c(n, i) − ξ(n, i)

Every component is removed alone, all of them in one climb (`ablate.sweep`): exact, with what stands
in for its activation zero, its mean at each position over other prompts of the task, or that of
another prompt at the same position (`ablate.fills`).

Standard errors are over prompts: score_drop is a ratio of two means over the same prompts, and its
error that of the ratio (delta method). Where it misleads: what two components do for one another is
not seen; zero punishes a component for its mean, which the norms behind it expect.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ablate.components import Component
from ablate.fills import Fill, mean_fill, resample_fill
from ablate.hooked import HookedModel
from ablate.masks import Mask
from ablate.sweep import sweep_logits
from experiments.hybrids.regression.prompts import Prompts, counted, interleaved
from probes.regression import squared_error_by_examples

if TYPE_CHECKING:
    import pandas as pd

FillName = Literal["zero", "mean", "resample"]
PIECE = 256
"""Prompts in one forward; a donor of `resample` is another prompt of the same piece."""
ALL = -1
"""`examples` of a row over all scored points; `layer` of the whole model."""


@dataclass(frozen=True, eq=False)
class Ablations:
    """Squared errors of the whole model and without each component, prompt by prompt.

    Attributes:
        components: the rows of `without`.
        examples: how many examples each point has; points that count in no prompt are left out.
        zero: the error of predicting 0.
        counted: which points count; errors elsewhere are 0.
    """

    fill: FillName
    components: tuple[Component, ...]
    examples: tuple[int, ...]
    whole: Float[Tensor, "batch point"]
    without: Float[Tensor, "component batch point"]
    zero: Float[Tensor, "batch point"]
    counted: Bool[Tensor, "batch point"]

    def frame(
        self, baselines: Mapping[str, Float[Tensor, "batch point"]] | None = None, *, seed: int = 0
    ) -> pd.DataFrame:
        """Tidy rows: seed, fill, component, kind, layer, baseline, examples, metric, value, stderr.

        `baselines` are squared errors on the same prompts, of all points; each gives score_drop for
        every component, and the whole model's score (component "", layer `ALL`).
        Raises ValueError for a baseline that gains nothing over 0.
        """
        import pandas as pd

        rows = []
        rise = (self.without - self.whole).double()
        for name, errors in (baselines or {}).items():
            beside = errors[:, list(self.examples)].cpu() * self.counted
            gain = (self.zero - beside).double().sum(1)
            if not float(gain.sum()) > 0:
                raise ValueError(
                    f"the score's drop beside {name!r} asked for, which gains nothing over "
                    "predicting 0 on these prompts: name another baseline"
                )
            score = ratio((self.zero - self.whole).double().sum(1), gain)
            rows.append(("", "", ALL, name, ALL, "score", *score))
            for component, mine in zip(self.components, rise, strict=True):
                where = str(component), type(component).__name__, component.layer
                rows.append((*where, name, ALL, "score_drop", *ratio(mine.sum(1), gain)))
        counts = self.counted.double()
        for component, mine in zip(self.components, rise, strict=True):
            where = str(component), type(component).__name__, component.layer, ""
            overall = ratio(mine.sum(1), counts.sum(1))
            rows.append((*where, ALL, "error_increase", *overall))
            for examples, at, count in zip(self.examples, mine.T, counts.T, strict=True):
                rows.append((*where, examples, "error_increase", *ratio(at, count)))
        columns = ["component", "kind", "layer", "baseline", "examples", "metric"]
        frame = pd.DataFrame(rows, columns=pd.Index([*columns, "value", "stderr"]))
        frame.insert(0, "seed", seed)
        frame.insert(1, "fill", self.fill)
        return frame


def ablations(
    model: HookedModel,
    prompts: Prompts,
    *,
    fill: FillName = "zero",
    reference: Prompts | None = None,
    generator: torch.Generator | None = None,
    components: Sequence[Component] | None = None,
    memory: int | None = None,
) -> Ablations:
    """Every component (or those given) of a regressor removed alone, exactly.

    Args:
        reference: other prompts of the same length, for the fill `mean`.
        generator: chooses the donors of the fill `resample`.

    Raises what `sweep` raises, and ValueError for a fill without what it needs and for predictions
    that are not finite.
    """
    chosen = tuple(model.components if components is None else components)
    if not chosen:
        raise ValueError("ablation of no components asked for: give at least one, or None for all")
    masks = [Mask(), *(Mask([component]) for component in chosen)]
    counts = counted(prompts).cpu()
    (points,) = counts.any(0).nonzero(as_tuple=True)
    found = []
    means = _means(model, fill, reference)
    for some in pieces(prompts):
        tokens = interleaved(some)
        stands_in = _stand_in(model, tokens, fill, means, generator)
        logits = sweep_logits(
            model,
            masks,
            {"prompts": tokens},
            _positions(len(tokens), points),
            fill=stands_in,
            memory=memory,
        )
        predictions = logits.unflatten(1, (len(tokens), -1))
        ys = some.ys[:, points].float().cpu().expand_as(predictions)
        found.append(squared_error_by_examples(predictions, ys))
    errors = torch.cat(found, 1) * counts[:, points]
    if not errors.isfinite().all():
        mask = int((~errors.isfinite()).nonzero()[0, 0])
        raise ValueError(
            f"a prediction under the mask '{masks[mask]}' is not finite: check the weights"
        )
    ys = prompts.ys[:, points].float().cpu()
    counts = counts[:, points]
    zero = squared_error_by_examples(torch.zeros_like(ys), ys) * counts
    return Ablations(fill, chosen, tuple(points.tolist()), errors[0], errors[1:], zero, counts)


def pieces(prompts: Prompts, size: int = PIECE) -> Iterator[Prompts]:
    """The prompts some at a time; no piece of one prompt, where there are more."""
    count = len(prompts.xs)
    for first in range(0, count, size):
        end = min(first + size, count)
        if count - end == 1:
            end = count
        if first < count - 1 or count == 1:
            some = slice(first, end)
            hidden = {n: t[some] if t.ndim else t for n, t in prompts.hidden.items()}
            yield Prompts(prompts.xs[some], prompts.ys[some], prompts.task, hidden, prompts.scored)


def _positions(batch: int, points: Int[Tensor, "point"]) -> Int[Tensor, "entry 2"]:
    """Where the x of every point stands, prompt by prompt."""
    return torch.cartesian_prod(torch.arange(batch), 2 * points)


def _means(model: HookedModel, fill: FillName, reference: Prompts | None) -> Fill | None:
    if fill not in get_args(FillName):
        raise ValueError(f"no fill {fill!r}: use {', '.join(get_args(FillName))}")
    if fill != "mean":
        return None
    if reference is None:
        raise ValueError("mean activations asked for: give reference prompts of the same length")
    batches = [{"prompts": interleaved(some)} for some in pieces(reference)]
    return mean_fill(model, batches, per_position=True)


def _stand_in(
    model: HookedModel,
    tokens: Float[Tensor, "batch token x_dim"],
    fill: FillName,
    means: Fill | None,
    generator: torch.Generator | None,
) -> Literal["zero"] | Fill:
    if fill == "resample":
        if generator is None:
            raise ValueError("activations of other prompts asked for: give a generator")
        return resample_fill(model, {"prompts": tokens}, generator)
    return "zero" if means is None else means


def ratio(above: Float[Tensor, "batch"], below: Float[Tensor, "batch"]) -> tuple[float, float]:
    """Σ above / Σ below over the same prompts, and its standard error over prompts (delta method).

    Of one prompt that is unknown: nan. With `below` all 1 they are the mean and its error.
    """
    value = float(above.sum() / below.sum())
    if len(above) < 2:
        return value, math.nan
    residual = above - value * below
    return value, float(residual.std()) / math.sqrt(len(above)) / abs(float(below.mean()))
