"""What is the mixer of a Mamba block, in plain PyTorch?

    x, z = in_proj(hidden)              x = silu(conv1d(x)): each channel, its last d_conv tokens
    Δ, B, C = x_proj(x)                 Δ = softplus(dt_proj(Δ))
    y = scan(x, Δ, A, B, C) + D x       out = out_proj(y · silu(z))          A = −e^A_log

(Gu & Dao 2023, "Mamba"; the same function, and the same names, as transformers' MambaMixer.) Every
tensor that is trained belongs to a module without submodules, so that `ablate.students` can run
several seeds as one; A_log and D of `scan` are readable on the mixer too.

`reset_` is Mamba's own law for what the scan is steered with: A = −(1 … d_state), D = 1, and a Δ
that begins log-uniform in [0.001, 0.1]. With torch's own start of dt_proj, Δ begins near 0.7, and a
state of decay 16 forgets within a token.

Where it misleads. Padded tokens enter the scan as zeros, as in transformers; but the convolution's
bias is there before the mask, and states do not start anew, so only padding before a row or behind
it is harmless.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu, softplus
from transformers import initialization as init

from experiments.hybrids.architecture.scan import Path, selective_scan

DT_RANGE = (0.001, 0.1)
DT_FLOOR = 1e-4


class Scan(nn.Module):
    """The selective scan with its own A and D."""

    def __init__(self, channels: int, d_state: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(channels, d_state))
        self.D = nn.Parameter(torch.empty(channels))
        self.path: Path = "auto"

    def forward(
        self,
        u: Float[Tensor, "batch pos channel"],
        delta: Float[Tensor, "batch pos channel"],
        B: Float[Tensor, "batch pos state"],
        C: Float[Tensor, "batch pos state"],
    ) -> Float[Tensor, "batch pos channel"]:
        A = -self.A_log.float().exp() if self.A_log.dtype != torch.float64 else -self.A_log.exp()
        return selective_scan(u, delta, A, B, C, self.D, path=self.path)


class CausalConv1d(nn.Conv1d):
    """Each channel of the last `width` tokens; as long as its input, unlike what it inherits from.

    Channels come before positions, as in every Conv1d, and are read where they lie.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels, padding=width - 1)

    def forward(self, input: Float[Tensor, "batch channel pos"]) -> Tensor:
        dtype = torch.promote_types(input.dtype, self.weight.dtype)
        x = rearrange(input.to(dtype), "batch channel pos -> batch pos channel")
        taps = rearrange(self.weight.to(dtype), "channel 1 tap -> tap channel")
        y: Any = _Taps.apply(x, taps, self.bias if self.bias is None else self.bias.to(dtype))
        return rearrange(y, "batch pos channel -> batch channel pos").to(input.dtype)


class _Taps(torch.autograd.Function):
    """y_t = bias + Σ_k taps_k x_{t−K+1+k}: a pass a tap (torch's own: 4 times as long)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, taps)
        ctx.has_bias = bias is not None
        y = x * taps[-1] if bias is None else torch.addcmul(bias, x, taps[-1])
        for lag, tap in _lagged(taps, x.shape[1]):
            y[:, lag:].addcmul_(x[:, :-lag], tap)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, taps = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx, d_taps = dy * taps[-1], torch.zeros_like(taps)
        d_taps[-1] = _correlated(dy, x)
        for lag, tap in _lagged(taps, x.shape[1]):
            dx[:, :-lag].addcmul_(dy[:, lag:], tap)
            d_taps[-1 - lag] = _correlated(dy[:, lag:], x[:, :-lag])
        return dx, d_taps, dy.flatten(0, 1).sum(0) if ctx.has_bias else None


def _lagged(taps: Tensor, pos: int) -> list[tuple[int, Tensor]]:
    """How many tokens back a tap looks, and the tap, but for that of the token itself."""
    return [(lag, taps[-1 - lag]) for lag in range(1, min(len(taps), pos))]


def _correlated(one: Tensor, other: Tensor) -> Float[Tensor, "channel"]:
    return (one * other).flatten(0, 1).sum(0)


class MambaMixer(nn.Module):
    """The mixer; `dt_rank` None is ⌈d_model / 16⌉."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 4,
        dt_rank: int | None = None,
    ) -> None:
        super().__init__()
        channels = expand * d_model
        self.hidden_size, self.intermediate_size = d_model, channels
        self.ssm_state_size, self.conv_kernel_size = d_state, d_conv
        self.time_step_rank = dt_rank or math.ceil(d_model / 16)
        self.act = nn.SiLU()
        self.in_proj = nn.Linear(d_model, 2 * channels, bias=False)
        self.conv1d = CausalConv1d(channels, d_conv)
        self.x_proj = nn.Linear(channels, self.time_step_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.time_step_rank, channels)
        self.scan = Scan(channels, d_state)
        self.out_proj = nn.Linear(channels, d_model, bias=False)
        reset_(self)

    @property
    def A_log(self) -> nn.Parameter:
        """log −A [channel, state], the scan's."""
        return self.scan.A_log

    @property
    def D(self) -> nn.Parameter:
        """What of x passes the scan by, the scan's."""
        return self.scan.D

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        x, z = self.in_proj(_kept(hidden_states, attention_mask)).chunk(2, -1)
        x = self.conv1d(rearrange(x, "batch pos channel -> batch channel pos"))
        x = _kept(silu(rearrange(x, "batch channel pos -> batch pos channel")), attention_mask)
        widths = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        dt, B, C = self.x_proj(x).split(widths, -1)
        y = self.scan(x, softplus(self.dt_proj(dt)), B, C)
        return self.out_proj(y * silu(z))


def _kept(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Padded tokens as zeros."""
    return hidden if mask is None else (hidden * mask[:, :, None]).to(hidden.dtype)


@torch.no_grad()
def reset_(mixer: MambaMixer) -> None:
    """Mamba's law for A, D and Δ, from torch's generator; other weights stay as they are.

    Leaves a tensor alone that was loaded from a checkpoint.
    """
    reset_decay_(mixer)
    reset_step_(mixer)


@torch.no_grad()
def reset_decay_(mixer: MambaMixer) -> None:
    """A = −(1 … d_state) in every channel, D = 1."""
    states = torch.arange(1.0, mixer.ssm_state_size + 1, device=mixer.A_log.device)
    init.copy_(mixer.A_log, states.log().expand_as(mixer.A_log))
    init.ones_(mixer.D)


@torch.no_grad()
def reset_step_(mixer: MambaMixer) -> None:
    """W_Δ uniform within 1/√rank, softplus of its bias log-uniform in DT_RANGE."""
    bound = mixer.time_step_rank**-0.5
    init.uniform_(mixer.dt_proj.weight, -bound, bound)
    low, high = map(math.log, DT_RANGE)
    dt = torch.empty_like(mixer.dt_proj.bias).uniform_(low, high).exp().clamp(min=DT_FLOOR)
    init.copy_(mixer.dt_proj.bias, dt + torch.log(-torch.expm1(-dt)))
