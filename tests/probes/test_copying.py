"""Copying against plain loops over full logits, and heads whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ablate import HookedModel
from probes.circuits import has_direct_path, output_weights, unembedding
from probes.copying import copying_scores
from tests.families import DECODERS, ENCODERS, TWO_STACKS, tiny, tokens

ATTENDING = [name for name in DECODERS if "mamba" not in name]


def distinct(count: int = 2, length: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(50, generator=generator)[:length] + 5 for _ in range(count)])


def by_loops(logits: Tensor, attended: Tensor) -> float:
    """logits[j][k] of one head and row, in plain Python."""
    shares = []
    for j in range(1, len(logits)):
        seen = [float(logits[j, k]) for k in range(j + 1)]
        mean = sum(seen) / len(seen)
        raised = [max(x - mean, 0.0) for x in seen]
        shares.append(raised[int(attended[j])] / sum(raised) if sum(raised) > 0 else 0.0)
    return 2 * sum(shares) / len(shares) - 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", ATTENDING)
def test_scores_equal_loops_over_the_models_own_output_matrices(family: str, bias: bool):
    model = HookedModel(tiny(family))
    rows = distinct()
    site = next(s for s in model.sites if has_direct_path(model, s))
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, 8, site.width, site.d_head, generator=generator)
    attended = torch.stack(
        [torch.randint(0, j + 1, (2, site.width), generator=generator) for j in range(8)], dim=-1
    )
    w_o, b_o = output_weights(model, site)
    w_u = unembedding(model, rows)
    offset = b_o if bias else None
    for chunk in (1, 2**20):
        scores = copying_scores(z, attended, w_o, w_u, bias=offset, chunk=chunk)
        out = model.model.get_submodule(site.path)
        head = model.model.get_output_embeddings()
        project = getattr(getattr(model.model.base_model, "decoder", None), "project_out", None)
        with torch.no_grad():
            for h in range(site.width):
                alone = torch.zeros(2, 8, site.width, site.d_head)
                alone[:, :, h] = z[:, :, h]
                written = out(alone.flatten(2))
                if not bias and out.bias is not None:
                    written = written - out.bias
                if project is not None:
                    written = project(written)
                logits = written @ head.weight.T
                for row in range(2):
                    expected = by_loops(logits[row][:, rows[row]], attended[row, h])
                    assert float(scores[row, h]) == pytest.approx(expected, abs=1e-4)


def test_known_heads():
    """Copies alone what it attends to: 1. Another token: −1. Nothing: −1. All evenly: −1."""
    length = 6
    z = torch.zeros(1, length, 4, length)
    attended = torch.arange(length).expand(1, 4, length)
    z[0, :, 0] = torch.eye(length)
    z[0, :, 1] = torch.eye(length).roll(-1, dims=0)  # the token before
    z[0, 0, 1] = 0
    z[0, :, 3] = 1 / 3
    w_o = torch.eye(length).expand(4, -1, -1).contiguous()
    w_u = torch.eye(length)[None]
    assert copying_scores(z, attended.clone(), w_o, w_u).tolist() == [[1, -1, -1, -1]]


def test_rounding_raises_nothing():
    noise = torch.randn(1, 20, 1, generator=torch.Generator().manual_seed(0))
    w_u = 60 * (1 + 3e-7 * noise)
    attended = torch.arange(20).expand(1, 1, 20)
    ones = torch.ones(1, 20, 1, 1)
    assert copying_scores(ones, attended, torch.ones(1, 1, 1), w_u).tolist() == [[-1]]
    assert float(copying_scores(ones, attended, torch.ones(1, 1, 1), 60 + noise)) > -1


@pytest.mark.parametrize("family", ["opt", "llama", "gemma", "bloom"])
def test_the_final_norm_adds_its_gains_and_centring(family: str):
    """Scores do not depend on scale: W_U through the norm's linear part is what norm(x) gives."""
    model = HookedModel(tiny(family))
    rows = distinct(1)
    w_u = unembedding(model, rows, final_norm=True)[0]
    stack = model.anatomy.stacks[0]
    norm = model.model.base_model.get_submodule(stack.final_norm)
    head = model.model.get_output_embeddings().weight
    x = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ((norm(x) - norm(-x)) / 2) @ head[rows[0]].T  # the bias cancels
        ours = x @ w_u.T
    assert torch.allclose(ours / ours.norm(), logits / logits.norm(), atol=1e-5)
    assert not torch.allclose(w_u, unembedding(model, rows)[0])


def test_encoders_have_no_direct_path():
    for family in (*ENCODERS, *TWO_STACKS):
        model = HookedModel(tiny(family))
        assert {s.stack for s in model.sites if has_direct_path(model, s)} <= {"decoder"}
    bare = HookedModel(tiny("opt").model)
    assert not any(has_direct_path(bare, site) for site in bare.sites)


def test_offloaded_weights_are_the_same(tmp_path):
    from accelerate import disk_offload

    whole, offloaded = HookedModel(tiny("opt-350m")), tiny("opt-350m")
    disk_offload(offloaded, tmp_path)
    model = HookedModel(offloaded)
    site = whole.sites[0]
    for ours, theirs in zip(output_weights(model, site), output_weights(whole, site), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(unembedding(model, tokens()), unembedding(whole, tokens()))
    assert all(p.is_meta for p in offloaded.model.decoder.layers.parameters())
