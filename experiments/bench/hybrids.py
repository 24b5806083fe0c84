"""Hybrids in the benchmark: the selective scan, and a training step of a small model.

    hybrid-scan-T   the scan of T tokens, forward and backward                    hf-mamba
    hybrid-step     a training step of a small in-context regressor (d 5, 12      lean-gpt2,
                    points): prompts drawn, forward, backward, Adam               hf-mamba

    ours            `selective_scan`; `training.advance`, as `ablate hybrid` trains
    hf-mamba        the scan of transformers on its torch path; the same model with every mixer
                    replaced by transformers' of the same weights, in a plain training loop
    hf-mamba-kept   the same in a process whose malloc keeps what is freed, as ours does
                    (`experiments.memory`): transformers' path asks for much more memory a step
    lean-gpt2       GPT-2 of the same width and depth in plain PyTorch: one product for q, k and v,
                    fused attention, fused Adam, the same prompts

Values of a scan are y and its gradients, each over its own largest entry; of a step its loss, where
both sides are the same function (a lean GPT-2 has the weights of our `gpt2`).

Operations. A scan does 22 for each token, channel and state: 7 forwards, 15 backwards, on both
sides, so its bound is 1 and all that differs is how often memory is read. A step does 6 for each
weight and token, and its scans'.

Where it misleads. Steps with a Mamba are one a run, others ten: a run of transformers' mixers takes
minutes. A lean GPT-2 beside a Mamba preset is another model, with other weights and arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from experiments.memory import keep_freed

if TYPE_CHECKING:
    from experiments.bench.workers import Setting
    from experiments.bench.works import Work
    from experiments.hybrids.architecture.model import Hybrid, HybridConfig
    from experiments.hybrids.learning.runs import Run as Training

Run = Callable[[], Float[np.ndarray, "..."]]
POINTS, D_X, D_STATE, EXPAND, HEADS = 12, 5, 16, 4, 4
RATE = 5e-4
PER_SCAN = 22
STEPS, STEPS_WITH_MAMBA = 10, 1
KEPT = "hf-mamba-kept"
THEIRS = ("hf-mamba", KEPT)
"""Peers that scan by transformers' path."""
ENTRIES = 4096
"""Of each tensor that a scan returns."""


def prepared(contender: str, setting: Setting, work: Work) -> Run:
    """The contender, ready to run."""
    if contender in ("ours", KEPT):
        keep_freed()  # as `training.train` does
    if work.name == "hybrid-scan":
        return _scan(_scan_of(contender), setting, work)
    return STEPPERS[contender](setting, work)


def config_of(preset: str, sizes: tuple[int, ...]) -> HybridConfig:
    """The small model: `sizes` are its width and its layers."""
    from experiments.hybrids.architecture.grammar import blocks_of
    from experiments.hybrids.architecture.model import HybridConfig

    width, layers = sizes
    return HybridConfig(
        blocks=[str(block) for block in blocks_of(preset, layers)],
        d_model=width,
        heads=HEADS,
        d_state=D_STATE,
        expand=EXPAND,
        n_positions=2 * POINTS,
        x_dim=D_X,
        y_dim=1,
    )


def has_mamba(preset: str, sizes: tuple[int, ...]) -> bool:
    """Whether a scan is in it."""
    return any(block.has_mamba for block in config_of(preset, sizes).parsed)


def operations(model: str, work: Work) -> dict[str, int]:
    """Contender -> operations of a run."""
    cells = work.rows.size * EXPAND * work.sizes[0] * D_STATE
    if work.name == "hybrid-scan":
        return dict.fromkeys(("ours", *THEIRS), PER_SCAN * cells)
    from experiments.hybrids.architecture.model import Hybrid

    config = config_of(model, work.sizes)
    scans = sum(block.has_mamba for block in config.parsed)
    weights = sum(p.numel() for p in Hybrid(config).parameters())
    lean = sum(p.numel() for p in LeanGPT2(*work.sizes).parameters())
    steps = steps_of(model, work)
    own = steps * (6 * weights * work.rows.size + scans * PER_SCAN * cells)
    theirs = dict.fromkeys(("ours", *THEIRS), own)
    return theirs | {"lean-gpt2": steps * 6 * lean * work.rows.size}


def steps_of(model: str, work: Work) -> int:
    """Training steps of one run."""
    return STEPS_WITH_MAMBA if has_mamba(model, work.sizes) else STEPS


def _scan_of(contender: str) -> Callable[..., Tensor]:
    if contender == "ours":
        from experiments.hybrids.architecture.scan import selective_scan

        return selective_scan
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    from experiments.hybrids.architecture.scan import by_kernel

    return lambda *given: by_kernel(mamba_selective_scan, *given)


def _scan(scan: Callable[..., Tensor], setting: Setting, work: Work) -> Run:
    (batch, pos), channels = work.rows.shape, EXPAND * work.sizes[0]
    generator = torch.Generator().manual_seed(setting.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A = -torch.arange(1.0, D_STATE + 1).repeat(channels, 1)
    delta = 0.1 * torch.rand(batch, pos, channels, generator=generator)
    u, B, C = normal(batch, pos, channels), *normal(2, batch, pos, D_STATE)
    given = [
        t.to(setting.device).contiguous().requires_grad_()
        for t in (u, delta, A, B, C, normal(channels))
    ]
    dy = normal(batch, pos, channels).to(setting.device)

    def run() -> Float[np.ndarray, "entry"]:
        y = scan(*given)
        found = (y.detach(), *torch.autograd.grad(y, given, dy))
        return torch.cat([_entries(t) for t in found]).cpu().numpy()

    return run


def _entries(tensor: Tensor) -> Float[Tensor, "entry"]:
    flat = tensor.flatten()
    return flat[:: max(1, len(flat) // ENTRIES)] / flat.abs().max()


def _ours(setting: Setting, work: Work) -> Run:
    from experiments.hybrids.learning.running import begun
    from experiments.hybrids.learning.training import advance

    training = _training(setting, work)
    running = begun(training)

    def run() -> Float[np.ndarray, "step"]:
        losses = []
        for _ in range(steps_of(setting.model, work)):
            before = running.losses.clone()
            advance(training, running)
            losses.append(running.losses - before)
        return torch.cat(losses).cpu().numpy()

    return run


def _hf_mamba(setting: Setting, work: Work) -> Run:
    training = _training(setting, work)
    model: Any = _initial(training)
    model.to(training.device)
    for block in model.model.blocks:
        if block.block.has_mamba:
            block.mixer = transformers_mixer(block.mixer)
    return _plain(training, model, lambda prompts: model(prompts=prompts).logits, setting, work)


def transformers_mixer(mixer: Any) -> nn.Module:
    """transformers' mixer with the weights of ours."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(
        vocab_size=1,
        hidden_size=mixer.hidden_size,
        state_size=mixer.ssm_state_size,
        conv_kernel=mixer.conv_kernel_size,
        expand=mixer.intermediate_size // mixer.hidden_size,
        time_step_rank=mixer.time_step_rank,
        num_hidden_layers=1,
    )
    made = MambaMixer(config, 0)
    weights = mixer.state_dict().items()
    made.load_state_dict({name.removeprefix("scan."): tensor for name, tensor in weights})
    return made.to(mixer.A_log.device)


def _lean(setting: Setting, work: Work) -> Run:
    training = _training(setting, work)
    lean = LeanGPT2(*work.sizes)
    if setting.model == "gpt2":
        lean.take(_initial(training))
    lean.to(training.device)
    run = _plain(training, lean, lean, setting, work)
    if setting.model == "gpt2":
        return run
    return lambda: np.full_like(run(), np.nan)  # another function: nothing to compare


STEPPERS: dict[str, Callable[[Setting, Work], Run]] = {
    "ours": _ours,
    **dict.fromkeys(THEIRS, _hf_mamba),
    "lean-gpt2": _lean,
}


def _training(setting: Setting, work: Work) -> Training:
    from experiments.hybrids.learning.regimes import Regime
    from experiments.hybrids.learning.runs import Member
    from experiments.hybrids.learning.runs import Run as Training
    from experiments.hybrids.regression.tasks import small

    regime = Regime(steps=10**6, batch=len(work.rows), optimiser="adam", rate=RATE)
    config = config_of(setting.model, work.sizes)
    members = (Member(setting.seed, RATE),)
    device = torch.device(setting.device)
    return Training(config, small("linear"), regime, members, Path(), device)


def _initial(training: Training) -> Hybrid:
    from experiments.hybrids.learning.runs import initial_model

    return initial_model(training.built, training.members[0].seed)


def _plain(
    training: Training,
    model: nn.Module,
    predict: Callable[[Tensor], Tensor],
    setting: Setting,
    work: Work,
) -> Run:
    """A training loop as one writes it, on the prompts that ours reads."""
    from experiments.hybrids.learning.streams import prompts_at
    from experiments.hybrids.regression.tasks import interleaved, predictions_at

    optimiser = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    task, regime = training.task, training.regime
    steps = iter(range(regime.steps))

    def run() -> Float[np.ndarray, "step"]:
        losses = []
        for _ in range(steps_of(setting.model, work)):
            size = (task.d, task.points)
            prompts = prompts_at(
                task, [setting.seed], next(steps), regime.batch, size, training.device
            )
            predictions = predictions_at(predict(interleaved(prompts)))
            loss = (predictions - prompts.ys).square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).cpu().numpy()

    return run


class LeanGPT2(nn.Module):
    """An in-context regressor of GPT-2 blocks and nothing else."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.read_in = nn.Linear(D_X, width)
        self.positions = nn.Parameter(torch.randn(2 * POINTS, width) * 0.02)
        self.blocks = nn.ModuleList(LeanBlock(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.read_out = nn.Linear(width, 1)

    def forward(self, prompts: Float[Tensor, "batch pos x"]) -> Float[Tensor, "batch pos 1"]:
        x = self.read_in(prompts) + self.positions[: prompts.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.read_out(self.norm(x))

    @torch.no_grad()
    def take(self, model: Hybrid) -> None:
        """The weights of our `gpt2`."""
        base: Any = model.model
        self.read_in.load_state_dict(base.read_in.state_dict())
        self.read_out.load_state_dict(model.lm_head.state_dict())
        self.norm.load_state_dict(base.final_norm.state_dict())
        self.positions.copy_(base.positions.weight)
        lean: Any
        for lean, own in zip(self.blocks, base.blocks, strict=True):
            qkv = [getattr(own.attn, f"{name}_proj") for name in "qkv"]
            lean.qkv.weight.copy_(torch.cat([linear.weight for linear in qkv]))
            lean.qkv.bias.copy_(torch.cat([linear.bias for linear in qkv]))
            lean.out.load_state_dict(own.attn.o_proj.state_dict())
            lean.up.load_state_dict(own.mlp.up_proj.state_dict())
            lean.down.load_state_dict(own.mlp.down_proj.state_dict())
            lean.norm1.load_state_dict(own.norm1.state_dict())
            lean.norm2.load_state_dict(own.norm2.state_dict())


class LeanBlock(nn.Module):
    """x += attention(norm x); x += MLP(norm x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        split = "batch pos (three head d) -> three batch head pos d"
        q, k, v = rearrange(self.qkv(self.norm1(x)), split, three=3, head=HEADS)
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(rearrange(z, "batch head pos d -> batch pos (head d)"))
        inner = nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh")
        return x + self.down(inner)
