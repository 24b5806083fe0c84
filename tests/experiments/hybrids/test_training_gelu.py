"""The faster GELU is torch's, in value and gradient."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu as reference

from experiments.hybrids.architecture.gelu import gelu


def test_it_is_torchs_gelu():
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, 1e4, 0.0])])
    x.requires_grad_()
    ours, theirs = gelu(x, training=True), reference(x, approximate="tanh")
    assert type(ours.grad_fn).__name__ != type(theirs.grad_fn).__name__  # the fast one was taken
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    weights = torch.linspace(1, 2, len(x))
    (mine,) = torch.autograd.grad(ours, x, weights)
    (torchs,) = torch.autograd.grad(theirs, x, weights)
    torch.testing.assert_close(mine, torchs, atol=3e-6, rtol=1e-5)


def test_outside_training_it_is_torchs_own_bit_by_bit():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gelu(x, training=True), reference(x, approximate="tanh"))
    x.requires_grad_()
    assert torch.equal(gelu(x, training=False), reference(x, approximate="tanh"))
