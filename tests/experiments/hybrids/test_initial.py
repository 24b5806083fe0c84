"""Initial laws: every tensor of every preset has the deviation that its law says, and no other."""

import math

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import softplus

from experiments.hybrids.architecture.grammar import PRESETS, THE_TWELVE, preset, written
from experiments.hybrids.architecture.model import Hybrid, HybridConfig

D, LAYERS = 64, 3


def _drawn(blocks: str, **changes: object) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = HybridConfig(blocks=blocks, d_model=D, heads=4, expand=2, **changes)
        return {n: p.detach() for n, p in Hybrid(config).named_parameters()}


def _std(drawn: dict[str, Tensor], end: str) -> float:
    """The deviation of all tensors whose names end so, taken together."""
    found = [p.flatten() for name, p in drawn.items() if name.endswith(end)]
    return torch.cat(found).std().item()


def _uniform(fan_in: int) -> float:
    """The deviation of torch's own start: uniform within 1/√inputs."""
    return 1 / math.sqrt(3 * fan_in)


def _delta(drawn: dict[str, Tensor]) -> Tensor:
    return torch.cat([softplus(p) for name, p in drawn.items() if name.endswith("dt_proj.bias")])


@pytest.mark.parametrize("name", PRESETS)
def test_unified_is_one_law_for_all(name):
    drawn = _drawn(written(preset(name, LAYERS)))
    scaled = 0.02 / math.sqrt(2 * len(preset(name, LAYERS)))
    for path, tensor in drawn.items():
        part, kind = path.split(".")[-2:]
        if "norm" in part:
            assert torch.equal(tensor, torch.full_like(tensor, kind == "weight"))
        elif part in ("o_proj", "down_proj", "out_proj") and kind == "weight":
            assert tensor.std() == pytest.approx(scaled, rel=0.05)
        elif part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "in_proj", "x_proj"):
            wanted = 0.02 if kind == "weight" else 0
            assert tensor.std() == pytest.approx(wanted, rel=0.05)
        elif part in ("o_proj", "down_proj"):
            assert not tensor.any()
    if "model.positions.weight" in drawn:
        assert _std(drawn, "positions.weight") == pytest.approx(0.02, rel=0.03)
    if any(block.has_mamba for block in preset(name, LAYERS)):
        _mambas_own_law(drawn)


def _mambas_own_law(drawn: dict[str, Tensor]) -> None:
    delta = _delta(drawn)
    assert 1e-3 * 0.999 <= delta.min() <= 1.3e-3
    assert 0.07 <= delta.max() <= 0.1001
    assert delta.log().mean() == pytest.approx(math.log(1e-2), abs=0.25)
    _decay(drawn)


def _decay(drawn: dict[str, Tensor]) -> None:
    for path, tensor in drawn.items():
        if path.endswith("A_log"):
            states = torch.arange(1.0, tensor.shape[1] + 1)
            torch.testing.assert_close(tensor.exp(), states.expand_as(tensor))
        if path.endswith("scan.D"):
            assert torch.equal(tensor, torch.ones_like(tensor))


def test_the_reference_s_gpt2_is_transformers_gpt2():
    drawn = _drawn(written(preset("gpt2", LAYERS)), init="reference", n_positions=282)
    theirs = hf.GPT2Model(
        hf.GPT2Config(vocab_size=1, n_embd=D, n_head=4, n_layer=LAYERS, n_positions=282)
    )
    for ours, their in (
        ("attn.q_proj.weight", "attn.c_attn.weight"),
        ("attn.o_proj.weight", "attn.c_proj.weight"),
        ("mlp.up_proj.weight", "mlp.c_fc.weight"),
        ("mlp.down_proj.weight", "mlp.c_proj.weight"),
        ("positions.weight", "wpe.weight"),
    ):
        their_std = _std(dict(theirs.named_parameters()), their)
        assert _std(drawn, ours) == pytest.approx(their_std, rel=0.03)
    assert _std(drawn, "attn.o_proj.weight") < 0.01
    biases = [p for name, p in drawn.items() if "blocks" in name and name.endswith("proj.bias")]
    assert len(biases) == 6 * LAYERS
    assert not any(bias.any() for bias in biases)


def test_the_reference_s_llama_is_transformers_llama():
    drawn = _drawn(written(preset("llama", LAYERS)), init="reference")
    for part in ("q_proj", "o_proj", "gate_proj", "down_proj"):  # Llama's writes are not scaled
        assert _std(drawn, f"{part}.weight") == pytest.approx(0.02, rel=0.03)


def test_the_reference_s_mamba_is_torch_s_start_with_mambas_law():
    drawn = _drawn(written(preset("mamba", LAYERS)), init="reference")
    _mambas_own_law(drawn)
    for part, fan_in in (("in_proj", D), ("x_proj", 2 * D), ("out_proj", 2 * D), ("conv1d", 4)):
        assert _std(drawn, f"{part}.weight") == pytest.approx(_uniform(fan_in), rel=0.04)
    assert _std(drawn, "conv1d.bias") == pytest.approx(_uniform(4), rel=0.1)


@pytest.mark.parametrize("name", THE_TWELVE[1:7] + THE_TWELVE[8:11])
def test_what_the_reference_composes_is_left_bare(name):
    drawn = _drawn(written(preset(name, LAYERS)), init="reference")
    blocks = preset(name, LAYERS)
    body = blocks[-1]
    # GPT-2's modules draw themselves without the scaled writes, all others are torch's.
    attention = 0.02 if body.position == "learned" else _uniform(D)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert _std(drawn, f"{part}.weight") == pytest.approx(attention, rel=0.04)
    if body.ffn == "gelu":
        for part in ("up_proj", "down_proj"):
            assert _std(drawn, f"mlp.{part}.weight") == pytest.approx(0.02, rel=0.04)
    if body.ffn == "swiglu":
        assert _std(drawn, "mlp.gate_proj.weight") == pytest.approx(_uniform(D), rel=0.04)
        assert _std(drawn, "mlp.down_proj.weight") == pytest.approx(_uniform(4 * D), rel=0.04)
    if any(block.has_mamba for block in blocks):
        _decay(drawn)
        rank = 4
        assert _std(drawn, "dt_proj.weight") == pytest.approx(_uniform(rank), rel=0.06)
        assert _delta(drawn).min() > 0.45  # softplus of a bias within 1/√rank: no law for Δ
        assert _delta(drawn).mean() == pytest.approx(math.log(2), rel=0.1)
        assert _std(drawn, "out_proj.weight") == pytest.approx(_uniform(2 * D), rel=0.04)
    if body.position == "learned":
        assert _std(drawn, "positions.weight") == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("name", ["standard-hybrid", "mambaformer"])
def test_parks_hybrids(name):
    drawn = _drawn(written(preset(name, LAYERS)), init="reference")
    _mambas_own_law(drawn)
    scaled = _uniform(2 * D) / math.sqrt(2 * LAYERS)
    assert _std(drawn, "out_proj.weight") == pytest.approx(scaled, rel=0.04)
    assert _std(drawn, "o_proj.weight") == pytest.approx(_uniform(D), rel=0.04)
    assert not _std(drawn, "q_proj.bias")
    if name == "standard-hybrid":
        assert _std(drawn, "positions.weight") == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("law", ["unified", "reference"])
def test_the_positions_deviation_is_a_switch_of_its_own(law):
    blocks = written(preset("gpt2-rms", LAYERS))
    for std in (1.0, 0.02, 0.3):
        drawn = _drawn(blocks, init=law, position_std=std)
        assert _std(drawn, "positions.weight") == pytest.approx(std, rel=0.03)
        as_is = _drawn(blocks, init=law)
        assert all(
            torch.equal(drawn[name], tensor)
            for name, tensor in as_is.items()
            if "blocks" in name and "norm" not in name
        )


@pytest.mark.parametrize("law", ["unified", "reference"])
def test_a_regressor_reads_and_answers_by_torch_s_start(law):
    drawn = _drawn("learned-attention-gelu-layer", init=law, x_dim=20)
    assert _std(drawn, "read_in.weight") == pytest.approx(_uniform(20), rel=0.05)
    assert drawn["lm_head.weight"].abs().max() <= 1 / math.sqrt(D)
    language = _drawn("learned-attention-gelu-layer", init=law, vocab_size=300)
    assert _std(language, "embed_tokens.weight") == pytest.approx(0.02, rel=0.03)


def test_what_is_loaded_is_not_drawn_again(tmp_path):
    model = Hybrid(HybridConfig(blocks="learned-attention-mamba_ffn-rms", d_model=D, heads=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    model.save_pretrained(tmp_path)
    again = dict(Hybrid.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(again[name], p) for name, p in model.named_parameters())
