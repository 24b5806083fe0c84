"""Hybrids compute what they say: against transformers' own GPT-2, Llama and Mamba, and by hand."""

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from experiments.hybrids.architecture.grammar import PRESETS, preset, written
from experiments.hybrids.architecture.model import Hybrid, HybridConfig, HybridModel
from tests.experiments.hybrids.test_grammar import PUBLISHED

SIZES = {"d_model": 32, "heads": 4, "x_dim": 5, "n_positions": 40, "d_state": 8, "expand": 2}


def _hybrid(blocks: str, seed: int = 0, **changes: object) -> Hybrid:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Hybrid(HybridConfig(blocks=blocks, **(SIZES | changes))).eval()
        for name, parameter in model.named_parameters():
            if "A_log" not in name:
                nn.init.normal_(parameter, std=0.3)
    return model


def _copied(ours: nn.Linear, theirs: nn.Module) -> None:
    """Our weights into nn.Linear, or transposed into GPT-2's Conv1D."""
    weight = ours.weight if isinstance(theirs, nn.Linear) else ours.weight.T
    theirs.get_parameter("weight").data.copy_(weight)
    if ours.bias is not None:
        theirs.get_parameter("bias").data.copy_(ours.bias)


def _prompts(batch: int = 3, pos: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(batch, pos, SIZES["x_dim"], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_published_number_of_parameters(name):
    standard, retrieval = PUBLISHED[name]
    for layers, d_model, y_dim, count in ((12, 256, 1, standard), (2, 128, 20, retrieval)):
        blocks = written(preset(name, layers))
        with torch.device("meta"):
            model = Hybrid(
                HybridConfig(blocks=blocks, d_model=d_model, y_dim=y_dim, init="reference")
            )
        assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("vocab_size", [0, 23])
def test_the_closed_form_counts_the_model(name, vocab_size):
    blocks = preset(name, 2)
    model = _hybrid(written(blocks), vocab_size=vocab_size, d_ff=56)
    assert sum(p.numel() for p in model.parameters()) == model.config.sizes.parameters(blocks)


def test_gpt2_is_transformers_gpt2():
    ours = _hybrid("learned-attention-gelu-layer*2")
    theirs = hf.GPT2Model(
        hf.GPT2Config(vocab_size=1, n_embd=32, n_head=4, n_layer=2, n_positions=40)
    ).eval()
    theirs.wpe.weight.data.copy_(ours.model.positions.weight)
    for block, other in zip(ours.model.blocks, theirs.h, strict=True):
        for norm, target in ((block.norm1, other.ln_1), (block.norm2, other.ln_2)):
            target.load_state_dict(norm.state_dict())
        parts = (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)
        other.attn.c_attn.weight.data.copy_(torch.cat([part.weight.T for part in parts], 1))
        other.attn.c_attn.bias.data.copy_(torch.cat([part.bias for part in parts]))
        _copied(block.attn.o_proj, other.attn.c_proj)
        _copied(block.mlp.up_proj, other.mlp.c_fc)
        _copied(block.mlp.down_proj, other.mlp.c_proj)
    theirs.ln_f.load_state_dict(ours.model.final_norm.state_dict())
    prompts = _prompts()
    embedded = ours.model.read_in(prompts)
    expected = ours.lm_head(theirs(inputs_embeds=embedded).last_hidden_state)
    torch.testing.assert_close(ours(prompts=prompts).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_is_transformers_llama(attention):
    ours = _hybrid("rope-attention-swiglu-rms*2", d_ff=48)
    ours.set_attn_implementation(attention)
    theirs = hf.LlamaModel(
        hf.LlamaConfig(
            vocab_size=2,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            rms_norm_eps=1e-6,
        )
    ).eval()
    for block, other in zip(ours.model.blocks, theirs.layers, strict=True):
        other.self_attn.load_state_dict(block.attn.state_dict())
        other.mlp.load_state_dict(block.mlp.state_dict())
        other.input_layernorm.load_state_dict(block.norm1.state_dict())
        other.post_attention_layernorm.load_state_dict(block.norm2.state_dict())
    theirs.norm.load_state_dict(ours.model.final_norm.state_dict())
    prompts = _prompts()
    embedded = ours.model.read_in(prompts)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :4] = 0  # padding before a row: Llama's mask, and places counted all the same
    found = ours.model(prompts=prompts, attention_mask=mask).last_hidden_state
    expected = theirs(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
    keep = mask.bool()
    torch.testing.assert_close(found[keep], expected[keep], rtol=1e-5, atol=1e-5)
    where = torch.arange(12)[None] + torch.tensor([[3]])
    found = ours.model(prompts=prompts, position_ids=where).last_hidden_state
    expected = theirs(inputs_embeds=embedded, position_ids=where).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_mamba_is_transformers_mamba(padded):
    ours = _hybrid("mamba-rms*2")
    theirs = hf.MambaModel(
        hf.MambaConfig(
            vocab_size=2,
            hidden_size=32,
            state_size=8,
            expand=2,
            num_hidden_layers=2,
            layer_norm_epsilon=1e-6,
            residual_in_fp32=False,
        )
    ).eval()
    for block, other in zip(ours.model.blocks, theirs.layers, strict=True):
        own = {key.replace("scan.", ""): value for key, value in block.mixer.state_dict().items()}
        other.mixer.load_state_dict(own)
        other.norm.load_state_dict(block.norm1.state_dict())
    theirs.norm_f.load_state_dict(ours.model.final_norm.state_dict())
    mask = torch.ones(3, 12, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
    found = ours.model(prompts=_prompts(), attention_mask=mask).last_hidden_state
    embedded = ours.model.read_in(_prompts())
    expected = theirs(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
    keep = mask.bool()
    torch.testing.assert_close(found[keep], expected[keep], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_no_prediction_sees_what_comes_after(name):
    model = _hybrid(written(preset(name, 2)))
    prompts, other = _prompts(), _prompts(seed=2)
    changed = torch.cat([prompts[:, :7], other[:, 7:]], 1)
    before, after = model(prompts=prompts).logits, model(prompts=changed).logits
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-5)
    assert (before[:, 7:] - after[:, 7:]).abs().amin(dim=(0, 2)).max() > 1e-3


def test_a_block_owns_its_residuals():
    model = _hybrid("attention-mamba_ffn-rms")
    block, x = model.model.blocks[0], torch.randn(2, 6, 32)
    middle = x + block.attn(block.norm1(x))[0]
    plain = middle + block.mixer(block.norm2(middle))
    assert torch.equal(block(x), plain)
    doubled = copy.deepcopy(block)
    doubled.doubled = True
    assert torch.equal(doubled(x), 2 * middle + block.mixer(block.norm2(middle)))
    # The reference adds a Mamba block's input twice: with silent branches the stream doubles.
    model = _hybrid("mamba-rms,attention-mamba_ffn-rms*2", init="reference")
    with torch.no_grad():
        for block in model.model.blocks:
            block.mixer.out_proj.weight.zero_()
            if hasattr(block, "attn"):
                block.attn.o_proj.weight.zero_()
            x, before = block(x), x
            assert torch.equal(x, 2 * before)


@pytest.mark.parametrize("name", PRESETS)
def test_the_residual_is_doubled_where_the_reference_has_it(name):
    blocks = written(preset(name, 2))
    doubled = HybridConfig(blocks=blocks, init="reference").double_residual
    assert doubled == (name.startswith("llama-") and name != "llama")
    assert not HybridConfig(blocks=blocks).double_residual
    assert HybridConfig(blocks=blocks, double_residual=True).double_residual


@pytest.mark.parametrize("name", ["gpt2", "llama-ropeless-swigluless"])
def test_dropout_is_for_training(name):
    model = _hybrid(written(preset(name, 1)), dropout=0.3)
    prompts = _prompts()
    assert torch.equal(model(prompts=prompts).logits, model(prompts=prompts).logits)
    model.train()
    assert not torch.equal(model(prompts=prompts).logits, model(prompts=prompts).logits)


def test_patterns_and_streams_on_request():
    model = _hybrid("mamba-rms,learned-attention-gelu-rms,rope-attention-rms")
    model.set_attn_implementation("eager")
    out = model(prompts=_prompts(), output_attentions=True, output_hidden_states=True)
    assert [tuple(pattern.shape) for pattern in out.attentions] == [(3, 4, 12, 12)] * 2
    for pattern in out.attentions:
        torch.testing.assert_close(pattern.sum(-1), torch.ones(3, 4, 12))
        assert not pattern.triu(1).any()
    assert len(out.hidden_states) == 4
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert not any(module._forward_hooks for module in model.modules())  # noqa: SLF001


def test_labels_give_the_mean_loss_of_the_next_token():
    model = _hybrid("mamba-rms,attention-rms", vocab_size=23)
    ids = torch.randint(0, 23, (2, 9))
    out = model(input_ids=ids, labels=ids)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="labels given to a regressor"):
        _hybrid("mamba-rms")(prompts=_prompts(), labels=ids)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"blocks": "mambo-rms"}, "no block word 'mambo'"),
        ({"y_dim": 6}, "y of 6 and x of 5 dimensions: .* must not be wider"),
        ({"heads": 5}, "5 heads in a stream of 32"),
        ({"blocks": "rope-attention-rms", "heads": 32}, "rope turns pairs, but a head is 1 wide"),
        ({"d_state": 0}, "d_state 0 of a hybrid: give at least 1"),
    ],
)
def test_sizes_that_no_model_has(changes, says):
    with pytest.raises(ValueError, match=says) as error:
        HybridConfig(**({"blocks": "attention-rms"} | SIZES | changes))
    assert "\n" not in str(error.value)


def test_inputs_that_do_not_fit():
    model = _hybrid("learned-attention-mamba_ffn-rms")
    with pytest.raises(ValueError, match="a context of 41 positions: this model has 40 learned"):
        model(prompts=torch.zeros(1, 41, 5))
    with pytest.raises(ValueError, match=r"prompts of shape \[1, 4, 6\]: .* \[batch, pos, 5\]"):
        model(prompts=torch.zeros(1, 4, 6))
    with pytest.raises(ValueError, match="given input_ids, but this model has no vocabulary"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="given no input"):
        model()
    with pytest.raises(ValueError, match="a Mamba takes in all that stands before"):
        model(prompts=torch.zeros(1, 4, 5), attention_mask=torch.zeros(1, 1, 4, 4))
    language = _hybrid("attention-rms", vocab_size=7)
    with pytest.raises(ValueError, match="given prompts, but this model reads tokens"):
        language(prompts=torch.zeros(1, 4, 5))


@pytest.mark.parametrize("vocab_size", [0, 23])
def test_saved_and_loaded_by_the_auto_classes(tmp_path, vocab_size):
    model = _hybrid("mamba-rms,learned-attention-mamba_ffn-rms", vocab_size=vocab_size)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is Hybrid
    apart = {"_name_or_path": "", "dtype": ""}
    assert again.config.to_dict() | apart == model.config.to_dict() | apart
    given = {"input_ids": torch.arange(9)[None]} if vocab_size else {"prompts": _prompts()}
    assert torch.equal(again(**given).logits, model(**given).logits)
    headless = hf.AutoModel.from_pretrained(tmp_path)
    assert type(headless) is HybridModel
    expected = model.model(**given).last_hidden_state
    assert torch.equal(headless(**given).last_hidden_state, expected)


def test_generation_without_a_cache():
    model = _hybrid("mamba-rms,learned-attention-rms", vocab_size=23)
    ids = torch.tensor([[3, 5, 7]])
    found = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)
