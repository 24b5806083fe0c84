"""How wide must the FFNs be, that two architectures have as many parameters?

The presets differ by half in size at equal d_model: SwiGLU has three matrices where the GELU MLP
has two, a Mamba has more than either. `matched` keeps everything but one width: d_ff, where some
block has a dense FFN, and else the expansion of the Mambas, which is a whole number and therefore
coarse (half a model between neighbours). The count is affine in either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.hybrids.architecture.grammar import Block, parameters, written

MULTIPLE = 8
"""d_ff is a multiple of this: odd widths are slow."""


@dataclass(frozen=True)
class Widths:
    """What to give to `HybridConfig`, and how many parameters the model then has."""

    d_ff: int
    expand: int
    parameters: int


def matched(
    blocks: Sequence[Block],
    target: int,
    d_model: int,
    *,
    d_state: int = 16,
    d_conv: int = 4,
    expand: int = 4,
    n_positions: int = 282,
    x_dim: int = 20,
    y_dim: int = 1,
    vocab_size: int = 0,
    tied: bool = False,
) -> Widths:
    """The widths with which these blocks have as near to `target` parameters as they can.

    Raises ValueError where no width is that small, or the blocks have none to choose.
    """

    def count(d_ff: int, expand: int) -> int:
        return parameters(
            blocks,
            d_model,
            d_ff=d_ff,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            n_positions=n_positions,
            x_dim=x_dim,
            y_dim=y_dim,
            vocab_size=vocab_size,
            tied=tied,
        )

    if any(block.ffn in ("gelu", "swiglu") for block in blocks):
        d_ff = _nearest(lambda n: count(MULTIPLE * n, expand), target, blocks) * MULTIPLE
        return Widths(d_ff, expand, count(d_ff, expand))
    if any(block.has_mamba for block in blocks):
        expand = _nearest(lambda n: count(4 * d_model, n), target, blocks)
        return Widths(4 * d_model, expand, count(4 * d_model, expand))
    raise ValueError(
        f"{written(blocks)} has neither FFN nor Mamba, so nothing to match {target:,} parameters"
        " with: choose another d_model"
    )


def _nearest(count: Callable[[int], int], target: int, blocks: Sequence[Block]) -> int:
    """The n ≥ 1 whose count, affine in n, is nearest to `target`."""
    least, slope = count(1), count(2) - count(1)
    if target < least - slope / 2:
        raise ValueError(
            f"{target:,} parameters asked of {written(blocks)}: it has {least:,} at its narrowest;"
            " choose a smaller d_model or fewer layers"
        )
    return max(1, round(1 + (target - least) / slope))
