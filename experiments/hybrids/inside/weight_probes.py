"""Can the regression weights be read off a hybrid's residual stream, and from which layer on?

Let h_L(n, i) be the stream before block L (L = number of blocks: behind the last) where x_i stands
in prompt n, which has shown i examples, and w(n) what the prompt's function is made of. A ridge
regression of w on h_L, one for every L and i, is fitted on some prompts and judged on others:

    R² = 1 − Σ_n |ŵ(n) − w(n)|² / Σ_n |w̄ − w(n)|²      w̄ the mean over the fitted prompts

    r2                 the probe; its penalty is chosen by leave-one-out among the fitted prompts
    r2_shuffled        the same with every prompt's w that of another: what fitting noise gives
    r2_least_squares   ŵ of least squares (minimum norm) on the i examples themselves: without noise
                       and with w ~ N(0, I) nobody can do better; layer `ALL`

Standard errors are over held-out prompts. Where it misleads: a probe says that w is there, not that
the model uses it. A probe finds only what is linear in the stream, so w may be known and not seen.
On sparse functions a model may know more than least squares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ablate.hooked import HookedModel
from experiments.hybrids.inside.ablations import ALL, pieces, ratio
from experiments.hybrids.regression.prompts import Prompts, interleaved

if TYPE_CHECKING:
    import pandas as pd

PENALTIES = tuple(10.0**power for power in range(-6, 5))
"""Ridge penalties tried, as shares of the mean squared singular value of the streams."""


def weight_probes(
    model: HookedModel,
    fitted: Prompts,
    held_out: Prompts,
    generator: torch.Generator,
    *,
    examples: Sequence[int] | None = None,
    hidden: str = "w",
    seed: int = 0,
) -> pd.DataFrame:
    """Tidy rows: seed, layer, examples, metric, value, stderr.

    Args:
        examples: after how many; by default the most that a prompt has.
        hidden: what is read: a tensor of the prompts' `hidden` with a row a prompt.
        generator: shuffles w for the control.

    Raises ValueError for a hidden tensor that the task lacks, for a number of examples that no
    point has, and for fewer than 3 prompts on a side.
    """
    import pandas as pd

    points = fitted.xs.shape[1]
    chosen = (points - 1,) if examples is None else tuple(examples)
    if outside := [i for i in chosen if not 0 <= i < points]:
        raise ValueError(f"probes after {outside[0]} examples: prompts have 0 to {points - 1}")
    if min(len(fitted.xs), len(held_out.xs)) < 3:
        raise ValueError(
            f"probes fitted on {len(fitted.xs)} prompts and judged on {len(held_out.xs)}: give at "
            "least 3 each"
        )
    here, there = _hidden(fitted, hidden), _hidden(held_out, hidden)
    strange = tuple(w[torch.randperm(len(w), generator=generator)] for w in (here, there))
    rows = []
    streams = zip(_streams(model, fitted, chosen), _streams(model, held_out, chosen), strict=True)
    for layer, (train, test) in enumerate(streams):
        for place, count in enumerate(chosen):
            of = train[:, place], test[:, place]
            rows.append((layer, count, "r2", *_judged(*of, here, there)))
            rows.append((layer, count, "r2_shuffled", *_judged(*of, *strange)))
    if hidden == "w":
        for count in chosen:
            found = least_squares_weights(held_out, count)
            r2 = r_squared(found, there, here.mean(0))
            rows.append((ALL, count, "r2_least_squares", *r2))
    frame = pd.DataFrame(rows, columns=pd.Index(["layer", "examples", "metric", "value", "stderr"]))
    frame.insert(0, "seed", seed)
    return frame


def ridge(
    features: Float[Tensor, "example width"], targets: Float[Tensor, "example output"]
) -> tuple[Float[Tensor, "width output"], Float[Tensor, "output"]]:
    """(weights, intercept) of the ridge regression whose penalty leaves least error one out."""
    mean, intercept = features.mean(0), targets.mean(0)
    u, s, vh = torch.linalg.svd(features - mean, full_matrices=False)
    centred = targets - intercept
    unit = s.square().mean().clamp(min=torch.finfo(s.dtype).tiny)
    best, weights = torch.inf, torch.zeros(features.shape[1], targets.shape[1], dtype=s.dtype)
    for penalty in PENALTIES:
        below = s.square() + penalty * unit
        error = float(left_out(u, s.square() / below, centred).square().sum())
        if error < best:
            best = error
            weights = vh.mT @ ((s / below)[:, None] * (u.mT @ centred))
    return weights, intercept - mean @ weights


def left_out(
    u: Float[Tensor, "example rank"],
    shrunk: Float[Tensor, "rank"],
    centred: Float[Tensor, "example output"],
) -> Float[Tensor, "example output"]:
    """The error on every example of a ridge regression that was fitted without it.

    With H = 1/N + U diag(shrunk) Uᵀ the hat matrix, it is e_n / (1 − H_nn).
    """
    errors = centred - u @ (shrunk[:, None] * (u.mT @ centred))
    leverage = (u.square() * shrunk).sum(1) + 1 / len(u)
    return errors / (1 - leverage).clamp(min=1e-6)[:, None]


def r_squared(
    found: Float[Tensor, "example output"],
    truth: Float[Tensor, "example output"],
    mean: Float[Tensor, "output"],
) -> tuple[float, float]:
    """R² over all outputs together, and its standard error over examples."""
    share, stderr = ratio((found - truth).square().sum(1), (mean - truth).square().sum(1))
    return 1 - share, stderr


def least_squares_weights(prompts: Prompts, examples: int) -> Float[Tensor, "batch width"]:
    """w of least squares on the first `examples` points, of minimum norm; flat."""
    xs, ys = prompts.xs[:, :examples].double().cpu(), prompts.ys[:, :examples].double().cpu()
    if not examples:
        return torch.zeros(len(xs), xs.shape[-1] * ys.shape[-1], dtype=torch.float64)
    return rearrange(torch.linalg.pinv(xs) @ ys, "batch x y -> batch (x y)")


def _hidden(prompts: Prompts, name: str) -> Float[Tensor, "batch width"]:
    per_prompt = [n for n, t in prompts.hidden.items() if t.ndim > 1]
    if name not in per_prompt:
        raise ValueError(
            f"probes for {name!r} of task {prompts.task} asked for: its prompts hide "
            f"{', '.join(sorted(per_prompt))}"
        )
    return prompts.hidden[name].double().cpu().flatten(1)


def _judged(
    train: Float[Tensor, "fit width"],
    test: Float[Tensor, "held width"],
    here: Float[Tensor, "fit output"],
    there: Float[Tensor, "held output"],
) -> tuple[float, float]:
    weights, intercept = ridge(train, here)
    return r_squared(test @ weights + intercept, there, here.mean(0))


def _streams(
    model: HookedModel, prompts: Prompts, examples: Sequence[int]
) -> Iterator[Float[Tensor, "batch place d_model"]]:
    """The stream at the chosen points' x's, layer by layer, in float64 on the CPU."""
    blocks = 1 + max(site.layer for site in model.sites)
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(blocks)]
    names.append(f"blocks.{blocks - 1}.hook_resid_post")
    at = 2 * torch.tensor(examples)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for some in pieces(prompts):
        with torch.no_grad(), model.capture(names) as cache:
            model.model(prompts=interleaved(some))
        for name in names:
            found[name].append(cache[name][:, at].double().cpu())
    return (torch.cat(found[name]) for name in names)
