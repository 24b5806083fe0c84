"""How many parameters has a model, and how wide must it be to have as many as another?

The presets differ by half in size at equal d_model: SwiGLU has three matrices where the GELU MLP
has two, a Mamba has more than either. `Sizes.matched` keeps everything but one width: d_ff, where
some block has a dense FFN, and else the expansion of the Mambas, which is a whole number and
therefore coarse (half a model between neighbours). The count is affine in either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.hybrids.architecture.grammar import Block, written

MULTIPLE = 8
"""d_ff is a multiple of this: odd widths are slow."""


@dataclass(frozen=True)
class Sizes:
    """What decides, beside the blocks, how many parameters a model has.

    Attributes:
        d_ff: 0 is 4·d_model.
        vocab_size: above 0, embeddings and head take the place of the two linear maps of
            regression.
        tied: embeddings and head are one matrix, counted once.
    """

    d_model: int
    d_ff: int = 0
    d_state: int = 16
    d_conv: int = 4
    expand: int = 4
    n_positions: int = 282
    x_dim: int = 20
    y_dim: int = 1
    vocab_size: int = 0
    tied: bool = False

    def parameters(self, blocks: Sequence[Block]) -> int:
        """How many parameters the model of these blocks has, in closed form."""
        d, ff, inner = self.d_model, self.d_ff or 4 * self.d_model, self.expand * self.d_model
        rank = math.ceil(d / 16)
        norms = {"layer": 2 * d, "rms": d}
        mamba = 2 * d * inner + inner * (self.d_conv + 1) + inner * (rank + 2 * self.d_state)
        mamba += rank * inner + inner + inner * self.d_state + inner + inner * d
        branch = {"none": 0, "mamba": mamba, "swiglu": 3 * d * ff, "gelu": 2 * d * ff + ff + d}
        total = norms[blocks[-1].norm]
        for block in blocks:
            attention = 4 * d * (d + block.bias)
            mixer = attention if block.mixer == "attention" else branch[block.mixer]
            total += mixer + branch[block.ffn]
            total += norms[block.norm] * ((block.mixer != "none") + (block.ffn != "none"))
        if any(block.position == "learned" for block in blocks):
            total += self.n_positions * d
        if self.vocab_size:
            return total + self.vocab_size * d * (1 if self.tied else 2)
        return total + (self.x_dim + 1) * d + (d + 1) * self.y_dim

    def matched(self, blocks: Sequence[Block], target: int) -> Sizes:
        """The sizes with which these blocks have as near to `target` parameters as they can.

        Raises ValueError where no width is that small, or the blocks have none to choose.
        """

        def of_d_ff(n: int) -> Sizes:
            return dataclasses.replace(self, d_ff=MULTIPLE * n)

        def of_expand(n: int) -> Sizes:
            return dataclasses.replace(self, expand=n)

        if any(block.ffn in ("gelu", "swiglu") for block in blocks):
            sized = of_d_ff
        elif any(block.has_mamba for block in blocks):
            sized = of_expand
        else:
            raise ValueError(
                f"{written(blocks)} has neither FFN nor Mamba, so nothing to match {target:,}"
                " parameters with: choose another d_model"
            )
        return sized(_nearest(lambda n: sized(n).parameters(blocks), target, blocks))


def _nearest(count: Callable[[int], int], target: int, blocks: Sequence[Block]) -> int:
    """The n ≥ 1 whose count, affine in n, is nearest to `target`."""
    least, slope = count(1), count(2) - count(1)
    if target < least - slope / 2:
        raise ValueError(
            f"{target:,} parameters asked of {written(blocks)}: it has {least:,} at its narrowest;"
            " choose a smaller d_model or fewer layers"
        )
    return max(1, round(1 + (target - least) / slope))
