"""What weights does a new hybrid start with?

Two laws, `HybridConfig.init`, for one module at a time as transformers asks for them, children
before parents:

    unified     one law for all: linear maps N(0, 0.02), biases 0, those that write to the stream
                (o_proj, down_proj, a Mamba's out_proj) N(0, 0.02 / √(2L)), positions N(0, 0.02),
                a Mamba's Δ, A and D by its own law
    reference   what the code of arXiv 2411.03945 leaves in each architecture, see below

A Mamba's own law (`mamba`): A = −(1 … N), D = 1, W_Δ uniform within 1/√rank, its bias so that
softplus of it is log-uniform in [0.001, 0.1]; its convolution as torch's.

The reference trains Hugging Face's GPT-2, Llama and Mamba as they are: N(0, 0.02), for GPT-2 with
scaled writes, for Mamba torch's own start with the Mamba's law. Everything else it composes of bare
modules, which nobody initialises again: GPT-2's attention and MLP keep N(0, 0.02) without scaling,
attention without biases, SwiGLU and Mamba keep torch's uniform start, Δ's bias included, so that Δ
begins near 0.7, and **learned positions are N(0, 1)**. Park et al.'s hybrids start as torch does
with biases 0 and the Mamba's law, the Mamba's writes divided by √(their layers, two of which are
one here); their positions are N(0, 1) too.

In both laws the maps into and out of the stream of a regressor start as torch's do, as in every
model of the reference; embeddings and head of a vocabulary are N(0, 0.02).
`position_std` sets the positions' deviation whatever the law says.

Where it misleads. `reference` is not one law: whoever compares two architectures under it compares
their initial weights too. That is what the switch is for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn
from transformers import initialization as init

from experiments.hybrids.architecture.attention import Attention
from experiments.hybrids.architecture.blocks import GeluMLP, Positions, SwiGLU
from experiments.hybrids.architecture.grammar import lineage
from experiments.hybrids.architecture.mamba import MambaMixer, reset_decay_, reset_step_

if TYPE_CHECKING:
    from experiments.hybrids.architecture.config import HybridConfig

STD = 0.02


def initialise_(module: nn.Module, config: HybridConfig) -> None:
    """Draw what `module` holds, and what it overrides in its children, from torch's generator.

    Leaves a tensor alone that was loaded from a checkpoint.
    """
    if isinstance(module, nn.Linear):
        torch_start_(module)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        init.ones_(module.weight)
        if isinstance(module, nn.LayerNorm):
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=STD)
    elif isinstance(module, Positions):
        init.normal_(module.weight, std=position_std(config))
    elif isinstance(module, Attention | GeluMLP | SwiGLU):
        _branch_(module, config)
    elif isinstance(module, MambaMixer):
        _mamba_(module, config)


def position_std(config: HybridConfig) -> float:
    """The deviation of learned positions: the config's own, or the law's."""
    if config.position_std is not None:
        return config.position_std
    bare = config.init == "reference" and lineage(config.parsed) in ("composed", "park")
    return 1.0 if bare else STD


def torch_start_(linear: nn.Linear) -> None:
    """nn.Linear's own start: weight and bias uniform within 1/√inputs."""
    init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    if linear.bias is not None:
        bound = 1 / math.sqrt(linear.in_features)
        init.uniform_(linear.bias, -bound, bound)


def _normal_(linear: nn.Linear, std: float) -> None:
    init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        init.zeros_(linear.bias)


def _branch_(module: Attention | GeluMLP | SwiGLU, config: HybridConfig) -> None:
    """Attention and dense FFNs: the last map is the one that writes to the stream."""
    linears = [part for part in module.children() if isinstance(part, nn.Linear)]
    if not linears:  # all heads removed for good
        return
    *inner, write = linears
    origin = "unified" if config.init == "unified" else lineage(config.parsed)
    if origin == "park":
        for linear in (*inner, write):
            if linear.bias is not None:
                init.zeros_(linear.bias)
        return
    # Composed of bare modules: GPT-2's (those with biases) draw themselves, the others torch draws.
    if origin == "composed" and write.bias is None:
        return
    scaled = origin in ("unified", "gpt2")
    for linear in inner:
        _normal_(linear, STD)
    _normal_(write, STD / math.sqrt(2 * len(config.blocks)) if scaled else STD)


def _mamba_(mixer: MambaMixer, config: HybridConfig) -> None:
    """The mixer's own law for A and D always, for Δ where the code keeps it."""
    origin = "unified" if config.init == "unified" else lineage(config.parsed)
    writes = math.sqrt(2 * len(config.blocks))
    reset_decay_(mixer)
    _convolution_(mixer)
    if origin == "unified":
        _normal_(mixer.in_proj, STD)
        _normal_(mixer.x_proj, STD)
        _normal_(mixer.out_proj, STD / writes)
    elif origin == "park":
        # Their layers are ours by halves, but for the first block, of which n_layer knows nothing.
        layers = 2 * sum(block.mixer == "attention" for block in config.parsed)
        bound = 1 / math.sqrt(mixer.out_proj.in_features * layers)
        init.uniform_(mixer.out_proj.weight, -bound, bound)
    if origin != "composed":
        reset_step_(mixer)


def _convolution_(mixer: MambaMixer) -> None:
    """As torch starts a convolution: uniform within 1/√kernel."""
    bound = 1 / math.sqrt(mixer.conv1d.weight.shape[-1])
    for parameter in mixer.conv1d.parameters():
        init.uniform_(parameter, -bound, bound)
