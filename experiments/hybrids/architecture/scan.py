"""How does a selective state space run over a row of tokens, forwards and backwards, without waste?

    h_t = e^(Δ_t A) h_{t−1} + Δ_t u_t B_t        y_t = C_t · h_t + D u_t

with a state h of [channel, state] (Gu & Dao 2023, "Mamba", algorithm 2). B and C are the same for
all channels of a token, Δ has one number a channel; it comes in positive, softplus already taken.

    sequential_scan   the two lines above, one token after another: what the others are tested with
    selective_scan    the same values and exact gradients by one of three ways
        loop          a step a token, a few rows of the batch at a time (CPU)
        chunked       2√T steps instead of T, for devices on which a step costs a launch
        kernel        mamba-ssm's CUDA kernels, if that package is installed

The backward is the same recurrence from the last token to the first,

    g_t = C_t ∂y_t + e^(Δ_{t+1} A) g_{t+1}       ∂(Δ_t A) = g_t · e^(Δ_t A) h_{t−1}

Nothing of the size [batch, pos, channel, state] is kept for it or reaches memory: both ways work on
tiles of the batch that stay in the cache and compute h again, which costs less than reading it.
States stand before channels in a tile, so that every operation runs along contiguous channels, and
e^x is 2^(x log₂ e), for on CPUs torch's exp2 takes a third of its exp's time.

Where it misleads. There is no second derivative. Below float32, everything is done in float32, and
y has the type of u. Sums run in another order than in the loop: the last digit or two differ.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Path = Literal["auto", "loop", "chunked", "kernel"]
TILE = {"cpu": 2**20}
"""Numbers in one buffer of a tile, by device: 4 MiB of float32, three of which fit in a cache."""
TILE_ELSEWHERE = 2**26


def selective_scan(
    u: Float[Tensor, "batch pos channel"],
    delta: Float[Tensor, "batch pos channel"],
    A: Float[Tensor, "channel state"],
    B: Float[Tensor, "batch pos state"],
    C: Float[Tensor, "batch pos state"],
    D: Float[Tensor, "channel"],
    *,
    path: Path = "auto",
) -> Float[Tensor, "batch pos channel"]:
    """y, with gradients to everything given. ValueError for a path that this machine has not."""
    if path not in get_args(Path):
        raise ValueError(f"scan path {path}: give one of {', '.join(get_args(Path))}")
    on_cuda = u.device.type == "cuda"
    kernel = _kernel() if on_cuda and path in ("auto", "kernel") else None
    if path == "kernel" and kernel is None:
        raise ValueError(
            f"scan path kernel on {u.device.type}: it needs mamba-ssm and a CUDA device; give auto"
        )
    given = [t if t.dtype == torch.float64 else t.float() for t in (u, delta, A, B, C, D)]
    if kernel is not None and given[0].dtype == torch.float32:
        return by_kernel(kernel, *given).to(u.dtype)
    stepwise = path == "loop" or (path == "auto" and u.device.type == "cpu")
    chunk = 1 if stepwise else math.isqrt(max(u.shape[1] - 1, 0)) + 1
    return _Scan.apply(*(t.contiguous() for t in given), chunk).to(u.dtype)  # pyright: ignore[reportOptionalMemberAccess]


def sequential_scan(
    u: Float[Tensor, "batch pos channel"],
    delta: Float[Tensor, "batch pos channel"],
    A: Float[Tensor, "channel state"],
    B: Float[Tensor, "batch pos state"],
    C: Float[Tensor, "batch pos state"],
    D: Float[Tensor, "channel"],
) -> Float[Tensor, "batch pos channel"]:
    """The definition, a token at a time, with the gradients that torch derives."""
    h = u.new_zeros(len(u), *A.shape)
    outputs = []
    for u_t, delta_t, B_t, C_t in zip(*(t.unbind(1) for t in (u, delta, B, C)), strict=True):
        kept = torch.exp(delta_t[..., None] * A)
        h = kept * h + (delta_t * u_t)[..., None] * B_t[:, None]
        outputs.append(
            einsum(h, C_t, "batch channel state, batch state -> batch channel") + D * u_t
        )
    return torch.stack(outputs, 1)


def by_kernel(kernel: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """The scan by a function with the arguments and axes of mamba-ssm's `selective_scan_fn`."""
    u, delta, A, B, C, D = given
    u, delta, B, C = (rearrange(t, "batch pos width -> batch width pos") for t in (u, delta, B, C))
    return rearrange(kernel(u, delta, A, B, C, D), "batch channel pos -> batch pos channel")


def _kernel() -> Callable[..., Tensor] | None:
    try:
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ImportError:
        return None


class _Scan(torch.autograd.Function):
    """The scan tile by tile; only what is given is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        *tensors, ctx.chunk = given
        ctx.save_for_backward(*tensors)
        u, delta, A, B, C, D = tensors
        with torch.autocast(u.device.type, enabled=False):
            x, log_decay = delta * u, _log_2_decay(A)
            y = torch.empty_like(u)
            for rows, (a, h) in _tiles(u, A, 2):
                _states_(a, h, delta[rows], x[rows], log_decay, B[rows], ctx.chunk)
                _each(C[rows], h, y[rows])
            return y.addcmul_(u, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        u, delta, A, B, C, D = ctx.saved_tensors
        dy = grads[0].contiguous()
        with torch.autocast(u.device.type, enabled=False):
            x, log_decay = delta * u, _log_2_decay(A)
            by_state = rearrange(A, "channel state -> state channel").contiguous()
            dx, d_delta, dB, dC = map(torch.empty_like, (u, u, B, C))
            dA = torch.zeros_like(by_state)
            for rows, (a, h, g) in _tiles(u, A, 3):
                _states_(a, h, delta[rows], x[rows], log_decay, B[rows], ctx.chunk)
                _along(dy[rows], h, dC[rows])
                torch.mul(dy[rows][:, :, None], C[rows][..., None], out=g)
                _recur_(g, a, ctx.chunk, backwards=True)
                _each(B[rows], g, dx[rows])
                _along(x[rows], g, dB[rows])
                # a becomes the gradient of Δ A: at the first token there is no state to forget.
                a[:, 0].zero_()
                a[:, 1:].mul_(h[:, :-1])
                a.mul_(g)
                torch.mul(a, delta[rows][:, :, None], out=g)
                dA += _summed(g)
                torch.sum(a.mul_(by_state), 2, out=d_delta[rows])
            d_delta.addcmul_(dx, u)
            dD = (dy * u).flatten(0, 1).sum(0)
            du = dx.mul_(delta).addcmul_(dy, D)
        return du, d_delta, rearrange(dA, "state channel -> channel state"), dB, dC, dD, None


def _log_2_decay(A: Tensor) -> Tensor:
    """A log₂ e, states before channels: 2 to the power of Δ times this is e^(Δ A)."""
    return rearrange(A, "channel state -> state channel").mul(math.log2(math.e)).contiguous()


def _tiles(u: Tensor, A: Tensor, buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Rows of the batch, and as many buffers [row, pos, state, channel] for them."""
    batch, pos, channels = u.shape
    tile = TILE.get(u.device.type, TILE_ELSEWHERE)
    count = max(1, math.ceil(batch * pos * A.numel() / tile))
    size = math.ceil(batch / min(count, max(batch, 1)))
    made = [u.new_empty(size, pos, A.shape[1], channels) for _ in range(buffers)]
    for first in range(0, batch, max(size, 1)):
        last = min(first + size, batch)
        yield slice(first, last), [buffer[: last - first] for buffer in made]


def _states_(
    a: Tensor, h: Tensor, delta: Tensor, x: Tensor, log_decay: Tensor, B: Tensor, chunk: int
) -> None:
    """a_t = e^(Δ_t A) and every h_t of a tile."""
    torch.mul(delta[:, :, None], log_decay, out=a).exp2_()
    torch.mul(x[:, :, None], B[..., None], out=h)
    _recur_(h, a, chunk)


def _recur_(x: Tensor, a: Tensor, chunk: int, *, backwards: bool = False) -> None:
    """x_t += a_t x_{t−1} from the first t on; backwards x_t += a_{t+1} x_{t+1} from the last."""
    if chunk > 1:
        _recur_in_chunks_(x, a, chunk, backwards)
        return
    steps, decays = x.unbind(1), a.unbind(1)[1:]
    if backwards:
        steps, decays = steps[::-1], decays[::-1]
    for before, here, decay in zip(steps[:-1], steps[1:], decays, strict=True):
        here.addcmul_(decay, before)


def _recur_in_chunks_(x: Tensor, a: Tensor, chunk: int, backwards: bool) -> None:
    """All chunks at once from zero, then what each hands to the next, chunk by chunk."""
    if backwards:
        turned = x.flip(1)
        _recur_in_chunks_(turned, a.roll(-1, 1).flip(1), chunk, False)
        x.copy_(turned.flip(1))
        return
    pos = x.shape[1]
    xs, decays = (
        rearrange(
            torch.nn.functional.pad(t, (0, 0, 0, 0, 0, -pos % chunk)),
            "row (many chunk) state channel -> row many chunk state channel",
            chunk=chunk,
        )
        for t in (x, a)
    )
    for step in range(1, chunk):
        xs[:, :, step].addcmul_(decays[:, :, step], xs[:, :, step - 1])
    reach = decays.cumprod(2)
    for i in range(1, xs.shape[1]):
        xs[:, i].addcmul_(reach[:, i], xs[:, i - 1, -1:])
    joined = "row many chunk state channel -> row (many chunk) state channel"
    x.copy_(rearrange(xs, joined)[:, :pos])


def _each(weights: Tensor, tile: Tensor, out: Tensor) -> None:
    """Σ over states of weights [row, pos, state] times the tile, into out [row, pos, channel]."""
    torch.bmm(
        rearrange(weights, "row pos state -> (row pos) 1 state"),
        rearrange(tile, "row pos state channel -> (row pos) state channel"),
        out=rearrange(out, "row pos channel -> (row pos) 1 channel"),
    )


def _along(weights: Tensor, tile: Tensor, out: Tensor) -> None:
    """Σ over channels of weights [row, pos, channel] times the tile, into out [row, pos, state]."""
    torch.bmm(
        rearrange(weights, "row pos channel -> (row pos) 1 channel"),
        rearrange(tile, "row pos state channel -> (row pos) channel state"),
        out=rearrange(out, "row pos state -> (row pos) 1 state"),
    )


def _summed(tile: Tensor) -> Tensor:
    """Σ over rows and positions: a product with ones, which reads faster than a sum writes."""
    flat = rearrange(tile, "row pos state channel -> (row pos) (state channel)")
    return (flat.new_ones(1, len(flat)) @ flat).view(tile.shape[2:])
