"""What weights does a new hybrid start with?

Two laws, `HybridConfig.init`, for one module at a time as transformers asks for them, children
before parents:

    unified     one law for all: linear maps N(0, 0.02), biases 0, those that write to the stream
                (o_proj, down_proj, a Mamba's out_proj) N(0, 0.02 / √(2L)), positions N(0, 0.02),
                a Mamba's Δ, A and D by its own law
    reference   what the code of arXiv 2411.03945 leaves in each architecture, see below

A Mamba's own law: A = -(1..N), D = 1, W_Δ uniform within 1/√rank, its bias so that softplus of it
is log-uniform in [0.001, 0.1].

The reference trains Hugging Face's GPT-2, Llama and Mamba as they are: N(0, 0.02), for GPT-2 with
scaled writes, for Mamba torch's own start with the Mamba's law. Everything else it composes of bare
modules, which nobody initialises again: GPT-2's attention and MLP keep N(0, 0.02) without scaling,
attention without biases, SwiGLU and Mamba keep torch's uniform start, Δ's bias included, so that Δ
begins near 0.7, and **learned positions are N(0, 1)**. Park et al.'s hybrids start as Mamba does,
biases 0, the Mamba's writes divided by √(blocks), positions N(0, 1) too.

In both laws the maps into and out of the stream of a regressor start as torch's do, as in every
model of the reference; embeddings and head of a vocabulary are N(0, 0.02).
`position_std` sets the positions' deviation whatever the law says.

Where it misleads. `reference` is not one law: whoever compares two architectures under it compares
their initial weights too. That is what the switch is for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init

from experiments.hybrids.attention import Attention
from experiments.hybrids.blocks import GeluMLP, Positions, SwiGLU
from experiments.hybrids.grammar import lineage
from experiments.hybrids.mamba import MambaMixer

if TYPE_CHECKING:
    from experiments.hybrids.config import HybridConfig

STD = 0.02
DT_RANGE = (0.001, 0.1)


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
    *inner, write = (part for part in module.children() if isinstance(part, nn.Linear))
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
    n = mixer.A_log.shape[1]
    init.copy_(
        mixer.A_log, torch.arange(1, n + 1, device=mixer.A_log.device).log().expand_as(mixer.A_log)
    )
    init.ones_(mixer.D)
    _convolution_(mixer)
    origin = lineage(config.parsed)
    if config.init == "unified":
        for linear in (mixer.in_proj, mixer.x_proj):
            _normal_(linear, STD)
        _normal_(mixer.out_proj, STD / math.sqrt(2 * len(config.blocks)))
    elif origin == "park":
        with torch.no_grad():
            init.copy_(
                mixer.out_proj.weight, mixer.out_proj.weight / math.sqrt(2 * len(config.blocks))
            )
    if config.init == "unified" or origin in ("mamba", "park"):
        _dt_law_(mixer.dt_proj)


def _convolution_(mixer: MambaMixer) -> None:
    """As torch starts a convolution: uniform within 1/√kernel."""
    weight, bias = mixer.conv1d.weight, mixer.conv1d.bias
    bound = 1 / math.sqrt(weight.shape[-1])
    init.uniform_(weight, -bound, bound)
    init.uniform_(bias, -bound, bound)


def _dt_law_(dt_proj: nn.Linear) -> None:
    """W_Δ uniform within 1/√rank; softplus(bias) log-uniform in DT_RANGE."""
    bound = dt_proj.in_features**-0.5
    init.uniform_(dt_proj.weight, -bound, bound)
    low, high = map(math.log, DT_RANGE)
    dt = torch.empty_like(dt_proj.bias).uniform_(low, high).exp()
    init.copy_(dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))
