"""The selective scan by every path is the plain loop, in values and gradients."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from experiments.hybrids.architecture import scan
from experiments.hybrids.architecture.scan import by_kernel, selective_scan, sequential_scan

PATHS = ("loop", "chunked")
NAMES = ("u", "delta", "A", "B", "C", "D")


def inputs(
    batch: int = 5,
    pos: int = 11,
    channels: int = 6,
    states: int = 4,
    dtype: torch.dtype = torch.float32,
    step: float = 0.5,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch + pos)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    delta = step * torch.rand(batch, pos, channels, generator=generator, dtype=dtype)
    A = -0.1 - 3 * torch.rand(channels, states, generator=generator, dtype=dtype)
    u, D = normal(batch, pos, channels), normal(channels)
    B, C = normal(batch, pos, states), normal(batch, pos, states)
    return [t.requires_grad_() for t in (u, delta, A, B, C, D)]


def with_gradients(function, given: list[Tensor], **options: str) -> list[Tensor]:
    """y, and the gradients of a sum of it that weighs every entry."""
    y = function(*given, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), given)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pos", [1, 2, 3, 24, 82])
def test_values_and_gradients_are_those_of_the_loop(path: str, pos: int) -> None:
    given = inputs(pos=pos, channels=40, states=16)
    expected = with_gradients(sequential_scan, given)
    found = with_gradients(selective_scan, given, path=path)
    for name, one, other in zip(("y", *NAMES), found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1), name


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_exact_in_double_precision(path: str) -> None:
    given = inputs(batch=2, pos=7, channels=3, states=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, path=path), given)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "tile", [1, 2 * 11 * 6 * 4, 10**9]
)  # a row; two, so the last is alone; all
def test_tiles_change_nothing(path: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs()
    expected = with_gradients(sequential_scan, given)
    monkeypatch.setattr(scan, "TILE", {"cpu": tile})
    for one, other in zip(with_gradients(selective_scan, given, path=path), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_long_steps_forget_without_a_trace(path: str) -> None:
    """Decays far below the smallest float: what is left is the token itself."""
    given = inputs(step=1.0)
    with torch.no_grad():
        given[1].add_(1.0).mul_(200)
    expected = with_gradients(sequential_scan, given)
    for one, other in zip(with_gradients(selective_scan, given, path=path), expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_inputs_may_lie_anyhow_and_need_no_gradient() -> None:
    u, delta, A, B, C, D = inputs()
    strange = u.detach().transpose(0, 1).contiguous().transpose(0, 1)
    y = selective_scan(strange, delta, A.detach(), B[:, :, :], C.detach(), D)
    (y**2).sum().backward()
    assert delta.grad is not None
    assert B.grad is not None
    wanted = sequential_scan(u, delta, A, B, C, D)
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    (expected,) = torch.autograd.grad((wanted**2).sum(), delta)
    torch.testing.assert_close(delta.grad, expected, atol=1e-4, rtol=1e-5)


def test_it_needs_no_memory_for_states_of_all_tokens() -> None:
    given = inputs()
    y: Tensor = selective_scan(*given)
    assert y.grad_fn is not None
    kept = {tuple(t.shape) for t in y.grad_fn.saved_tensors}
    assert kept == {tuple(t.shape) for t in given}


def test_low_precision_is_scanned_in_float32() -> None:
    given = [t.detach().bfloat16() for t in inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_scan(*given)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, selective_scan(*(t.float() for t in given)).bfloat16())


def test_autocast_does_not_reach_the_backward() -> None:
    given = inputs()
    expected = with_gradients(selective_scan, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(selective_scan, given)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_the_kernel_is_handed_its_own_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def kernel(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        seen.update(u=u.shape, delta=delta.shape, A=A.shape, B=B.shape, C=C.shape, D=D.shape)
        y = sequential_scan(u.mT, delta.mT, A, B.mT, C.mT, D)
        return y.mT

    given = inputs(batch=5, pos=11, channels=6, states=4)
    torch.testing.assert_close(by_kernel(kernel, *given), sequential_scan(*given))
    assert seen["u"] == seen["delta"] == (5, 6, 11)
    assert seen["B"] == seen["C"] == (5, 4, 11)
    package = SimpleNamespace(selective_scan_fn=kernel)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", package)
    assert scan._kernel() is kernel


def test_what_a_machine_has_not_is_refused_in_a_line() -> None:
    given = inputs()
    with pytest.raises(ValueError, match=r"^scan path parallel: give one of auto, loop, chunked"):
        selective_scan(*given, path="parallel")
    with pytest.raises(
        ValueError, match=r"^scan path kernel on cpu: it needs mamba-ssm and a CUDA"
    ):
        selective_scan(*given, path="kernel")
