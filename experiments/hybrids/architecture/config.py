"""What is written in the config.json of a hybrid?

`HybridConfig` holds the blocks as text and the sizes: everything that a model is built from. Parts
that are left out are filled in at once, so that a saved config says what was built.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from experiments.hybrids.architecture.grammar import Block, lineage, mixed, parse
from experiments.hybrids.architecture.sizes import Sizes

MODEL_TYPE = "ablate_hybrid"


@strict
class HybridConfig(PreTrainedConfig):
    """Blocks and sizes of a hybrid; with a vocabulary a language model, without one a regressor.

    `blocks` is the grammar, or a list of one text a block. d_ff 0 is 4·d_model. `init` names a law
    of `initial`; position_std (None: as the law says) and double_residual (None: where the
    reference has it, under its law) go their own ways.
    """

    model_type = MODEL_TYPE
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "heads",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "d_ff",
        "state_size": "d_state",
    }

    blocks: list[str] | str = "learned-attention-gelu-layer*2"
    d_model: int = 128
    heads: int = 8
    d_ff: int = 0
    d_state: int = 16
    d_conv: int = 4
    expand: int = 4
    n_positions: int = 282
    vocab_size: int = 0
    x_dim: int = 20
    y_dim: int = 1
    dropout: float = 0.0
    init: Literal["unified", "reference"] = "unified"
    double_residual: bool | None = None
    position_std: float | None = None
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        written = self.blocks if isinstance(self.blocks, str) else ",".join(self.blocks)
        blocks = parse(written)
        self.blocks = list(map(str, blocks))
        self.d_ff = self.d_ff or 4 * self.d_model
        if self.double_residual is None:
            doubled = self.init == "reference" and lineage(blocks) == "composed"
            self.double_residual = doubled and mixed(blocks)
        self.tie_word_embeddings = self.tie_word_embeddings and self.vocab_size > 0
        self._check(blocks)
        super().__post_init__(**kwargs)

    @property
    def parsed(self) -> tuple[Block, ...]:
        """The blocks as values."""
        return parse(",".join(self.blocks))

    @property
    def num_hidden_layers(self) -> int:
        """How many blocks there are, under the name that other code looks for."""
        return len(self.blocks)

    @property
    def sizes(self) -> Sizes:
        """What decides, beside the blocks, how many parameters the model has."""
        names = (field.name for field in dataclasses.fields(Sizes) if field.name != "tied")
        own = {name: getattr(self, name) for name in names}
        return Sizes(**own, tied=self.tie_word_embeddings)

    @property
    def is_regression(self) -> bool:
        """Whether the model reads vectors and predicts vectors, and has no vocabulary."""
        return self.vocab_size == 0

    def _check(self, blocks: tuple[Block, ...]) -> None:
        attends = any(block.mixer == "attention" for block in blocks)
        if attends and self.d_model % self.heads:
            raise ValueError(
                f"{self.heads} heads in a stream of {self.d_model}: heads must divide d_model"
            )
        if any(b.position == "rope" for b in blocks) and self.d_model // self.heads % 2:
            raise ValueError(
                f"rope turns pairs, but a head is {self.d_model // self.heads} wide: give"
                " d_model / heads an even width"
            )
        if self.is_regression and self.y_dim > self.x_dim:
            raise ValueError(
                f"y of {self.y_dim} and x of {self.x_dim} dimensions: x and y are read through one"
                " map, so y must not be wider than x"
            )
        sizes = ("d_model", "heads", "d_state", "d_conv", "expand", "n_positions", "x_dim", "y_dim")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} of a hybrid: give at least 1")
