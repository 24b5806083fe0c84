"""Tiny random regressors for tests, with weights large enough that every part matters."""

from __future__ import annotations

import torch

from ablate import HookedModel
from experiments.hybrids.architecture.model import Hybrid, HybridConfig
from experiments.hybrids.learning.streams import generator_at
from experiments.hybrids.regression.prompts import Prompts
from experiments.hybrids.regression.task_table import small
from experiments.hybrids.regression.tasks import sample

CPU = torch.device("cpu")


def regressor(blocks: str, task: str = "linear", seed: int = 0, scale: float = 0.3) -> HookedModel:
    """A random regressor for the small size of a task."""
    shape = small(task)
    torch.manual_seed(seed)
    config = HybridConfig(
        blocks=blocks,
        d_model=16,
        heads=2,
        d_state=4,
        expand=2,
        n_positions=2 * shape.points,
        x_dim=shape.d,
        y_dim=shape.y_dim,
    )
    model = Hybrid(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith(("A_log", "conv1d.weight")):
                parameter.normal_(std=scale)
    return HookedModel(model)


def drawn(task: str = "linear", count: int = 6, seed: int = 1) -> Prompts:
    """Prompts of the small size of a task."""
    return sample(small(task), count, generator_at(seed, 0, CPU))


def recall_by_hand() -> HookedModel:
    """Two attention blocks that solve the small MQAR task, each head with one known thing to do.

    L0H0 attends from every token to the one before it and copies that one's content; so a value
    knows its key. L1H0 attends from a key to what has copied the same key, and writes its content,
    the value, where the read-out reads it.
    """
    shape = small("mqar")
    d, tokens, width = shape.d, 2 * shape.points, 64
    content, copied = slice(0, d), slice(d, 2 * d)
    position, answer = slice(2 * d, 2 * d + tokens), slice(width - d, width)
    config = HybridConfig(
        blocks="learned-attention-rms*2",
        d_model=width,
        heads=1,
        n_positions=tokens,
        x_dim=d,
        y_dim=d,
    )
    model = Hybrid(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 or parameter.shape[0] != width:
                parameter.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        model.model.read_in.weight[content] = torch.eye(d)
        model.model.positions.weight[:, position] = 4 * torch.eye(tokens)
        first, second = (block.attn for block in model.model.blocks)
        before = torch.diag(torch.ones(tokens - 1), 1)  # row t − 1, column t
        first.q_proj.weight[:tokens, position] = 20 * before
        first.k_proj.weight[:tokens, position] = torch.eye(tokens)
        first.v_proj.weight[:d, content] = torch.eye(d)
        first.o_proj.weight[copied, :d] = torch.eye(d)
        second.q_proj.weight[:d, content] = 200 * torch.eye(d)
        second.k_proj.weight[:d, copied] = torch.eye(d)
        second.v_proj.weight[:d, content] = torch.eye(d)
        second.o_proj.weight[answer, :d] = torch.eye(d)
        # The norms divide by lengths that all tokens share; the read-out puts the last two back.
        tokens_only = (width / (d + 16)) ** 0.5
        with_copy = (width / (d + d * tokens_only**2 + 16)) ** 0.5
        with_answer = (width / (d + d * tokens_only**2 + 16 + d * with_copy**2)) ** 0.5
        model.lm_head.weight[:, answer] = torch.eye(d) / (with_copy * with_answer)
    return HookedModel(model)
