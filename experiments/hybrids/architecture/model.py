"""A hybrid as a Hugging Face model: blocks of the grammar on one residual stream.

    resid_0 = read_in(prompt) or embed_tokens(tokens), + positions where a block asks for them
    resid_{i+1} = block_i(resid_i);  logits = lm_head(final_norm(resid_N))

Without a vocabulary it is the in-context regressor of Garg et al.: prompts [batch, pos, x_dim] in,
`.logits` [batch, pos, y_dim] out. With one it is a causal language model with tied embeddings. The
prediction at a position depends on it and the positions before it alone, so padding behind a row
needs no care; padding before a row is masked from attention and kept out of the Mambas' states.

Importing this module registers the model with AutoConfig, AutoModel and AutoModelForCausalLM.
There is no cache: generation runs the whole row for every token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from experiments.hybrids.architecture.attention import rope_table
from experiments.hybrids.architecture.blocks import HybridBlock, Positions, norm
from experiments.hybrids.architecture.config import MODEL_TYPE, HybridConfig
from experiments.hybrids.architecture.initial import initialise_


class HybridPreTrained(PreTrainedModel):
    """What both models share: config, initial law, what they can do."""

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: set[str] | list[str] | None = ["HybridBlock"]  # noqa: RUF012

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: of custom code transformers skips modules that hold nothing themselves, like ours."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialise_(module, self.config)


class HybridModel(HybridPreTrained):
    """Prompts or tokens to the normed residual stream behind the last block."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        blocks = config.parsed
        if config.is_regression:
            self.read_in = nn.Linear(config.x_dim, config.d_model)
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        if any(block.position == "learned" for block in blocks):
            self.positions = Positions(config.n_positions, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(HybridBlock(config, block) for block in blocks)
        self.final_norm = norm(blocks[-1].norm, config.d_model)
        self.attends = any(block.mixer == "attention" for block in blocks)
        self.turns = any(block.position == "rope" for block in blocks)
        self.scans = any(block.has_mamba for block in blocks)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.read_in if self.config.is_regression else self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self, "read_in" if self.config.is_regression else "embed_tokens", value)

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows pos"] | None = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        prompts: Float[Tensor, "batch pos x_dim"] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput:
        """The stream behind the final norm; with it, if asked for, what went into every block and
        the patterns of those that attend (eager attention), in order."""
        x = self._embedded(input_ids, inputs_embeds, prompts)
        mask, kept = self._masks(x, attention_mask)
        if hasattr(self, "positions"):
            self._check_length(x.shape[1], position_ids)
            x = self.positions(x, position_ids)
        x = self.dropout(x)
        table = None
        if self.turns:
            if position_ids is None:
                position_ids = torch.arange(x.shape[1], device=x.device)[None]
            table = rope_table(position_ids, self.config.d_model // self.config.heads, x.dtype)
        streams = []
        with _patterns(self.blocks if output_attentions else ()) as patterns:
            for block in self.blocks:
                streams.append(x)
                x = block(
                    x, position_embeddings=table, attention_mask=mask, mamba_attention_mask=kept
                )
        x = self.final_norm(x)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=(*streams, x) if output_hidden_states else None,
            attentions=tuple(patterns) if output_attentions else None,
        )

    def _embedded(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, prompts: Tensor | None
    ) -> Tensor:
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "prompts": prompts}
        names = [name for name, value in given.items() if value is not None]
        own = "prompts" if self.config.is_regression else "input_ids"
        if len(names) != 1 or names[0] not in (own, "inputs_embeds"):
            kind = "has no vocabulary" if self.config.is_regression else "reads tokens"
            raise ValueError(
                f"given {' and '.join(names) or 'no input'}, but this model {kind}: give {own}, or"
                " inputs_embeds"
            )
        if inputs_embeds is not None:
            return inputs_embeds
        if prompts is None:
            return self.embed_tokens(input_ids)
        if prompts.ndim != 3 or prompts.shape[-1] != self.config.x_dim:
            raise ValueError(
                f"prompts of shape {list(prompts.shape)}: this model reads [batch, pos,"
                f" {self.config.x_dim}]"
            )
        return self.read_in(prompts)

    def _masks(
        self, x: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(what attention may see, which tokens a Mamba takes in); None stands for all before."""
        kept = None
        if self.scans and attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError(
                    f"an attention mask of shape {list(attention_mask.shape)}: a Mamba takes in all"
                    " that stands before, give [batch, pos] with 0 at padding"
                )
            # Behind the tokens padding is harmless, and left in for the fast way.
            kept = None if bool(attention_mask[:, 0].all()) else attention_mask
        if not self.attends:
            return None, kept
        return create_causal_mask(self.config, x, attention_mask, None), kept

    def _check_length(self, length: int, position_ids: Tensor | None) -> None:
        if position_ids is None and length > self.config.n_positions:
            raise ValueError(
                f"a context of {length} positions: this model has {self.config.n_positions} learned"
                " ones; shorten it, or build the model with a larger n_positions"
            )


class Hybrid(HybridPreTrained, GenerationMixin):
    """A regressor (`prompts=`) or a language model (`input_ids=`), by its config's vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        if config.is_regression:
            self.lm_head = nn.Linear(config.d_model, config.y_dim)
        else:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows pos"] | None = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        prompts: Float[Tensor, "batch pos x_dim"] | None = None,
        labels: Int[Tensor, "batch pos"] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput:
        """`.logits` [batch, pos, y_dim or vocab]; with `labels` also the mean next-token loss.

        `use_cache` and `return_dict` are there for callers that always pass them.
        """
        answer = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            prompts=prompts,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(answer.last_hidden_state)
        loss = None
        if labels is not None:
            if self.config.is_regression:
                raise ValueError("labels given to a regressor: take the error of its .logits")
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=answer.hidden_states,
            attentions=answer.attentions,
        )


@contextmanager
def _patterns(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """The attention patterns of these blocks in the forward inside, in order."""
    found: list[Tensor] = []
    attentions = [block.get_submodule("attn") for block in blocks if hasattr(block, "attn")]
    keep = [a.register_forward_hook(lambda _, __, out: found.append(out[1])) for a in attentions]
    try:
        yield found
    finally:
        for handle in keep:
            handle.remove()


AutoConfig.register(MODEL_TYPE, HybridConfig)
AutoModel.register(HybridConfig, HybridModel)
AutoModelForCausalLM.register(HybridConfig, Hybrid)
