"""α x + D x is what each mixer's own scan gives; rows of |α| are seen in the forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from ablate import HookedModel
from probes import implicit
from probes import rows as rows_module
from probes.implicit import Scan, hidden_attention, scan_of, watched_mixers
from probes.rows import Rows, watched
from tests.families import inputs_for, output_of, tiny

GROUPED: dict[str, dict[str, Any]] = {
    "mamba2": {"n_groups": 2},
    "falcon_h1": {"mamba_n_groups": 2},
    "bamba": {"mamba_n_groups": 2},
}
MULTIPLIED = {"ssm_in_multiplier": 0.7, "ssm_multipliers": [0.5, 0.8, 1.1, 1.3, 0.9]}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mamba", {}),
    ("mamba", {"use_bias": True, "use_conv_bias": False, "conv_kernel": 2}),
    ("falcon_mamba", {}),
    ("jamba", {}),
    ("mamba2", {}),
    ("mamba2", GROUPED["mamba2"] | {"time_step_limit": (0.4, 0.9), "use_bias": True}),
    ("falcon_h1", {}),
    ("falcon_h1", GROUPED["falcon_h1"] | MULTIPLIED),
    ("falcon_h1", {"mamba_rms_norm": True, "mamba_proj_bias": True}),
    ("bamba", {}),
    ("bamba", GROUPED["bamba"] | {"time_step_limit": (0.4, 0.9)}),
]
MIXING = sorted({family for family, _ in CASES})


def hooked(family: str, **changes: Any) -> HookedModel:
    """A tiny model whose D, Δ's bias and A are no round numbers, and differ between heads."""
    hf = tiny(family, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in hf.named_parameters():
            if path.endswith((".D", ".A_log", "dt_bias", "dt_proj.bias")):
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return HookedModel(hf)


def mixers(model: HookedModel) -> list[Any]:
    paths = [s.path.rpartition(".")[0] for s in model.sites if s.kind == "mixer"]
    return [model.model.get_submodule(path) for path in paths]


@contextmanager
def recorded(mixer: Any) -> Iterator[dict[str, Any]]:
    """What a mixer is called with, and y: what comes out of its scan, or y · silu(gate) where
    there is no norm to take it from."""
    found: dict[str, Any] = {}
    norm = getattr(mixer, "norm", None)
    gated = norm is None or isinstance(norm, nn.Identity)
    handles = [
        mixer.register_forward_pre_hook(
            lambda _, args, kwargs: found.update(
                hidden=args[0] if args else kwargs["hidden_states"],
                mask=kwargs.get("attention_mask"),
            ),
            with_kwargs=True,
        ),
        mixer.in_proj.register_forward_hook(lambda *call: found.setdefault("projected", call[-1])),
        (mixer.out_proj if gated else norm).register_forward_pre_hook(
            lambda _, args: found.update(y=args[0])
        ),
    ]
    try:
        yield found
        found["gate"] = None
        if gated:
            first, last = found["projected"].split(mixer.out_proj.in_features, -1)[:2]
            found["gate"] = (
                last if norm is None else first * mixer.mup_vector[..., : first.shape[-1]]
            )
    finally:
        for handle in handles:
            handle.remove()


def applied(scan: Scan, alpha: Tensor) -> Tensor:
    """α x + D x as [batch, pos, channel]."""
    y = einsum(
        alpha, scan.x, "batch head query key, batch head key width -> batch head query width"
    )
    y = y + scan.d[:, None, None] * scan.x
    return rearrange(y, "batch head pos width -> batch pos (head width)")


def literal(scan: Scan) -> Tensor:
    """α by its definition, one product after another, in fp64."""
    batch, heads, pos = scan.delta.shape
    group = torch.arange(heads) // (heads // scan.b.shape[1])
    b, c = scan.b.double()[:, group], scan.c.double()[:, group]
    delta, a = scan.delta.double()[..., None], scan.a.double()[:, None]
    forgotten = (delta * a).exp()
    alpha = torch.zeros(batch, heads, pos, pos, dtype=torch.float64)
    for i in range(pos):
        for j in range(i + 1):
            decay = forgotten[:, :, j + 1 : i + 1].prod(2)
            alpha[:, :, i, j] = (c[:, :, i] * decay * delta[:, :, j] * b[:, :, j]).sum(-1)
    return alpha


def collected(model: HookedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Site -> its rows put together, keys that are not shown as 0."""
    seen: dict[str, list[Tensor]] = {}

    def see(rows: Rows) -> None:
        parts = seen.setdefault(rows.site.name, [])
        assert rows.first == sum(p.shape[2] for p in parts)
        assert rows.normaliser is None
        parts.append(rows.pattern())

    with watched_mixers(model, see):
        output_of(model.model, inputs)
    width = inputs["input_ids"].shape[1]
    return {
        name: torch.cat([pad(p, (0, width - p.shape[-1])) for p in parts], dim=2)
        for name, parts in seen.items()
    }


@pytest.mark.parametrize(("family", "changes"), CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_alpha_gives_what_the_scan_gives(family: str, changes: dict[str, Any], padded: bool):
    model = hooked(family, **changes)
    inputs = inputs_for(model.model, pos=21, padded=padded)
    if padded:  # on the left of another row as well, where the convolution could still see it
        inputs["attention_mask"][0, :4] = 0
    for mixer in mixers(model):
        with recorded(mixer) as found:
            output_of(model.model, inputs)
        with torch.no_grad():
            scan = scan_of(mixer, found["hidden"], found["mask"])
            alpha = [hidden_attention(scan, f, min(f + 6, 21)) for f in range(0, 21, 6)]
            whole = torch.cat([pad(part, (0, 21 - part.shape[-1])) for part in alpha], dim=2)
            y = applied(scan, whole)
        if found["gate"] is not None:
            y = y * silu(found["gate"])
        expected = found["y"]
        assert expected.abs().max() > 0.1
        assert torch.allclose(y, expected, atol=1e-5, rtol=1e-5)
        assert not padded or not found["mask"].all()


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_alpha_is_its_definition(family: str, changes: dict[str, Any]):
    model = hooked(family, **changes)
    mixer = mixers(model)[0]
    hidden = torch.randn(2, 19, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        scan = scan_of(mixer, hidden)
        expected = literal(scan)
        for first, last in [(0, 19), (0, 1), (5, 6), (7, 19), (18, 19)]:
            found = hidden_attention(scan, first, last)
            assert torch.allclose(found.double(), expected[:, :, first:last, :last], atol=1e-5)
            some = hidden_attention(scan, first, last, slice(3, 6))
            assert torch.allclose(some, found[:, 3:6], atol=1e-7)


@pytest.mark.parametrize("family", MIXING)
def test_rows_are_the_mean_of_alphas_size(family: str):
    model = hooked(family)
    inputs = inputs_for(model.model, pos=19)
    sites = [site for site in model.sites if site.kind == "mixer"]
    found = collected(model, inputs)
    assert list(found) == [site.name for site in sites]
    for site, mixer in zip(sites, mixers(model), strict=True):
        with recorded(mixer) as call:
            output_of(model.model, inputs)
        size = literal(scan_of(mixer, call["hidden"], call["mask"])).abs().mean(1, keepdim=True)
        expected = (size / size.sum(-1, keepdim=True)).float()
        pattern = found[site.name]
        assert pattern.shape == (2, len(site.components), 19, 19)
        assert torch.allclose(pattern, expected, atol=1e-5)
        assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-5)
        assert not pattern.triu(1).any()
        assert (pattern >= 0).all()


@pytest.mark.parametrize("family", ["falcon_mamba", "bamba"])
def test_rows_do_not_depend_on_pieces_or_batch(family: str, monkeypatch: pytest.MonkeyPatch):
    model = hooked(family)
    inputs = inputs_for(model.model, batch=3, pos=23, padded=True)
    whole = collected(model, inputs)
    alone = [
        collected(model, {name: tensor[row : row + 1] for name, tensor in inputs.items()})
        for row in range(3)
    ]
    for queries, few, chunk in [(1, 1, 1), (5, 2, 3000), (64, 64, 2**20)]:
        monkeypatch.setattr(implicit, "QUERIES", queries)
        monkeypatch.setattr(implicit, "FEW", few)
        monkeypatch.setitem(rows_module.CHUNK, "cpu", chunk)
        pieces = collected(model, inputs)
        for name, pattern in whole.items():
            assert torch.allclose(pieces[name], pattern, atol=1e-6)
            assert torch.allclose(torch.cat([a[name] for a in alone]), pattern, atol=1e-6)


@pytest.mark.parametrize("family", MIXING)
def test_padding_neither_gives_nor_takes(family: str):
    model = hooked(family)
    inputs = inputs_for(model.model, pos=19, padded=True)  # the last three of the last row
    inputs["attention_mask"][0, :4] = 0  # and on the left
    for pattern in collected(model, inputs).values():
        assert not pattern[1, :, 16:].any()
        assert not pattern[1, ..., 16:].any()
        assert not pattern[0, :, :4].any()
        assert not pattern[0, ..., :4].any()
        assert torch.allclose(pattern[0, :, 4:].sum(-1), torch.ones(()), atol=1e-5)


def test_long_rows_neither_overflow_nor_fade():
    """Δ·A of −1000 at every step, beside a state that forgets nothing, over 300 tokens; then small
    steps, which are small differences of large sums."""
    pos, generator = 300, torch.Generator().manual_seed(0)
    delta = torch.cat([torch.full((1, 2, 200), 100.0), torch.full((1, 2, 100), 0.01)], dim=-1)
    drawn = torch.randn(2, 1, 1, pos, 2, generator=generator)
    scan = Scan(
        x=torch.ones(1, 2, pos, 1),
        delta=delta,
        a=torch.tensor([[-10.0, -1e-9], [-1e-9, -10.0]]),
        b=drawn[0],
        c=drawn[1],
        d=torch.zeros(2),
    )
    expected = literal(scan)
    for first in (0, 190, 290):
        found = hidden_attention(scan, first, pos).double()
        assert torch.allclose(found, expected[:, :, first:], atol=1e-5)
    headwise = replace(scan, a=torch.tensor([[-10.0], [-1e-9]]))
    found = hidden_attention(headwise, 0, pos)
    assert torch.allclose(found.double(), literal(headwise), atol=1e-5)


def test_a_mixer_that_reads_one_key():
    """By hand: B is 1 at key 2 alone, nothing is forgotten, so every later row is on key 2."""
    pos = 6
    b = torch.zeros(1, 1, pos, 1)
    b[..., 2, :] = 1
    scan = Scan(
        x=torch.ones(1, 3, pos, 4),
        delta=torch.ones(1, 3, pos),
        a=torch.full((3, 1), -1e-9),
        b=b,
        c=-torch.ones(1, 1, pos, 1),
        d=torch.zeros(3),
    )
    site = next(s for s in HookedModel(tiny("mamba2")).sites if s.kind == "mixer")
    (rows,) = implicit._rows(site, scan)
    expected = torch.zeros(pos, pos)
    expected[2:, 2] = 1
    assert torch.equal(rows.pattern()[0, 0], expected)
    assert rows.most()[0, 0].tolist() == [0, 0, 2, 2, 2, 2]
    keys = torch.tensor([[-1, 2]]).expand(1, pos, 2)
    assert rows.at(keys)[0, 0, :, 1].tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("family", MIXING)
def test_nothing_of_the_model_is_changed(family: str):
    model = hooked(family)
    inputs = inputs_for(model.model, padded=True)
    whole = output_of(model.model, inputs)
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    with watched_mixers(model, lambda rows: None):
        assert torch.equal(output_of(model.model, inputs), whole)

    def see(rows: Rows) -> None:
        raise LookupError("not today")

    with pytest.raises(LookupError, match="not today"), watched_mixers(model, see):
        output_of(model.model, inputs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    assert all(torch.equal(weights[n], v) for n, v in model.model.state_dict().items())
    assert torch.equal(output_of(model.model, inputs), whole)


@pytest.mark.parametrize("family", MIXING)
def test_offloaded_weights_give_the_same_rows(family: str, tmp_path: Path):
    from accelerate import disk_offload

    model = hooked(family)
    inputs = inputs_for(model.model, padded=True)
    whole = collected(model, inputs)
    disk_offload(model.model, tmp_path, torch.device("cpu"), offload_buffers=True)
    offloaded = collected(model, inputs)
    assert all(torch.equal(offloaded[name], pattern) for name, pattern in whole.items())
    assert all(parameter.is_meta for parameter in mixers(model)[0].parameters())


@pytest.mark.parametrize("family", ["jamba", "falcon_h1", "bamba"])
def test_heads_and_mixers_are_watched_together(family: str):
    model = hooked(family)
    inputs = inputs_for(model.model)
    seen: list[str] = []

    def see(rows: Rows) -> None:
        seen.append(rows.site.name)

    with watched(model, see), watched_mixers(model, see):
        output_of(model.model, inputs)
    there = [site for site in model.sites if site.kind != "ffn"]
    assert sorted(seen) == sorted(site.name for site in there)
    layer = {site.name: site.layer for site in there}
    assert [layer[name] for name in seen] == sorted(layer[name] for name in seen)


@pytest.mark.parametrize("family", MIXING)
def test_in_half_precision_rows_are_close(family: str):
    inputs = inputs_for(tiny(family), pos=19)
    single, half = HookedModel(tiny(family)), HookedModel(tiny(family, dtype=torch.bfloat16))
    name = next(site.name for site in single.sites if site.kind == "mixer")
    ours, theirs = collected(half, inputs)[name], collected(single, inputs)[name]
    assert torch.allclose(ours.sum(-1), torch.ones(()), atol=1e-5)
    # A row in which every C_i·B_j nearly cancels is nearly 0 / 0: few are, and these may differ.
    off = (ours - theirs).abs().amax(-1)
    assert (off < 2e-2).float().mean() > 0.9
    assert off.median() < 5e-3


def test_what_cannot_be_watched_is_refused():
    with (
        pytest.raises(ValueError, match="opt has no mixer: watch its heads"),
        watched_mixers(HookedModel(tiny("opt")), print),
    ):
        pass
    with pytest.raises(ValueError, match="neither a Mamba-1 mixer .* nor a Mamba-2 mixer") as error:
        scan_of(nn.Linear(3, 3), torch.zeros(1, 2, 3))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["mamba", "falcon_h1"])
def test_a_cache_is_taken_only_where_it_is_empty(family: str):
    model = hooked(family)
    inputs = inputs_for(model.model)
    seen: list[int] = []
    with watched_mixers(model, lambda rows: seen.append(rows.first)), torch.no_grad():
        cached: Any = model.model(**inputs, use_cache=True)
        assert seen == [0, 0]
        name = "cache_params" if family == "mamba" else "past_key_values"
        after = {name: getattr(cached, name), "use_cache": True}
        with pytest.raises(ValueError, match="L0M goes on from a cache, whose keys are gone"):
            model.model(input_ids=inputs["input_ids"][:, -1:], **after)
