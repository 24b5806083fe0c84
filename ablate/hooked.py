"""Gate, replace and read the branches of a Hugging Face model that is not touched otherwise.

`HookedModel` holds a loaded model and puts forward hooks on it for the length of a context:

    ablated(mask)   z_h ← 0 (or a fill) for every removed head, likewise FFN and mixer branches
    gated(gates)    z_h ← g_h z_h with your own tensors g; leaves receive gradients
    gate_gradients() ∂L/∂g of a gate on every branch and token, without gate tensors
    capture(names)  keeps activations under TransformerLens' names

The model object is never modified, moved, subclassed or replaced, so `generate`, `Trainer`,
`save_pretrained` and evaluation harnesses work inside a context as outside. Contexts nest; a
context sees what those entered before it left. Where it misleads: a removed head's *bias* stays
(W_O's bias belongs to no head), while a removed FFN takes its bias along.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ablate.anatomy import Anatomy, anatomy_of, base_path, find
from ablate.components import FFN, Component, Head, KVGroup, Mixer
from ablate.gates import edit_of, place_of, watched_gate
from ablate.hooks import Edit, Place, execution_device, hooked, is_hooked
from ablate.masks import Mask, require_mask
from ablate.placement import DeviceMap, load
from ablate.sites import Site, block_name, sites

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from ablate.fills import Fill


class HookedModel:
    """A loaded Hugging Face model and the places where it can be cut.

    >>> model = HookedModel.from_pretrained("gpt2")
    >>> with model.ablated(Mask([Head(3, 1), FFN(5)])):
    ...     logits = model.model(**batch).logits

    Raises UnknownArchitecture for a family without a row in `ablate.anatomy`.
    """

    def __init__(
        self, hf_model: nn.Module, tokenizer: Any = None, *, anatomy: Anatomy | None = None
    ) -> None:
        self.model = hf_model
        self.tokenizer = tokenizer
        self.anatomy = anatomy or anatomy_of(hf_model)
        self.sites: tuple[Site, ...] = sites(hf_model, self.anatomy)
        """Every gateable place, in the model's order."""
        self.components: tuple[Component, ...] = tuple(c for s in self.sites for c in s.components)
        """Every head, FFN and mixer: the gates of `sites`, in order."""
        self.heads: tuple[Head, ...] = tuple(c for c in self.components if isinstance(c, Head))
        self.kv_groups: tuple[KVGroup, ...] = tuple(g for s in self.sites for g in s.groups)
        """The key/value groups of `heads`; of one head each where keys are not shared."""
        self.measured: dict[Any, tuple[int, int]] = {}
        """What rows were measured to allocate (`ablate.budget`): kind of call -> length, bytes."""
        self._points = {place.name: (place, site) for place, site in self._capture_points()}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device_map: DeviceMap | None = None,
        attn_implementation: str | None = None,
        offload_folder: str | Path | None = None,
        anatomy: Anatomy | None = None,
    ) -> HookedModel:
        """Load a bundled model, a folder or a hub id, placed by accelerate, with its tokenizer.

        The arguments are those of `ablate.placement.load`. Raises ValueError where it cannot.
        """
        model, tokenizer = load(
            name_or_path,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            offload_folder=offload_folder,
            anatomy=anatomy,
        )
        return cls(model, tokenizer, anatomy=anatomy)

    @property
    def name(self) -> str:
        """What the model was loaded from, or its family."""
        config = getattr(self.model, "config", None)
        return Path(getattr(config, "_name_or_path", "")).name or self.anatomy.family

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Everything `capture` can keep."""
        return tuple(self._points)

    def expand(self, mask: Mask) -> Mask:
        """`mask` with every key/value group replaced by its query heads.

        Raises ValueError for a component this model does not have, with the valid range.
        """
        expanded: list[Component] = []
        for component in require_mask(mask):
            site = self._site_of(component)
            if isinstance(component, KVGroup):
                share = site.width // site.kv_groups
                first = component.group * share
                expanded += site.components[first : first + share]
            else:
                expanded.append(component)
        return Mask(expanded)

    @contextmanager
    def ablated(
        self, mask: Mask, fill: Literal["zero"] | Fill = "zero"
    ) -> Iterator[dict[str, Tensor]]:
        """Remove the components of `mask` in every forward inside.

        With fill="zero" this equals zeroing the heads' columns of W_O (the FFN's last weight and
        bias) exactly; another fill stands in for the removed activations. Sites without a removed
        component get no hook at all. Yields the gates (1 keeps, 0 removes) of the touched sites,
        [head] or []; change them in place to change the mask, also under torch.compile.

        Raises ValueError for a component this model does not have, RuntimeError on exit if a
        touched site did not fire in every forward.
        """
        if isinstance(fill, str) and fill != "zero":
            raise ValueError(
                f"no fill {fill!r}: use 'zero', or collect one with mean_fill or resample_fill"
            )
        removed = self.expand(mask)
        gates: dict[str, Tensor] = {}
        edits: dict[Place, Edit] = {}
        for site in self.sites:
            keep = [float(component not in removed) for component in site.components]
            if all(keep):
                continue
            device = execution_device(self.model.get_submodule(site.path))
            gate = torch.tensor(keep if site.kind == "head" else keep[0], device=device)
            gates[site.name] = gate
            stand_in = None if isinstance(fill, str) else fill.at(site, device)
            edits[place_of(site)] = edit_of(site, gate, stand_in)
        with hooked(self.model, edits):
            yield gates

    @contextmanager
    def gated(self, gates: Mapping[str, Tensor]) -> Iterator[None]:
        """Multiply branches by `gates` in every forward inside.

        Args:
            gates: site name -> multiplier, broadcastable to [batch, pos, head] at a z and to
                [batch, pos] at an FFN or ssm_out. 1 keeps. A leaf that requires a gradient gets
                one; the values may change in place between forwards.

        Raises ValueError for an unknown site or a gate that cannot broadcast.
        """
        by_name = {site.name: site for site in self.sites}
        edits: dict[Place, Edit] = {}
        for name, gate in gates.items():
            if name not in by_name:
                raise ValueError(_unknown_name(name, by_name, self.name))
            if not isinstance(gate, Tensor):
                raise ValueError(
                    f"the gate of {name} is {gate!r}: give a tensor, torch.tensor(0.5)"
                )
            site = by_name[name]
            axes = "[batch, pos, head]" if site.kind == "head" else "[batch, pos]"
            too_many = gate.ndim > (3 if site.kind == "head" else 2)
            if too_many or (
                site.kind == "head" and gate.ndim and gate.shape[-1] not in (1, site.width)
            ):
                raise ValueError(
                    f"a gate of shape {tuple(gate.shape)} at {name}, which has {site.width} "
                    f"head(s): give one that broadcasts to {axes}"
                )
            edits[place_of(site)] = edit_of(site, gate)
        with hooked(self.model, edits):
            yield

    def unit_gates(
        self, shape: tuple[int, ...] = (), requires_grad: bool = True
    ) -> dict[str, Tensor]:
        """Gates that keep everything: site name -> ones [*shape, head] at a z, [*shape] elsewhere.

        `shape` is () for one gate per component or (batch, pos) for one per token. Leaves on the
        device where their site computes, in fp32 (fp64 for an fp64 model).
        """
        gates = {}
        for site in self.sites:
            module = self.model.get_submodule(site.path)
            dtype = torch.promote_types(next(module.parameters()).dtype, torch.float32)
            size = (*shape, site.width) if site.kind == "head" else shape
            gates[site.name] = torch.ones(
                size, device=execution_device(module), dtype=dtype, requires_grad=requires_grad
            )
        return gates

    @contextmanager
    def gate_gradients(
        self, at: Mapping[str, float] | None = None
    ) -> Iterator[dict[str, list[Tensor]]]:
        """What a gate on every branch and token would get from a backward inside.

        Args:
            at: site name -> value at which the gates of this site stand, one for all its heads;
                sites not named are left alone. None: all sites, at 1.

        Yields site name -> [∂L/∂g, [batch, pos, width], one a forward so far], filled by the
        backward: ∂L/∂g = Σ_d z·∂L/∂(g·z). Batches may differ in shape. The gates come before the
        edits of contexts entered earlier: a component removed there has no gradient.

        Raises ValueError for an unknown site.
        """
        gates = {site.name: 1.0 for site in self.sites} if at is None else at
        by_name = {site.name: site for site in self.sites}
        found: dict[str, list[Tensor]] = {name: [] for name in gates}

        def watch(name: str) -> Edit:
            return lambda x: watched_gate(by_name[name], x, gates[name], found[name])

        for name in gates:
            if name not in by_name:
                raise ValueError(_unknown_name(name, by_name, self.name))
        with hooked(self.model, {place_of(by_name[n]): watch(n) for n in gates}, first=True):
            yield found

    @contextmanager
    def capture(self, names: str | Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Keep the activations called `names` from the last forward inside.

        Yields a dict that each forward refills: z is [batch, pos, head, d_head], ssm_out
        [batch, pos, d_ssm], mlp_out, attn_out (W_O z + b_O), resid_pre and resid_post
        [batch, pos, d_model], pattern [batch, head, query, key]. Tensors stay in the autograd
        graph: under grad mode `torch.autograd.grad(loss, cache[name])` works.

        Raises ValueError for a name this model does not have, and for a pattern under an attention
        implementation that never forms it (sdpa, flash), with the remedy.
        """
        wanted = (names,) if isinstance(names, str) else tuple(names)
        cache: dict[str, Tensor] = {}
        edits: dict[Place, Edit] = {}
        for name in wanted:
            if name not in self._points:
                raise ValueError(_unknown_name(name, self._points, self.name))
            place, site = self._points[name]
            if name.endswith("hook_pattern"):
                self._require_eager(name, place)
            edits[place] = _keep(cache, place, site)
        with hooked(self.model, edits):
            yield cache

    def to_bridge(self) -> TransformerBridge:
        """A TransformerLens bridge over a deep copy of the model, under eager attention.

        For interactive work: it holds a second copy of all weights and slows small models down.
        Raises ValueError for an offloaded model, whose weights cannot be copied, inside a
        context, whose hooks would be copied for good, and for a class TransformerLens has not.
        """
        from transformer_lens.factories.architecture_adapter_factory import (
            SUPPORTED_ARCHITECTURES,
        )
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        if any(p.device.type == "meta" for p in self.model.parameters()):
            raise ValueError(
                f"{self.name} has offloaded weights, which a bridge cannot copy: "
                "load it without offload, or use capture() and ablated(), which work offloaded"
            )
        if is_hooked(self.model):
            raise ValueError(
                f"a bridge asked for while {self.name} is ablated, gated or captured: leave the "
                "context first, and hook the bridge itself"
            )
        if type(self.model).__name__ not in SUPPORTED_ARCHITECTURES:
            raise ValueError(
                f"a bridge of {self.name} asked for: TransformerLens has none for"
                f" {type(self.model).__name__}; use capture() and ablated(), which need none"
            )
        twin: Any = copy.deepcopy(self.model)
        twin.set_attn_implementation("eager")
        architecture = type(twin).__name__
        twin.config.architectures = [architecture]
        return build_bridge_from_module(
            twin,
            architecture,
            hf_config=twin.config,
            tokenizer=self.tokenizer,
            model_name=self.name,
        )

    def _site_of(self, component: Component) -> Site:
        """The site whose gates switch `component`, or ValueError with the valid range."""
        kind: dict[type, str] = {Head: "head", KVGroup: "head", FFN: "ffn", Mixer: "mixer"}
        alike = [
            site
            for site in self.sites
            if site.kind == kind[type(component)] and site.stack == component.stack
        ]
        for site in alike:
            if site.layer == component.layer:
                match component:
                    case Head() if component.head >= site.width:
                        break
                    case KVGroup() if component.group >= site.kv_groups:
                        break
                return site
        raise ValueError(self._no_such(component, alike))

    def _no_such(self, component: Component, alike: list[Site]) -> str:
        """`no head L12H0 in gpt2: layers run 0–11, heads 0–11`."""
        words = {Head: "head", KVGroup: "key/value group", FFN: "FFN", Mixer: "mixer"}
        asked = f"no {words[type(component)]} {component} in {self.name}: "
        if not alike:
            kinds = {(s.kind, s.stack) for s in self.sites}
            there = sorted(f"{stack}.{kind}".lstrip(".") for kind, stack in kinds)
            return f"{asked}it has {', '.join(there)} sites only"
        layers = [site.layer for site in alike]
        if layers == list(range(len(layers))):
            asked += f"layers run 0–{layers[-1]}"
        else:
            asked += f"layers that have one are {', '.join(map(str, layers))}"
        if isinstance(component, Head | KVGroup):
            here = [s for s in alike if s.layer == component.layer] or alike
            last = max(s.width if isinstance(component, Head) else s.kv_groups for s in here) - 1
            asked += f", {'heads' if isinstance(component, Head) else 'groups'} 0–{last}"
        return asked

    def _capture_points(self) -> Iterator[tuple[Place, Site | None]]:
        """Every place `capture` knows, with the site that splits it into heads."""
        for stack in self.anatomy.stacks:
            path = base_path(self.model, stack.path)
            blocks = find(self.model, path)
            for layer, (key, _) in enumerate(blocks.named_children() if blocks else ()):
                block, name = f"{path}.{key}", block_name(stack.stack, layer)
                yield Place(f"{name}.hook_resid_pre", block, "input", block), None
                yield Place(f"{name}.hook_resid_post", block, "output", block), None
        for site in self.sites:
            yield place_of(site), site
            if site.row is not None:
                stem = site.name.removesuffix(".hook_z")
                pattern = Place(
                    f"{stem}.hook_pattern",
                    site.attention,
                    "output",
                    site.block,
                    element=site.row.pattern,
                    per_token=False,
                )
                yield pattern, None
                # As TransformerLens: blocks.3.hook_attn_out, but decoder_blocks.3.self_attn.…
                stem = stem.removesuffix(".attn")
                yield Place(f"{stem}.hook_attn_out", site.path, "output", site.block), None

    def _require_eager(self, name: str, place: Place) -> None:
        config = getattr(self.model.get_submodule(place.path), "config", None)
        config = config or getattr(self.model, "config", None)
        attention = getattr(config, "_attn_implementation", "eager")
        if attention != "eager":
            raise ValueError(
                f"{name} asked for under attn_implementation={attention!r}, which never forms the "
                "pattern: load with attn_implementation='eager' or call "
                "model.model.set_attn_implementation('eager')"
            )


def _keep(cache: dict[str, Tensor], place: Place, site: Site | None) -> Edit:
    """Store what passes; hand on a tensor that depends on the stored one, so that it is in the
    graph, and that is a copy where the model may write into it (Falcon adds into its mlp_out)."""

    def edit(x: Tensor) -> Tensor | None:
        if site is not None and site.kind == "head":
            z = rearrange(x, "batch pos (head d_head) -> batch pos head d_head", head=site.width)
            cache[place.name] = z
            return rearrange(z, "batch pos head d_head -> batch pos (head d_head)")
        cache[place.name] = x
        return x.clone() if place.where == "output" and place.per_token else x

    return edit


def _unknown_name(name: str, known: Iterable[str], model: str) -> str:
    names = list(known)
    close = get_close_matches(name, names, n=3) or names[:3]
    return f"no hook point {name} in {model}: nearest are {', '.join(close)}"
