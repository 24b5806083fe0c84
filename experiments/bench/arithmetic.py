r"""How many floating-point operations does a piece of work take, and how few could it take?

A product [n, i] × [i, o] is 2·n·i·o operations; norms, softmax and additions are left out, as is
usual. A decoder block costs, for S slots whose queries see P keys in all (causal: slot t sees the
t + 1 slots from the root to itself, so P = Σ_t (t + 1)),

    block(S, P) = 2 S (W_Q + W_KV + W_O + W_ffn) + 4 P d_attn          d_attn = heads · d_head

and the output head 2 R W_U for R positions that are read. The fewest for an exact leave-one-out:

    whole       blocks 0 … N−2 on all slots; in block N−1 keys and values on all slots, the rest
                at the R read positions; the output head there
    head of l   z_h W_O[h] once (2 S d_head d_model), the FFN of l, the blocks above l, the head
    FFN of l    the blocks above l, the head

with slots counted once where sequences share a beginning, and no slot behind the last one read.
For gradients of gates with frozen weights: the whole forward, and a backward that forms gradients
of activations only and ends at z of block 0. Gradients of all weights take three forwards. For
attention scores of all heads: no vocabulary, and of block N−1 only queries, keys and their scores,
each once (the product that attention needs is the one that its normaliser needs); a peer runs all
blocks whole.

Where it misleads: a decoder with one kind of block, FFN behind attention (OPT, GPT-2, Llama);
kernels may do more than is counted (a fused attention may compute the masked half as well), so a
share of the ceiling is a lower bound on how busy the machine was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ablate.anatomy import base_path, find
from ablate.components import FFN, Component, Head

if TYPE_CHECKING:
    from torch import nn

    from ablate import HookedModel

Sequences = Sequence[tuple[Sequence[int], int]]
"""(token ids, how many of the last ones are scored); the last id is only predicted."""


@dataclass(frozen=True)
class Weights:
    """Entries of the matrices that one token goes through, in one block and at the output."""

    blocks: int
    query: int
    key_value: int
    output: int
    ffn: int
    unembed: int
    d_attn: int
    """Width of z: heads · d_head."""
    d_head: int

    @classmethod
    def of(cls, model: HookedModel) -> Weights:
        """Read from the widths of a loaded model's matrices (its weights may be on `meta`).

        Raises ValueError for a model that is no stack of equal attention + FFN blocks.
        """
        (stack, *others) = model.anatomy.stacks
        hf_model: Any = model.model
        blocks = find(hf_model, base_path(hf_model, stack.path))
        layers = len(list(blocks.children())) if blocks is not None else 0
        counts = {_block(model, layer) for layer in range(layers)}
        if others or len(counts) != 1 or None in counts:
            raise ValueError(
                f"{model.name} is no stack of equal blocks of attention and FFN: its operations "
                "cannot be counted; bench a decoder such as OPT, GPT-2 or Llama"
            )
        (block,) = counts
        assert block is not None
        out = find(hf_model, base_path(hf_model, stack.project_out))
        unembed = _entries(hf_model.get_output_embeddings()) + (_entries(out) if out else 0)
        return cls(layers, *block[:4], unembed, *block[4:])

    def block(self, slots: int, pairs: int) -> int:
        """Operations of one block on `slots` slots that see `pairs` keys in all."""
        return 2 * slots * self.token + self.attention(pairs)

    def attention(self, pairs: int) -> int:
        """Scores and mixing: two products a pair."""
        return 4 * pairs * self.d_attn

    @property
    def token(self) -> int:
        """Matrix entries that one token goes through in a block."""
        return self.query + self.key_value + self.output + self.ffn


@dataclass(frozen=True)
class Slots:
    """What has to be computed for some sequences, shared beginnings once.

    Attributes:
        slots: distinct (beginning, token) pairs that a read position depends on.
        pairs: Σ over slots of the number of slots they see, themselves included.
        read: distinct slots whose next-token distribution is asked for.
        read_pairs: the same sum over the read slots.
    """

    slots: int
    pairs: int
    read: int
    read_pairs: int

    @classmethod
    def of(cls, sequences: Sequences) -> Slots:
        """Count over the prefix tree of `sequences`."""
        depth: dict[int, int] = {0: 0}  # the root is no slot
        children: dict[tuple[int, int], int] = {}
        read: set[int] = set()
        for ids, scored in sequences:
            node = 0
            for i, token in enumerate(ids[:-1]):
                below = children.setdefault((node, int(token)), len(depth))
                depth.setdefault(below, depth[node] + 1)
                node = below
                if i + 1 >= len(ids) - scored:
                    read.add(node)
        return cls(len(depth) - 1, sum(depth.values()), len(read), sum(depth[n] for n in read))


def forward(weights: Weights, rows: int, length: int, *, causal: bool = True) -> int:
    """Operations of a plain forward of `rows` full rows with logits at every position.

    `causal=False` counts the masked half of the attention too, as unfused kernels compute it.
    """
    pairs = rows * (length * (length + 1) // 2 if causal else length**2)
    body = weights.blocks * weights.block(rows * length, pairs)
    return body + 2 * rows * length * weights.unembed


def fewest_forward(weights: Weights, slots: Slots) -> int:
    """Operations of the whole model, read where it is asked for and nowhere else."""
    return _above(weights, slots, -1)


def fewest_leave_one_out(
    weights: Weights, slots: Slots, components: Iterable[Component], *, whole: bool = True
) -> int:
    """The fewest operations of an exact leave-one-out over `components` and the whole model."""
    d_model = weights.output // weights.d_attn
    total = fewest_forward(weights, slots) if whole else 0
    for component in components:
        total += _above(weights, slots, component.layer)
        if isinstance(component, Head):
            last = component.layer == weights.blocks - 1
            here = slots.read if last else slots.slots
            total += 2 * here * (weights.d_head * d_model + weights.ffn)
        else:
            assert isinstance(component, FFN)
    return total


def scans(weights: Weights, rows: int, length: int) -> tuple[int, int]:
    """(fewest operations of attention scores of all heads, the same by whole blocks)."""
    slots, pairs = rows * length, rows * (length * (length + 1) // 2)
    block = weights.block(slots, pairs)
    last = 2 * slots * (weights.query + weights.key_value // 2) + weights.attention(pairs) // 2
    return (weights.blocks - 1) * block + last, weights.blocks * block


def fewest_gradients(weights: Weights, slots: Slots) -> int:
    """The fewest operations of one forward and the gradients of all gates, weights frozen."""
    # Backward through a product with a frozen matrix costs what forward did; attention has two
    # products forward and four backward.
    back = 2 * slots.read * weights.unembed
    if weights.blocks == 1:
        back += 2 * slots.read * (weights.ffn + weights.output)
        return fewest_forward(weights, slots) + back
    rest = weights.query + weights.output + weights.ffn
    back += 2 * slots.read * rest + 2 * slots.slots * weights.key_value
    back += 2 * weights.attention(slots.read_pairs)
    middle = 2 * slots.slots * weights.token + 2 * weights.attention(slots.pairs)
    back += (weights.blocks - 2) * middle
    back += 2 * slots.slots * (weights.ffn + weights.output)
    return fewest_forward(weights, slots) + back


def _above(weights: Weights, slots: Slots, layer: int) -> int:
    """Blocks layer + 1 … N−1 and the output head, the last block at read positions only."""
    head = 2 * slots.read * weights.unembed
    full = weights.blocks - 2 - layer
    if full < 0:
        return head
    rest = weights.query + weights.output + weights.ffn
    last = 2 * slots.slots * weights.key_value + 2 * slots.read * rest
    last += weights.attention(slots.read_pairs)
    return full * weights.block(slots.slots, slots.pairs) + last + head


def _block(model: HookedModel, layer: int) -> tuple[int, int, int, int, int, int] | None:
    """(query, key_value, output, ffn, d_attn, d_head) of one block, or None if it is another."""
    sites = [site for site in model.sites if site.layer == layer]
    if [site.kind for site in sites] != ["head", "ffn"]:
        return None
    attention = sites[0]
    d_attn = attention.width * attention.d_head
    output = _entries(model.model.get_submodule(attention.path))
    d_model = output // d_attn
    key_value = 2 * d_model * attention.kv_groups * attention.d_head
    block = model.model.get_submodule(attention.block)
    if any(parameter.ndim > 2 for parameter in block.parameters()):  # experts, stacked
        return None
    query = d_model * d_attn
    ffn = _entries(block) - output - query - key_value
    return query, key_value, output, ffn, d_attn, attention.d_head


def _entries(module: nn.Module) -> int:
    """Entries of all matrices in a module."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)
