"""Which blocks does a model have, written in one line?

A block is two branches on the residual stream, x += mixer(norm x), then x += ffn(norm x); what is
left out has no norm and no residual either. Its words, joined by "-" in any order:

    position    learned, rope             (nothing: none)
    mixer       attention, mamba          (nothing: none)
    FFN         gelu, swiglu, mamba_ffn   (nothing: none)
    norm        layer, rms                (nothing: layer)
    biases      bias                      (in the attention's projections; learned brings them)

Blocks are joined by ",", a block or a group in brackets is repeated by "*n":

    learned-attention-gelu-layer*4        four blocks of GPT-2
    mamba-rms, attention-mamba_ffn-rms*4  one Mamba, then four blocks of attention and Mamba
    (attention-rms, mamba-rms)*2          the same branches one block at a time

`PRESETS` are the twelve architectures of "Can Custom Models Learn In-Context?" (Campbell, Lojo et
al., arXiv 2411.03945) and the two hybrids of Park et al. (arXiv 2402.04248). A layer of the latter
two is a pair of their blocks, attention and then Mamba, so that a layer has two branches in every
preset but `mamba`: their 24 layers are 12 here.

Where it misleads. "learned" is the word for GPT-2's attention: it gives the model its one table of
positions and this block's attention its biases. So the paper's step from learned positions to RoPE
takes the biases away too (`rope-attention-gelu-layer-bias` would not), and its step from the GELU
MLP to SwiGLU adds half as many weights again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

MixerKind = Literal["attention", "mamba", "none"]
FFNKind = Literal["gelu", "swiglu", "mamba", "none"]
NormKind = Literal["layer", "rms"]
PositionKind = Literal["learned", "rope", "none"]

MOST = 1000
"""Blocks of a model, at most."""

_WORDS: Mapping[str, tuple[str, str]] = {
    "learned": ("position", "learned"),
    "rope": ("position", "rope"),
    "attention": ("mixer", "attention"),
    "mamba": ("mixer", "mamba"),
    "gelu": ("ffn", "gelu"),
    "swiglu": ("ffn", "swiglu"),
    "mamba_ffn": ("ffn", "mamba"),
    "layer": ("norm", "layer"),
    "rms": ("norm", "rms"),
    "bias": ("bias", "bias"),
}
"""word -> the slot of a block that it fills, and with what"""


@dataclass(frozen=True)
class Block:
    """One block of a model; its branches, what norms them, and where positions come from."""

    mixer: MixerKind = "none"
    ffn: FFNKind = "none"
    norm: NormKind = "layer"
    position: PositionKind = "none"
    bias: bool = False
    """In the projections of its attention; with learned positions always."""

    def __post_init__(self) -> None:
        attends = self.mixer == "attention"
        if self.bias and not attends:
            raise ValueError(f"bias in the block {self}: it is for projections of attention")
        object.__setattr__(self, "bias", self.bias or (attends and self.position == "learned"))
        if self.mixer == self.ffn == "none":
            raise ValueError(
                "a block without a branch: give it attention or mamba, gelu, swiglu or mamba_ffn"
            )
        if self.mixer == self.ffn == "mamba":
            raise ValueError(
                f"two Mambas in the block {self}: a block has one at most, write mamba-{self.norm}"
                f", mamba-{self.norm}"
            )
        if self.position == "rope" and self.mixer != "attention":
            raise ValueError(f"rope in the block {self}: it turns queries and keys of attention")

    def __str__(self) -> str:
        ffn = "mamba_ffn" if self.ffn == "mamba" else self.ffn
        bias = "bias" if self.bias and self.position != "learned" else "none"
        words = (self.position, self.mixer, ffn, self.norm, bias)
        return "-".join(word for word in words if word != "none")

    @property
    def has_mamba(self) -> bool:
        """Whether a Mamba stands in either slot."""
        return "mamba" in (self.mixer, self.ffn)


@dataclass(frozen=True)
class Preset:
    """Blocks that stand once in front, and the block of which there is one a layer."""

    name: str
    """What the paper calls it."""
    body: Block
    front: tuple[Block, ...] = ()

    def blocks(self, layers: int) -> tuple[Block, ...]:
        """All blocks of a model with this many layers."""
        return (*self.front, *[self.body] * layers)


def _block(text: str) -> Block:
    """The block written as `text`. ValueError for a word that is none, or a slot filled twice."""
    filled: dict[str, str] = {}
    for word in text.split("-"):
        if word not in _WORDS:
            raise ValueError(
                f"no block word {word!r} in {text!r}: words are {', '.join(_WORDS)}, joined by -;"
                f" or give one preset: {', '.join(PRESETS)}"
            )
        slot, value = _WORDS[word]
        if slot in filled:
            if {filled[slot], value} == {"mamba"} and text.split("-").count("mamba") > 1:
                raise ValueError(f"two Mambas in the block {text!r}: a block has one at most")
            raise ValueError(f"two words for the {slot} in the block {text!r}: give one")
        filled[slot] = value
    bias = filled.pop("bias", "") == "bias"
    return Block(**filled, bias=bias)  # pyright: ignore[reportArgumentType]


def parse(text: str) -> tuple[Block, ...]:
    """The blocks written as `text`; inverse of `written`.

    Raises ValueError for an unknown word, two words for one slot, and a bad repetition.
    """
    items = _items(text)
    blocks: list[Block] = []
    for item, times in items:
        inner = parse(item[1:-1]) if item.startswith("(") else (_block(item),)
        if len(blocks) + len(inner) * times > MOST:
            raise ValueError(f"more than {MOST} blocks in {text[:60]!r}: give fewer")
        blocks += inner * times
    return tuple(blocks)


def _items(text: str) -> list[tuple[str, int]]:
    """(block or bracketed group, repetitions) in order."""
    items, depth, start = [], 0, 0
    for i, letter in enumerate(f"{text},"):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth < 0:
            break
        if letter == "," and depth == 0:
            items.append(f"{text},"[start:i].strip())
            start = i + 1
    if depth:
        raise ValueError(f"brackets in the blocks {text!r} do not match: write (a, b)*2")
    found = []
    for item in items:
        match = re.fullmatch(r"(\(.*\)|[^()*]+?)\s*(?:\*\s*(\d+))?", item, re.DOTALL)
        if match is None or match[2] == "0":
            raise ValueError(
                f"{item or 'nothing'!r} in the blocks {text!r}: write a block as words joined by -,"
                " and *n for n of it, n at least 1"
            )
        found.append((match[1].strip(), int(match[2] or 1)))
    return found


def written(blocks: Iterable[Block]) -> str:
    """`blocks` in one line, equal neighbours as one: `mamba-rms,attention-mamba_ffn-rms*4`."""
    runs: list[list[str]] = []
    for block in map(str, blocks):
        if runs and runs[-1][0] == block:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ",".join(f"{run[0]}*{len(run)}" if len(run) > 1 else run[0] for run in runs)


_GPT2 = Block("attention", "gelu", "layer", "learned")
_MAMBA = Block("mamba", norm="rms")

PRESETS: Mapping[str, Preset] = {
    "gpt2": Preset("GPT-2", _GPT2),
    "gpt2-rms": Preset("GPT-2 RMS", Block("attention", "gelu", "rms", "learned")),
    "gpt2-rope": Preset("GPT-2 RoPE", Block("attention", "gelu", "layer", "rope")),
    "gpt2-swiglu": Preset("GPT-2 SwiGLU", Block("attention", "swiglu", "layer", "learned")),
    "gpt2-rms-swiglu": Preset("GPT-2 RMS SwiGLU", Block("attention", "swiglu", "rms", "learned")),
    "gpt2-rms-rope": Preset("GPT-2 RMS RoPE", Block("attention", "gelu", "rms", "rope")),
    "gpt2-rope-swiglu": Preset("GPT-2 RoPE SwiGLU", Block("attention", "swiglu", "layer", "rope")),
    "llama": Preset("Llama", Block("attention", "swiglu", "rms", "rope")),
    "llama-ropeless": Preset("Llama RoPE-less", Block("attention", "swiglu", "rms"), (_MAMBA,)),
    "llama-swigluless": Preset("Llama SwiGLU-less", Block("attention", "mamba", "rms", "rope")),
    "llama-ropeless-swigluless": Preset(
        "Llama RoPE,SwiGLU-less", Block("attention", "mamba", "rms"), (_MAMBA,)
    ),
    "mamba": Preset("Mamba", _MAMBA),
    "standard-hybrid": Preset(
        "Standard hybrid", Block("attention", "mamba", "layer", position="learned")
    ),
    "mambaformer": Preset(
        "MambaFormer",
        Block("attention", "mamba", "layer", bias=True),
        (Block("mamba", norm="layer"),),
    ),
}
"""name -> blocks: the paper's twelve in its order, then Park et al.'s two."""

THE_TWELVE: tuple[str, ...] = tuple(PRESETS)[:12]
"""The paper's table, row by row."""


def preset(name: str, layers: int) -> tuple[Block, ...]:
    """The blocks of a preset with this many layers; ValueError for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: there are {', '.join(PRESETS)}")
    if layers < 1:
        raise ValueError(f"{layers} layers of {name}: a model has at least 1")
    return PRESETS[name].blocks(layers)


def blocks_of(text: str, layers: int) -> tuple[Block, ...]:
    """The blocks a user means: a preset's name, with this many layers, or the grammar as it is."""
    return preset(text, layers) if text.strip() in PRESETS else parse(text)


Lineage = Literal["gpt2", "llama", "mamba", "park", "composed"]


def lineage(blocks: Sequence[Block]) -> Lineage:
    """Whose code the reference runs for these blocks, and with it whose initial law.

    Its GPT-2, Llama and Mamba are Hugging Face's own models; all others it composes of bare
    modules. Park et al.'s two hybrids are theirs.
    """
    kinds = {name: set(PRESETS[name].blocks(1)) for name in ("gpt2", "llama", "mamba")}
    for name, kind in kinds.items():
        if set(blocks) == kind:
            return name  # pyright: ignore[reportReturnType]
    for name in ("standard-hybrid", "mambaformer"):
        if tuple(blocks) == preset(name, max(1, len(blocks) - len(PRESETS[name].front))):
            return "park"
    return "composed"


def tokens_mix(blocks: Iterable[Block]) -> bool:
    """Whether any block has attention or a Mamba: without, no token sees another."""
    return any(block.mixer != "none" or block.has_mamba for block in blocks)


def mixed(blocks: Iterable[Block]) -> bool:
    """Whether the model has both attention and Mamba."""
    all_blocks = tuple(blocks)
    attends = any(block.mixer == "attention" for block in all_blocks)
    return attends and any(block.has_mamba for block in all_blocks)
