"""What would a user run otherwise?

    hf-loop        a plain loop: one Hugging Face forward and one hook a component (and request)
    bridge         TransformerLens' bridge, run_with_hooks on hook_z or hook_mlp_out
    hflm           lm-eval's own Hugging Face model inside the same loop, a request at a time
    hflm-batched   the same with the fastest of a few batch sizes, tried before it is timed
    reference      importance as the code of Bansal et al. 2023 has it: gradients of all weights,
                   z and its gradient kept, an example at a time
    bridge-last    run_with_cache for an induction scan, without logits but the last (`scans.py`;
                   `bridge` computes them all, as it does unasked)
    hf-attentions  Hugging Face's output_attentions for such a scan, the blocks alone

    plain, plain-stopping, every-gradient     layers retrained one at a time (`retraining.py`)

Each is written as its documentation shows it and computes what `works.py` says. All run the model
that is measured beside them, in the same dtype, with their own defaults where they have them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ablate import Head, HookedModel
from ablate.components import Component
from ablate.hooks import execution_device
from ablate.sites import Site
from experiments.bench.retraining import every_gradient, plain, plain_stopping
from experiments.bench.scans import bridge_scan, hf_scan
from experiments.bench.works import Kind, Name, Work, requests

Run = Callable[[], Float[np.ndarray, "..."]]
BATCH_SIZES = (4, 16, 64)
"""What hflm-batched tries."""


def hf_loop(model: HookedModel, work: Work) -> Run:
    """One forward of the model for every component, with one plain hook."""
    device = execution_device(model.model)

    @torch.no_grad()
    def of_rows() -> Float[np.ndarray, "one_and_component row"]:
        ids = torch.from_numpy(work.rows).to(device)
        losses = []
        for component in (None, *work.components):
            with without(model, component):
                logits = model.model(input_ids=ids, use_cache=False).logits
            losses.append(_loss(logits, ids, work.scored))
        return torch.stack(losses).numpy()

    @torch.no_grad()
    def of_requests() -> Float[np.ndarray, "one_and_component choice"]:
        encoded = requests(model, work.examples)
        nats = []
        for component in (None, *work.components):
            with without(model, component):
                for tokens, scored in encoded:
                    ids = torch.tensor([tokens], device=device)
                    logits = model.model(input_ids=ids[:, :-1], use_cache=False).logits
                    log_p = logits[:, -scored:].float().log_softmax(-1)
                    log_p = log_p.gather(-1, ids[:, -scored:, None])
                    nats.append(float(log_p.double().sum()))
        return np.reshape(nats, (-1, len(encoded)))

    return of_requests if work.kind == "choices" else of_rows


def bridge(model: HookedModel, work: Work) -> Run:
    """TransformerLens' run_with_hooks, once a component; or its run_with_cache."""
    bridged = _bridge(model)
    if work.kind == "induction":
        return bridge_scan(model, work, bridged, logits=True)
    device = execution_device(model.model)

    @torch.no_grad()
    def run() -> Float[np.ndarray, "one_and_component row"]:
        ids = torch.from_numpy(work.rows).to(device)
        losses = []
        for component in (None, *work.components):
            hooks = [] if component is None else [_bridge_hook(component)]
            logits = bridged.run_with_hooks(ids, fwd_hooks=hooks, use_cache=False)
            losses.append(_loss(logits, ids, work.scored))
        return torch.stack(losses).numpy()

    return run


def bridge_last(model: HookedModel, work: Work) -> Run:
    """Its run_with_cache without logits but the last."""
    return bridge_scan(model, work, _bridge(model), logits=False)


def hflm(model: HookedModel, work: Work) -> Run:
    """lm-eval's model as it is by default, in the loop of `hf_loop`."""
    return _harness(model, work, 1)


def hflm_batched(model: HookedModel, work: Work) -> Run:
    """lm-eval's model with the batch size that is fastest on the whole model."""
    seconds = {}
    for size in BATCH_SIZES:
        run = _harness(model, work, size, components=())
        run()
        started = time.perf_counter()
        run()
        seconds[size] = time.perf_counter() - started
    return _harness(model, work, min(seconds, key=lambda size: seconds[size]))


def reference(model: HookedModel, work: Work) -> Run:
    """Σ_t |Σ_d z·∂L/∂z| of every head, example by example, with gradients of all weights."""
    device = execution_device(model.model)
    sites = [site for site in model.sites if site.kind == "head"]
    model.model.requires_grad_(True)

    def run() -> Float[np.ndarray, "row head"]:
        ids = torch.from_numpy(work.rows).to(device)
        scores = []
        for row in ids:
            labels = row.clone()
            labels[: -work.scored] = -100
            with _kept_z(model, sites) as kept:
                out = model.model(input_ids=row[None], labels=labels[None], use_cache=False)
                out.loss.backward()
            scores.append(torch.cat([_token_scores(kept[site.name], site) for site in sites]))
            model.model.zero_grad()
        return torch.stack(scores).cpu().numpy()

    return run


PEERS: dict[str, Callable[[HookedModel, Work], Run]] = {
    "hf-loop": hf_loop,
    "bridge": bridge,
    "bridge-last": bridge_last,
    "hflm": hflm,
    "hflm-batched": hflm_batched,
    "reference": reference,
    "hf-attentions": hf_scan,
    "plain": plain,
    "plain-stopping": plain_stopping,
    "every-gradient": every_gradient,
}
AGAINST: dict[Kind | Name, tuple[str, ...]] = {
    "sweep": ("hf-loop", "bridge"),
    "choices": ("hf-loop", "hflm", "hflm-batched"),
    "importance": ("reference",),
    "induction": ("bridge", "bridge-last", "hf-attentions"),
    "reset-lm": ("plain",),
    "reset-hidden": ("plain", "plain-stopping"),
    "reset-all-train": ("every-gradient",),
    "reset-seeds": ("plain",),
    "hybrid-scan": ("hf-mamba", "hf-mamba-kept"),
    "hybrid-step": ("lean-gpt2", "hf-mamba", "hf-mamba-kept"),
    "forward": (),
}
"""Which peers do which kind of work; of resets and hybrids, which work."""


@contextmanager
def without(model: HookedModel, component: Component | None) -> Iterator[None]:
    """One plain PyTorch hook that zeroes a head's slice of z or an FFN's output."""
    if component is None:
        yield
        return
    site = next(site for site in model.sites if component in site.components)
    module = model.model.get_submodule(site.path)
    if isinstance(component, Head):
        first = component.head * site.d_head

        def zero_slice(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone()
            z[..., first : first + site.d_head] = 0
            return (z, *args[1:])

        handle = module.register_forward_pre_hook(zero_slice)
    else:
        handle = module.register_forward_hook(_zeros)
    try:
        yield
    finally:
        handle.remove()


def _zeros(_: nn.Module, args: object, out: Tensor) -> Tensor:
    return torch.zeros_like(out)


def _loss(logits: Float[Tensor, "row pos vocab"], ids: Tensor, scored: int) -> Float[Tensor, "row"]:
    """Mean −log p of each row's last `scored` tokens, on the CPU."""
    log_p = logits[:, -scored - 1 : -1].float().log_softmax(-1)
    return -log_p.gather(-1, ids[:, -scored:, None])[..., 0].mean(-1).cpu()


def _bridge(model: HookedModel) -> Any:
    """A bridge over the model itself, which is taken over in place."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    hf_model: Any = model.model
    architecture = type(hf_model).__name__
    hf_model.config.architectures = [architecture]
    hf_model.set_attn_implementation("eager")  # what a bridge runs on
    return build_bridge_from_module(
        hf_model, architecture, hf_config=hf_model.config, model_name=model.name
    )


def _bridge_hook(component: Component) -> tuple[str, Callable[..., Tensor]]:
    if isinstance(component, Head):

        def zero_head(z: Tensor, hook: object) -> Tensor:
            z[:, :, component.head] = 0
            return z

        return f"blocks.{component.layer}.attn.hook_z", zero_head
    return f"blocks.{component.layer}.hook_mlp_out", lambda out, hook: torch.zeros_like(out)


def _harness(
    model: HookedModel, work: Work, size: int, components: Sequence[Component] | None = None
) -> Run:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.api.instance import Instance
    from lm_eval.models import huggingface

    asked = work.components if components is None else components
    harness: Any = huggingface  # its constructor is untyped
    lm = harness.HFLM(
        pretrained=model.model, tokenizer=model.tokenizer, backend="causal", batch_size=size
    )
    pairs = [pair for example in work.examples for pair in example.pairs]
    instances = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]

    def run() -> Float[np.ndarray, "one_and_component choice"]:
        nats = []
        for component in (None, *asked):
            with without(model, component):
                answers = lm.loglikelihood(instances, disable_tqdm=True)
            nats.append([value for value, _ in answers])
        return np.array(nats)

    return run


@contextmanager
def _kept_z(model: HookedModel, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """z of every site, with its gradient after a backward."""
    kept: dict[str, Tensor] = {}

    def keep(site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].retain_grad()
            kept[site.name] = args[0]

        return hook

    handles = [
        model.model.get_submodule(site.path).register_forward_pre_hook(keep(site)) for site in sites
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _token_scores(z: Tensor, site: Site) -> Float[Tensor, "head"]:
    assert z.grad is not None
    heads = [
        rearrange(x.float(), "1 pos (head d_head) -> pos head d_head", head=site.width)
        for x in (z.detach(), z.grad)
    ]
    return einsum(heads[0], heads[1], "pos head d_head, pos head d_head -> pos head").abs().sum(0)
