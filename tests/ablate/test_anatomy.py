"""Anatomy: every family's sites, counted from widths; the unlisted are refused."""

import pytest
import torch
import transformers
from torch import nn

from ablate.anatomy import (
    FAMILIES as ROWS,
)
from ablate.anatomy import (
    Anatomy,
    Attention,
    Blocks,
    UnknownArchitecture,
    anatomy_of,
    base_path,
    find,
)
from ablate.components import FFN, Head, Mixer
from ablate.hooked import HookedModel
from ablate.sites import sites
from tests.families import CONFIGS, FAMILIES, HEADS, TWO_STACKS, tiny


def test_every_row_is_tested():
    assert {tiny(family).config.model_type for family in FAMILIES} == set(ROWS)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_has_its_branches(family):
    model = tiny(family)
    found = sites(model)
    assert len({site.name for site in found}) == len(found)
    for site in found:
        assert find(model, site.path) is not None
        assert site.path.startswith(site.block + ".")
        if site.kind == "head":
            assert site.width == HEADS
            assert HEADS % site.kv_groups == 0
    for stack in anatomy_of(model).stacks:
        blocks = find(model, base_path(model, stack.path))
        assert isinstance(blocks, nn.ModuleList)
        for layer in range(len(blocks)):
            # A block mixes tokens somehow, and all but Mamba's (and our own hybrids') have an FFN.
            mixes = [s for s in found if (s.stack, s.layer) == (stack.stack, layer)]
            assert {"head", "mixer"} & {s.kind for s in mixes}
            if family != "ablate_hybrid":
                assert ("mamba" in family) != ("ffn" in {s.kind for s in mixes})
        assert find(model, base_path(model, stack.embeddings[0])) is not None
    has_head = CONFIGS[family][0] != "BertModel"
    assert (find(model, anatomy_of(model).lm_head) is not None) == has_head


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("opt", 4),
        ("gpt2", 4),
        ("llama", 2),
        ("gpt_neox", 4),
        ("falcon", 2),
        ("falcon-7b", 1),
        ("falcon-rw", 4),
    ],
)
def test_key_value_groups(family, groups):
    assert {site.kv_groups for site in sites(tiny(family)) if site.kind == "head"} == {groups}


def test_head_width_is_the_layer_s_own():
    """Qwen3's head_dim 16 of 4 heads is not d_model / heads; a layer cut to 3 heads has 3."""
    model = tiny("qwen3")
    assert {s.d_head for s in sites(model) if s.kind == "head"} == {16}
    attention = model.model.layers[1].self_attn
    attention.o_proj = nn.Linear(3 * 16, 32, bias=False)
    model.config.head_dim = 999
    assert [s.width for s in sites(model) if s.kind == "head"] == [4, 3]


def test_names_are_transformer_lens():
    assert [site.name for site in sites(tiny("opt"))][:2] == [
        "blocks.0.attn.hook_z",
        "blocks.0.hook_mlp_out",
    ]
    for family in TWO_STACKS:
        names = [site.name for site in sites(tiny(family))]
        assert names[0] == "encoder_blocks.0.attn.hook_z"
        assert "decoder_blocks.1.cross_attn.hook_z" in names
        assert "decoder_blocks.1.self_attn.hook_z" in names
    assert "blocks.0.mixer.hook_ssm_out" in [s.name for s in sites(tiny("mamba"))]


def test_components_of_a_site():
    parallel = sites(tiny("falcon_h1"))[:3]
    assert [site.components[0] for site in parallel] == [Head(0, 0), Mixer(0), FFN(0)]
    assert [len(site.components) for site in parallel] == [HEADS, 1, 1]


def test_unlisted_family_names_the_known_and_anatomy():
    model = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    with pytest.raises(UnknownArchitecture, match=r"'vit'.*gpt2.*opt.*anatomy=Anatomy\("):
        sites(model)


def test_a_row_that_finds_nothing_is_refused():
    row = Anatomy("odd", (Blocks("stack.blocks", ffn="mlp"),))
    with pytest.raises(UnknownArchitecture, match=r"stack\.blocks"):
        sites(tiny("opt"), row)


def test_wrong_head_width_is_refused():
    row = Anatomy(
        "odd", (Blocks("decoder.layers", Attention("self_attn", "self_attn.out_proj", 5)),)
    )
    with pytest.raises(UnknownArchitecture, match="no multiple of d_head 5"):
        sites(tiny("opt"), row)


@pytest.mark.parametrize(
    "family", ["opt", "gpt2", "gpt_neox", "bloom", "falcon", "falcon-7b", "falcon-rw"]
)
def test_where_the_values_live(family):
    """z of head h with uniform attention on itself is its value: position 0 sees only itself."""
    model = tiny(family)
    hooked = HookedModel(model)
    (stack,) = hooked.anatomy.stacks
    site = next(site for site in hooked.sites if site.kind == "head")
    seen = {}
    row = stack.attention
    assert row is not None
    projection = model.get_submodule(f"{site.block}.{row.qkv or row.v}")
    handle = projection.register_forward_hook(lambda m, a, out: seen.update(out=out))
    with torch.no_grad(), hooked.capture(site.name) as cache:
        model(input_ids=torch.tensor([[5, 6, 7]]))
    handle.remove()
    out = seen["out"][0, 0]
    heads, groups, d_head = site.width, site.kv_groups, site.d_head
    match row.layout:
        case "separate":
            values = out.reshape(groups, d_head)
        case "thirds":
            values = out.reshape(3, heads, d_head)[2]
        case "grouped":
            values = out.reshape(groups, heads // groups + 2, d_head)[:, -1]
    expected = values.repeat_interleave(heads // groups, dim=0)
    assert torch.allclose(cache[site.name][0, 0], expected, atol=1e-6)
