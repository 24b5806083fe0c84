"""The grammar of blocks: what is written is what is read, and counts are the published ones."""

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.hybrids.architecture.grammar import (
    PRESETS,
    THE_TWELVE,
    Block,
    blocks_of,
    lineage,
    mixed,
    parse,
    preset,
    written,
)
from experiments.hybrids.architecture.sizes import MULTIPLE, Sizes

PUBLISHED = {
    "gpt2": (9_555_457, 438_164),
    "gpt2-rms": (9_549_057, 437_524),
    "gpt2-rope": (9_470_977, 401_044),
    "gpt2-swiglu": (12_685_825, 567_956),
    "gpt2-rms-swiglu": (12_679_425, 567_316),
    "gpt2-rms-rope": (9_464_577, 400_404),
    "gpt2-rope-swiglu": (12_601_345, 530_836),
    "llama": (12_594_945, 530_196),
    "llama-ropeless": (13_470_721, 763_284),
    "llama-swigluless": (13_664_001, 602_900),
    "llama-ropeless-swigluless": (14_539_777, 835_988),
    "mamba": (10_515_201, 471_572),
}
"""Parameters of the reference's own models, counted by running it: the standard size (12 layers,
256 wide, y of 1) and the one for retrieval (2 layers, 128 wide, y of 20)."""


def _blocks() -> st.SearchStrategy[Block]:
    def valid(parts: tuple[str, str, str, str, bool]) -> bool:
        mixer, ffn, _, position, bias = parts
        alone = mixer != "attention" and (bias or position == "rope")
        return not (alone or mixer == ffn == "none" or mixer == ffn == "mamba")

    slots = st.tuples(
        st.sampled_from(["attention", "mamba", "none"]),
        st.sampled_from(["gelu", "swiglu", "mamba", "none"]),
        st.sampled_from(["layer", "rms"]),
        st.sampled_from(["learned", "rope", "none"]),
        st.booleans(),
    )
    return slots.filter(valid).map(lambda parts: Block(*parts))  # pyright: ignore[reportArgumentType]


@given(st.lists(_blocks(), min_size=1, max_size=6))
def test_what_is_written_is_read_back(blocks):
    assert parse(written(blocks)) == tuple(blocks)


@given(_blocks(), st.randoms())
def test_words_come_in_any_order(block, random):
    words = str(block).split("-")
    random.shuffle(words)
    assert parse("-".join(words)) == (block,)


def test_the_examples_of_the_docstring():
    gpt2 = Block("attention", "gelu", "layer", "learned")
    assert parse("learned-attention-gelu-layer*4") == (gpt2,) * 4
    assert parse("gelu-attention-learned") == (gpt2,)  # LayerNorm where no norm is named
    mamba, both = Block("mamba", norm="rms"), Block("attention", "mamba", "rms")
    assert parse("mamba-rms, attention-mamba_ffn-rms*4") == (mamba, *[both] * 4)
    alone = Block("attention", norm="rms")
    assert parse("(attention-rms, mamba-rms)*2") == (alone, mamba) * 2
    assert parse("((attention-rms)*2, mamba-rms) * 2") == (alone, alone, mamba) * 2


def test_the_twelve_are_the_papers_three_factors():
    gpt2, llama = preset("gpt2", 1)[0], preset("llama", 1)[0]
    eight = {preset(name, 1)[0] for name in THE_TWELVE[:8]}
    crossed = {
        Block("attention", ffn, norm, position)
        for position in (gpt2.position, llama.position)
        for ffn in (gpt2.ffn, llama.ffn)
        for norm in (gpt2.norm, llama.norm)
    }
    assert len(eight) == 8
    assert eight == crossed
    assert len(THE_TWELVE) == 12
    assert written(preset("llama-ropeless-swigluless", 3)) == "mamba-rms,attention-mamba_ffn-rms*3"
    assert written(preset("mambaformer", 2)) == "mamba-layer,attention-mamba_ffn-layer-bias*2"
    assert written(preset("standard-hybrid", 2)) == "learned-attention-mamba_ffn-layer*2"


@pytest.mark.parametrize("name", THE_TWELVE)
def test_counts_are_the_published_ones(name):
    standard, retrieval = PUBLISHED[name]
    assert Sizes(256).parameters(preset(name, 12)) == standard
    assert Sizes(128, y_dim=20).parameters(preset(name, 2)) == retrieval


@pytest.mark.parametrize(("name", "own"), [("standard-hybrid", 4), ("mambaformer", 5)])
def test_counts_of_parks_code(name, own):
    # Counted by hand from its modules: Mamba of expansion 2, attention with biases, one LayerNorm
    # a block and one behind all; 4 blocks in alternation, a Mamba in front of them for mambaformer.
    d, inner, rank, n = 128, 256, 8, 16
    mamba = (
        d * 2 * inner  # in_proj
        + inner * 4 + inner  # convolution
        + inner * (rank + 2 * n)  # x_proj
        + rank * inner + inner  # dt_proj
        + inner * n + inner  # A_log, D
        + inner * d  # out_proj
    )  # fmt: skip
    attention = 3 * d * d + 3 * d + d * d + d
    counted = 2 * attention + (own - 2) * mamba + (own + 1) * 2 * d
    counted += 101 * d if name == "standard-hybrid" else 0
    counted += 20 * d + d + d + 1
    assert Sizes(d, expand=2, n_positions=101).parameters(preset(name, 2)) == counted


def test_whose_law_the_reference_follows():
    own = {name: lineage(preset(name, 3)) for name in PRESETS}
    assert {name for name, kind in own.items() if kind == name} == {"gpt2", "llama", "mamba"}
    assert {name for name, kind in own.items() if kind == "park"} == {
        "standard-hybrid",
        "mambaformer",
    }
    assert all(own[name] == "composed" for name in THE_TWELVE[1:7] + THE_TWELVE[8:11])
    # Neither a longer front nor another order is one of these.
    assert lineage(parse("mamba-layer*2,attention-mamba_ffn-layer-bias")) == "composed"
    assert lineage(parse("mamba-rms,rope-attention-swiglu-rms")) == "composed"


def test_mixed_is_attention_and_mamba():
    assert [name for name in PRESETS if mixed(preset(name, 2))] == [
        "llama-ropeless",
        "llama-swigluless",
        "llama-ropeless-swigluless",
        "standard-hybrid",
        "mambaformer",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpt3", "no block word 'gpt3' in 'gpt3': words are learned, rope, .* preset: gpt2, "),
        ("attention-gelu-batch", "no block word 'batch'"),
        ("attention-gelu-swiglu", "two words for the ffn"),
        ("layer", "without a branch"),
        ("mamba-mamba_ffn-rms", "two Mambas in the block mamba-mamba_ffn-rms: .* one at most"),
        ("mamba-mamba-rms", "two Mambas in the block 'mamba-mamba-rms'"),
        ("rope-mamba-rms", "rope in the block rope-mamba-rms: it turns queries"),
        ("mamba-rms-bias", "bias in the block mamba-rms-bias: it is for"),
        ("", "'nothing' in the blocks '': write a block"),
        ("mamba-rms,,mamba-rms", "'nothing' in the blocks"),
        ("mamba-rms*0", r"'mamba-rms\*0' in the blocks .* n at least 1"),
        ("mamba-rms*x", "in the blocks"),
        ("(mamba-rms*2", "brackets in the blocks"),
        ("mamba-rms)*2", "brackets in the blocks"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(text, says):
    with pytest.raises(ValueError, match=says) as error:
        parse(text)
    assert "\n" not in str(error.value)


def test_presets_and_layers():
    assert blocks_of("llama", 3) == preset("llama", 3)
    assert blocks_of("attention-rms*2", 7) == (Block("attention", norm="rms"),) * 2
    with pytest.raises(ValueError, match="no preset 'gpt4': there are gpt2, gpt2-rms"):
        preset("gpt4", 2)
    with pytest.raises(ValueError, match="0 layers of llama: a model has at least 1"):
        preset("llama", 0)


def test_widths_that_match_in_parameters():
    sizes = Sizes(128)
    target = sizes.parameters(preset("gpt2", 4))
    for name in THE_TWELVE[:9]:
        blocks = preset(name, 4)
        found = sizes.matched(blocks, target)
        assert found.d_ff % MULTIPLE == 0
        # Half a step of d_ff at most: 3 matrices of d_model in each of 4 layers.
        assert abs(found.parameters(blocks) - target) <= MULTIPLE * 3 * 128 * 4 / 2
    mamba = preset("mamba", 4)
    found = sizes.matched(mamba, target)
    others = [Sizes(128, expand=n).parameters(mamba) for n in range(1, 9)]
    assert abs(found.parameters(mamba) - target) == min(abs(other - target) for other in others)
    assert found.parameters(mamba) == others[found.expand - 1]


def test_widths_that_no_model_has():
    with pytest.raises(ValueError, match=re.escape("asked of learned-attention-gelu-layer*4")):
        Sizes(128).matched(preset("gpt2", 4), 1000)
    with pytest.raises(ValueError, match="neither FFN nor Mamba"):
        Sizes(128).matched(parse("attention-rms*2"), 10**6)


def test_the_grammar_needs_no_torch():
    code = "import sys, experiments.hybrids.architecture.sizes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
