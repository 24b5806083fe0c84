"""The mixer is transformers' MambaMixer, in values, gradients, with padding; its law."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer as TransformersMixer

from ablate.students import Students
from experiments.hybrids.architecture.mamba import CausalConv1d, MambaMixer, reset_step_
from experiments.hybrids.architecture.scan import sequential_scan
from probes.implicit import hidden_attention, scan_of

D_MODEL, BATCH, POS = 24, 3, 9


def mixer(seed: int = 0, **changes: int) -> MambaMixer:
    """With weights of a size at which every part of it counts."""
    torch.manual_seed(seed)
    made = MambaMixer(D_MODEL, **{"d_state": 5, "expand": 2, **changes})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        made.dt_proj.bias.add_(2)
    return made


def twin(own: MambaMixer) -> TransformersMixer:
    """transformers' mixer with the same weights."""
    config = MambaConfig(
        vocab_size=3,
        hidden_size=own.hidden_size,
        state_size=own.ssm_state_size,
        conv_kernel=own.conv_kernel_size,
        expand=own.intermediate_size // own.hidden_size,
        time_step_rank=own.time_step_rank,
        num_hidden_layers=1,
    )
    made = TransformersMixer(config, 0)
    state = {name.removeprefix("scan."): tensor for name, tensor in own.state_dict().items()}
    made.load_state_dict(state)
    return made


def hidden() -> Tensor:
    return torch.randn(BATCH, POS, D_MODEL, generator=torch.Generator().manual_seed(1))


def gradients(module: nn.Module, x: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """By name; `hidden` and `out` beside the parameters."""
    x = x.clone().requires_grad_()
    out = module(x, attention_mask=mask)
    (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    named = {n.removeprefix("scan."): p.grad for n, p in module.named_parameters()}
    return {**named, "hidden": x.grad, "out": out.detach()}


@pytest.mark.parametrize("padding", ["none", "before", "behind"])
@pytest.mark.parametrize("changes", [{}, {"d_conv": 2, "dt_rank": 7}, {"d_conv": 1}])
def test_it_is_the_mixer_of_transformers(padding: str, changes: dict[str, int]) -> None:
    own = mixer(**changes)
    mask = None
    if padding != "none":
        mask = torch.ones(BATCH, POS, dtype=torch.long)
        mask[1, slice(0, 3) if padding == "before" else slice(-3, None)] = 0
    found, expected = (gradients(module, hidden(), mask) for module in (own, twin(own)))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        error = (found[name] - tensor).abs().max() / tensor.abs().max()
        assert error < 1e-5, name


def test_a_row_shorter_than_the_convolution_is_read() -> None:
    own = mixer()
    torch.testing.assert_close(own(hidden()[:, :2]), twin(own)(hidden()[:, :2]))


@pytest.mark.parametrize("width", [1, 3, 4])
def test_the_convolution_is_that_of_torch_without_its_tail(width: int) -> None:
    torch.manual_seed(0)
    own, plain = CausalConv1d(6, width).double(), nn.Conv1d(6, 6, width, groups=6).double()
    plain.load_state_dict(own.state_dict())
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(own(x), plain(nn.functional.pad(x, (width - 1, 0))))
    names = [name for name, _ in own.named_parameters()]

    def convolved(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(own, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(convolved, (x, *own.parameters()))


def test_implicit_attention_reads_it() -> None:
    own, x = mixer(), hidden()
    with torch.no_grad():
        scan = scan_of(own, x)
        alpha = hidden_attention(scan, 0, POS)
    u = rearrange(scan.x, "batch head pos 1 -> batch pos head")
    seen = einsum(alpha, u, "batch head query key, batch key head -> batch query head")
    delta = rearrange(scan.delta, "batch head pos -> batch pos head")
    y = sequential_scan(u, delta, scan.a, scan.b[:, 0], scan.c[:, 0], scan.d)
    torch.testing.assert_close(seen + scan.d * u, y, atol=1e-5, rtol=1e-4)
    assert torch.equal(scan.a, -own.A_log.exp())


def test_its_law_begins_with_small_steps() -> None:
    torch.manual_seed(0)
    own = MambaMixer(512)
    dt = nn.functional.softplus(own.dt_proj.bias)
    assert 0.001 <= dt.min() < 0.0012
    assert 0.09 < dt.max() <= 0.1 + 1e-6
    assert float(dt.detach().log10().mean()) == pytest.approx(-2, abs=0.05)
    assert own.dt_proj.weight.abs().max() <= 32**-0.5
    assert torch.equal(own.A_log[7], torch.arange(1.0, 17).log())
    assert (own.D == 1).all()
    before = own.dt_proj.weight.clone()
    reset_step_(own)
    assert not torch.equal(own.dt_proj.weight, before)


def test_seeds_run_as_one_module() -> None:
    """Every tensor is a leaf module's; answers and gradients are each mixer's own."""
    mixers = [mixer(seed) for seed in range(3)]
    holders = {name.rpartition(".")[0] for name, _ in mixers[0].named_parameters()}
    assert not any(list(mixers[0].get_submodule(holder).children()) for holder in holders)
    weights = [dict(one.named_parameters()) for one in mixers]
    students = Students(mixers[0], weights, weights[0])
    x = torch.cat([hidden() + k for k in range(3)])
    out = students(x)
    out.square().sum().backward()
    for k, one in enumerate(mixers):
        alone = one(x[3 * k : 3 * k + 3])
        torch.testing.assert_close(out[3 * k : 3 * k + 3], alone, atol=1e-5, rtol=1e-5)
        alone.square().sum().backward()
        for name, parameter in one.named_parameters():
            stacked = students.trained()[name]
            assert stacked.grad is not None
            assert parameter.grad is not None
            scale = parameter.grad.abs().max()
            assert (stacked.grad[k] - parameter.grad).abs().max() <= 1e-5 * scale, name


def test_bfloat16_and_autocast_run() -> None:
    own = mixer()
    exact = own(hidden())
    with torch.autocast("cpu", torch.bfloat16):
        cast = own(hidden())
    assert (cast.float() - exact).abs().max() < 0.05 * exact.abs().max()
    low = own.bfloat16()(hidden().bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().max() < 0.1 * exact.abs().max()
