"""What does an SSM mixer attend to, though it has no attention?

A selective SSM maps x, what its short convolution gives, to

    y_i = Σ_{j≤i} α_ij x_j + D x_i        α_ij = C_i · (Π_{k=j+1..i} Ā_k) B̄_j
    Ā_k = exp(Δ_k A)                      B̄_j = Δ_j B_j

with one α for every channel (Mamba, Falcon-Mamba, Jamba) or head (Mamba-2, Bamba, Falcon-H1): Ali,
Zimerman & Wolf 2024, "The hidden attention of Mamba models". `scan_of` computes Δ, A, B, C again
from a mixer and its input as transformers' own torch path does, `hidden_attention` gives α.

A mixer is one component and is shown as one head: `watched_mixers` calls see(Rows) with the mean
over channels (heads) of |α|, each row divided by its sum.

Where it misleads. Gone in the mean are the sign and what tells channels apart; α of one channel
weighs that channel's x_j, whose size is not in it, and channels with large α outvote the others.
Since rows are divided by their sums, a query that takes in next to nothing counts like the rest.
D, the gate and the norm behind the scan are not in it. Key j is what the convolution made of tokens
j−3 … j (its kernel has 4 taps mostly), so a mixer that looks for a token can find it up to 3 keys
late. Forgetting alone gives recent keys more weight: compare with a control.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import e, log2
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn.functional import softplus, threshold

from ablate.hooked import HookedModel
from ablate.hooks import execution_device
from ablate.placement import resident
from ablate.sites import Site
from probes.rows import CHUNK, CHUNK_ELSEWHERE, Rows

QUERIES = 32
"""Queries whose rows are formed together: all pairs with earlier keys share their exponentials."""
FEW = 4
"""Of so few positions every pair has an exponential of its own for each channel and state."""


@dataclass(frozen=True, eq=False, repr=False)
class Scan:
    """The scan of one mixer on one batch. In Mamba-1 every channel is a head of width 1."""

    x: Float[Tensor, "batch head pos width"]
    delta: Float[Tensor, "batch head pos"]
    a: Float[Tensor, "head decay"]
    """A < 0: one number for each state of a channel (Mamba-1), or one for a head (Mamba-2)."""
    b: Float[Tensor, "batch group pos state"]
    c: Float[Tensor, "batch group pos state"]
    """B and C, the same for all heads of a group; one group in Mamba-1."""
    d: Float[Tensor, "head"]

    @cached_property
    def time(self) -> Float64[Tensor, "batch head pos"]:
        """Σ_{k≤i} Δ_k: only differences count, and these can be small where it is large."""
        return self.delta.cumsum(-1, dtype=torch.float64)


def scan_of(
    mixer: nn.Module,
    hidden_states: Float[Tensor, "batch pos d_model"],
    attention_mask: Tensor | None = None,
) -> Scan:
    """What `mixer` scans when it is called with these arguments and no earlier state, in fp32.

    Offloaded weights are fetched and dropped again. Raises ValueError for a mixer that is neither
    Mamba-1 nor Mamba-2.
    """
    build = _build_of(mixer)
    device = execution_device(mixer)
    hidden = hidden_states.to(device)
    keep = None if attention_mask is None else attention_mask[:, :, None].to(device)
    with resident(mixer):
        return build(mixer, hidden, keep)


@torch.no_grad()
def hidden_attention(
    scan: Scan, first: int, last: int, heads: slice = slice(None)
) -> Float[Tensor, "batch head query key"]:
    """α of the queries first … last − 1 and the keys before `last`, signed; 0 for later keys."""
    time, a = scan.time[:, heads, :last], scan.a[heads]
    if scan.a.shape[-1] == 1:
        found = _of_heads(scan, a, time, first, heads)
    else:
        found = _among(scan, a, time, first, last)
        if first:
            found = torch.cat([_across(scan, a, time, 0, first, last), found], -1)
    return found.mul_(scan.delta[:, heads, None, :last])


def _of_heads(scan: Scan, a: Tensor, time: Tensor, first: int, heads: slice) -> Tensor:
    """α / Δ_j where all states of a head forget alike: (C_i · B_j) times the decay."""
    last = time.shape[-1]
    passed = (time[..., first:, None] - time[..., None, :]).float()
    position = torch.arange(last, device=time.device)
    later = position > position[first:, None]
    decay = _decayed((a[:, :, None] * passed).masked_fill_(later, -torch.inf))
    products = scan.c[:, :, first:last] @ scan.b[:, :, :last].mT
    group = torch.arange(len(scan.a), device=time.device) // (len(scan.a) // products.shape[1])
    return decay.mul_(products[:, group[heads]])


def _across(scan: Scan, a: Tensor, time: Tensor, first: int, middle: int, last: int) -> Tensor:
    """α / Δ_j of the queries middle … last − 1 and the keys first … middle − 1.

    Decay from key to the last of these keys, times decay from there to query: neither is above 1,
    so nothing overflows, and the sum over states is a product of matrices.
    """
    meeting = time[..., middle - 1 : middle]
    since = (time[..., middle:last] - meeting).float()[..., None]
    until = (meeting - time[..., first:middle]).float()[..., None]
    c = _decayed(a[:, None] * since).mul_(scan.c[:, :, middle:last])
    b = _decayed(a[:, None] * until).mul_(scan.b[:, :, first:middle])
    return c @ b.mT


def _decayed(exponent: Tensor) -> Tensor:
    """e^exponent, in its place; 0 below 2^−40: products of denormal size are slow.

    By exp2: on a CPU torch's exp takes many times as long where it underflows, which many here do.
    """
    return threshold(exponent.mul_(log2(e)), -40.0, -torch.inf, inplace=True).exp2_()


def _among(scan: Scan, a: Tensor, time: Tensor, first: int, last: int) -> Tensor:
    """α / Δ_j of the queries and keys first … last − 1: halves, and what goes across."""
    size = last - first
    if size <= FEW:
        part = time[..., first:last]
        passed = (part[..., :, None] - part[..., None, :]).float()[..., None]
        later = torch.ones(size, size, dtype=torch.bool, device=time.device).triu(1)
        decay = _decayed((a[:, None, None] * passed).masked_fill_(later[..., None], -torch.inf))
        pairs = scan.c[:, :, first:last, None] * scan.b[:, :, None, first:last]
        return decay.mul_(pairs).sum(-1)
    half = size // 2
    middle = first + half
    found = scan.delta.new_zeros(*time.shape[:2], size, size)
    found[..., :half, :half] = _among(scan, a, time, first, middle)
    found[..., half:, :half] = _across(scan, a, time, first, middle, last)
    found[..., half:, half:] = _among(scan, a, time, middle, last)
    return found


@contextmanager
def watched_mixers(model: HookedModel, see: Callable[[Rows], None]) -> Iterator[None]:
    """Show `see` every row of every mixer of the forwards inside, queries in order.

    Rows are [batch, 1, query, key], the keys up to the last of these queries; each sums to 1, and
    that of a padded query, which takes nothing in, is all 0. A mixer's rows come before it runs.
    Raises ValueError for a model without mixers, for a mixer that is neither Mamba-1 nor Mamba-2,
    and in a forward that goes on from a cache, whose keys are gone.
    """
    sites = [site for site in model.sites if site.kind == "mixer"]
    if not sites:
        raise ValueError(f"{model.name} has no mixer: watch its heads with probes.rows.watched")
    modules = [model.model.get_submodule(site.path.rpartition(".")[0]) for site in sites]
    for module in modules:
        _build_of(module)
    handles = []
    try:
        for site, module in zip(sites, modules, strict=True):
            handles.append(module.register_forward_pre_hook(_show(site, see), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _show(site: Site, see: Callable[[Rows], None]) -> Callable[..., None]:
    @torch.no_grad()
    def before(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(type(mixer).forward).bind(mixer, *args, **kwargs).arguments
        cache = given.get("cache_params")
        if cache is not None and cache.has_previous_state(mixer.layer_idx):
            raise ValueError(
                f"{site.components[0]} goes on from a cache, whose keys are gone: run the whole "
                "sequence in one forward, with use_cache=False"
            )
        for rows in _rows(
            site, scan_of(mixer, given["hidden_states"], given.get("attention_mask"))
        ):
            see(rows)

    return before


def _rows(site: Site, scan: Scan) -> Iterator[Rows]:
    """Rows of Σ|α| over heads, some queries and heads at a time, divided by their sums."""
    batch, heads, pos = scan.delta.shape
    states = scan.a.shape[-1]
    chunk = CHUNK.get(scan.delta.device.type, CHUNK_ELSEWHERE)
    for first in range(0, pos, QUERIES):
        last = min(first + QUERIES, pos)
        formed = QUERIES * last + (QUERIES + last) * states  # numbers for one head
        step = max(1, chunk // (batch * formed))
        total = scan.delta.new_zeros(batch, last - first, last)
        for head in range(0, heads, step):
            total += hidden_attention(scan, first, last, slice(head, head + step)).abs().sum(1)
        total /= total.sum(-1, keepdim=True).clamp(min=torch.finfo(total.dtype).tiny)
        yield Rows(site, first, total[:, None], None)


def _build_of(mixer: Any) -> Callable[[Any, Tensor, Tensor | None], Scan]:
    if hasattr(mixer, "x_proj"):
        return _mamba_1
    if hasattr(mixer, "dt_bias"):
        return _mamba_2
    raise ValueError(
        f"implicit attention of {type(mixer).__name__} asked for, which is neither a Mamba-1 mixer "
        "(it has no x_proj) nor a Mamba-2 mixer (no dt_bias): leave it out"
    )


def _mamba_1(mixer: Any, hidden: Tensor, keep: Tensor | None) -> Scan:
    """Δ, B, C from x itself; Falcon-Mamba and Jamba norm the three."""
    x = _convolved(mixer, mixer.in_proj(_kept(hidden, keep)).chunk(2, -1)[0], keep)
    widths = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    parts = zip(("dt", "b", "c"), mixer.x_proj(x).split(widths, -1), strict=True)
    dt, b, c = (getattr(mixer, f"{name}_layernorm", nn.Identity())(part) for name, part in parts)
    by_state = "batch pos state -> batch 1 pos state"
    return _scan(
        mixer,
        rearrange(x, "batch pos head -> batch head pos 1"),
        softplus(mixer.dt_proj(dt)),
        mixer.A_log,
        rearrange(b, by_state),
        rearrange(c, by_state),
    )


def _mamba_2(mixer: Any, hidden: Tensor, keep: Tensor | None) -> Scan:
    """B and C beside x through the convolution, Δ past it; Falcon-H1 scales what goes in."""
    hidden = _kept(hidden, keep) * getattr(mixer, "ssm_in_multiplier", 1)
    projected = mixer.in_proj(hidden) * getattr(mixer, "mup_vector", 1)
    widths = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    _, mixed, dt = projected.split(widths, -1)
    states = mixer.n_groups * mixer.ssm_state_size
    widths = [mixer.intermediate_size, states, states]
    x, b, c = _convolved(mixer, mixed, keep).split(widths, -1)
    by_group = "batch pos (group state) -> batch group pos state"
    return _scan(
        mixer,
        rearrange(x, "batch pos (head width) -> batch head pos width", head=mixer.num_heads),
        softplus(dt + mixer.dt_bias.to(dt.dtype)).clamp(*mixer.time_step_limit),
        rearrange(mixer.A_log, "head -> head 1"),
        rearrange(b, by_group, group=mixer.n_groups),
        rearrange(c, by_group, group=mixer.n_groups),
    )


def _scan(mixer: Any, x: Tensor, dt: Tensor, a_log: Tensor, b: Tensor, c: Tensor) -> Scan:
    delta = rearrange(dt, "batch pos head -> batch head pos").float()
    # D is copied: offloaded weights are dropped once they have been read.
    d = mixer.D.float().clone()
    return Scan(x.float(), delta, -a_log.float().exp(), b.float(), c.float(), d)


def _kept(hidden: Tensor, keep: Tensor | None) -> Tensor:
    """Padded tokens as zeros, as the mixers have them."""
    return hidden if keep is None else (hidden * keep).to(hidden.dtype)


def _convolved(mixer: Any, mixed: Tensor, keep: Tensor | None) -> Tensor:
    by_channel = rearrange(mixed, "batch pos channel -> batch channel pos")
    convolved = mixer.act(mixer.conv1d(by_channel)[..., : mixed.shape[1]])
    return _kept(rearrange(convolved, "batch channel pos -> batch pos channel"), keep)
