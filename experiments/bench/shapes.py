"""Which models does the benchmark run, and how is one of random weights made without a copy?

A name is a bundled model, a folder, a hub id, or a shape of SHAPES: OPT's architecture with random
weights, for the time a model takes does not depend on their values. Such a model is laid out
without storage, then given storage on its device in its dtype, and filled there from a seed: it
never exists twice, nor in fp32 (66 billion weights in bf16 are 123 GiB, and fit on one device).

    matrices, embeddings ~ N(0, 0.02²)        biases 0        gains of norms 1
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ablate import HookedModel

SHAPES: Mapping[str, Mapping[str, int]] = {
    "opt-256": {"layers": 12, "d_model": 256, "heads": 4, "vocab": 1024},
    "opt-768": {"layers": 12, "d_model": 768, "heads": 12},
    "opt-6.7b": {"layers": 32, "d_model": 4096, "heads": 32},
    "opt-66b": {"layers": 64, "d_model": 9216, "heads": 72},
}
"""Shapes by name (Zhang et al. 2022, "OPT", table 1; opt-256 is ours, of a small vocabulary); the
FFN is four times as wide."""
VOCAB, POSITIONS = 50272, 2048
TOKENIZER = "stdlib-opt"
"""The bundled tokenizer reads tasks for a model of random weights: its ids are below VOCAB."""


def load(name: str, dtype: str, device: str, seed: int) -> HookedModel:
    """The model called `name`, ready to be measured. ValueError says why it cannot be."""
    from ablate import HookedModel

    if name not in SHAPES:
        return HookedModel.from_pretrained(name, dtype=dtype, device_map=device)
    model = random_model(name, opt_config(**SHAPES[name]), dtype, device, seed)
    return HookedModel(model, _tokenizer())


def outline(name: str, dtype: str, seed: int) -> HookedModel:
    """The same model to plan with: a shape has no storage here, anything else is on the CPU."""
    from ablate import HookedModel

    if name not in SHAPES:
        return load(name, dtype, "cpu", seed)
    return HookedModel(_empty(name, opt_config(**SHAPES[name]), dtype), _tokenizer())


def opt_config(layers: int, d_model: int, heads: int, vocab: int = VOCAB) -> Any:
    """An OPT of this shape."""
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=vocab,
        hidden_size=d_model,
        word_embed_proj_dim=d_model,
        ffn_dim=4 * d_model,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=POSITIONS,
    )


def random_model(name: str, config: Any, dtype: str, device: str, seed: int) -> Any:
    """A model of `config` in eval mode whose weights are drawn on `device`, in `dtype`."""
    import torch

    model = _empty(name, config, dtype).to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            _fill(path, parameter, generator)
    return model.eval()


def _fill(path: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    if parameter.ndim > 1:
        parameter.normal_(std=0.02, generator=generator)
    else:
        parameter.fill_(0.0 if path.endswith("bias") else 1.0)


def _empty(name: str, config: Any, dtype: str) -> Any:
    """The model's modules without storage. ValueError if some buffer would be left unfilled."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if buffers := [path for path, _ in model.named_buffers()]:
        raise ValueError(
            f"{name} has buffers ({buffers[0]}) that are no weights: give a checkpoint"
        )
    model.config._name_or_path = name
    return model.eval()


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    from ablate.placement import ZOO

    return AutoTokenizer.from_pretrained(ZOO / TOKENIZER, local_files_only=True)
