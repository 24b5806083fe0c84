"""Where does a model come from, and where do its weights live?

Loads a bundled model, a local folder or a hub id, lets accelerate place it (`device_map`, with
offload to CPU and disk), and refuses what would go wrong in silence later: a folder that is no
checkpoint, tensors that are missing and would be freshly drawn, pickled weights, code from a
checkpoint, training weights that are offloaded. Only a name that is neither bundled nor a path is
looked up on the hub (or in its cache, under HF_HUB_OFFLINE=1).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import AlignDevicesHook
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from ablate.anatomy import FAMILIES, Anatomy, unknown_architecture
from ablate.pruned import VARIANT, pruned_class_of

ZOO = Path(__file__).parent / "zoo"

DeviceMap = str | Mapping[str, str | int | torch.device]

_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "Hybrid": "AutoModelForCausalLM",
}
"""End of an architecture's name -> transformers' class for it; any other loads without a head."""

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
_SMALL = 1 << 30  # bytes of weights below which a loading bar is noise


def bundled() -> tuple[str, ...]:
    """Names of the models that ship with the package."""
    return tuple(sorted(path.parent.name for path in ZOO.glob("*/config.json")))


def resolve(name_or_path: str | Path) -> tuple[str, bool]:
    """(what transformers is asked for, whether it is a local folder).

    Raises ValueError for a folder that does not exist or holds no checkpoint, saying what it lacks.
    """
    name = str(name_or_path)
    if name in bundled():
        return str(ZOO / name), True
    folder = Path(name).expanduser()
    if folder.is_dir():
        _require_checkpoint(folder)
        return str(folder), True
    if isinstance(name_or_path, Path) or name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise ValueError(f"no folder {name}: give a checkpoint folder, a hub id or {_known()}")
    return name, False


def load(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    attn_implementation: str | None = None,
    offload_folder: str | Path | None = None,
    anatomy: Anatomy | None = None,
) -> tuple[Any, Any]:
    """The Hugging Face model (in eval mode) and its tokenizer, or None where there is none.

    Args:
        name_or_path: a bundled model, a checkpoint folder or a hub id.
        dtype: of the weights ("float32", "bfloat16", …); None keeps the checkpoint's.
        device_map: accelerate's: None (CPU), a device, "auto", "disk" (everything) or a dict from
            module path to device, where "cpu" and "disk" offload.
        attn_implementation: "eager" to see attention patterns; None is transformers' choice.
        offload_folder: needed only for weights that the checkpoint keeps in another layout.
        anatomy: skips the check that the family is known.

    Raises ValueError (UnknownArchitecture for a family without a row) with one line that says what
    was asked, what is true and what to do.
    """
    source, local = resolve(name_or_path)
    with _one_line(name_or_path, local), _quiet(source):
        config = transformers.AutoConfig.from_pretrained(
            source, local_files_only=local, trust_remote_code=False
        )
    if anatomy is None and config.model_type not in FAMILIES:
        raise unknown_architecture(config.model_type, str(name_or_path))
    options: dict[str, Any] = {
        "dtype": _dtype(dtype),
        "device_map": _device_map(device_map),
        "attn_implementation": attn_implementation,
        "offload_folder": None if offload_folder is None else str(offload_folder),
    }
    with _one_line(name_or_path, local), _quiet(source):
        if (pruned := pruned_class_of(config)) is not None:
            options["variant"] = VARIANT
        model, info = (pruned or auto_class(config)).from_pretrained(
            source,
            config=config,
            local_files_only=local,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **{key: value for key, value in options.items() if value is not None},
        )
        tokenizer = None
        if not local or any((Path(source) / name).exists() for name in _TOKENIZERS):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source, local_files_only=local, trust_remote_code=False
            )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} of its tensors ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}), which would be drawn at random: "
            "get the whole checkpoint"
        )
    for key, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{name_or_path} has {key} as {tuple(found)} where its config.json asks for "
            f"{tuple(wanted)}: config and weights are of different models"
        )
    if isinstance(device_map, Mapping):
        _require_modules(model, device_map)
    return model.eval(), tokenizer


def require_materialised(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse to train or write offloaded parameters: raises ValueError naming the first.

    Their weights are on `meta` between forwards, so gradients are dropped and writes are lost, both
    in silence. Takes `model.named_parameters()` or a part of it.
    """
    for name, parameter in parameters:
        if parameter.device.type == "meta":
            raise ValueError(
                f"{name} is offloaded (meta), and a change to it would be lost: load the model "
                "without offload, with a device_map that keeps this parameter on a device"
            )


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Offloaded weights of `module` are fetched once and stay where it computes, while inside.

    Without it accelerate fetches them for every call. Nothing happens where none are offloaded.
    """
    offloaded = [
        (part, hook) for part in module.modules() for hook in _align_hooks(part) if hook.offload
    ]
    held: list[tuple[nn.Module, AlignDevicesHook]] = []
    try:
        for part, hook in offloaded:
            hook.pre_forward(part)
            hook.offload = False  # its calls neither fetch nor drop
            held.append((part, hook))
        yield
    finally:
        for part, hook in held:
            hook.offload = True
            hook.post_forward(part, None)


def is_offloaded(module: nn.Module) -> bool:
    """Whether any weight of `module` waits elsewhere than where it computes."""
    return any(parameter.is_meta for parameter in module.parameters())


def _align_hooks(module: nn.Module) -> tuple[AlignDevicesHook, ...]:
    """Accelerate's hooks on one module that place its own tensors."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # a SequentialHook holds several
    return tuple(hook for hook in hooks if isinstance(hook, AlignDevicesHook))


def _known() -> str:
    names = bundled()
    return f"a bundled model ({', '.join(names)})" if names else "a bundled model"


def _require_checkpoint(folder: Path) -> None:
    """ValueError unless `folder` has a config and all files of its safetensors weights."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no config.json")
    kinds = ("", f".{VARIANT}")
    if any((folder / f"model{kind}.safetensors").is_file() for kind in kinds):
        return
    indices = (folder / f"model.safetensors.index{kind}.json" for kind in kinds)
    for index in filter(Path.is_file, indices):
        shards = set(json.loads(index.read_text())["weight_map"].values())
        gone = sorted(shard for shard in shards if not (folder / shard).is_file())
        if gone:
            raise ValueError(
                f"{folder} is no whole checkpoint: {len(gone)} of {len(shards)} weight files are "
                f"missing, the first is {gone[0]}"
            )
        return
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise ValueError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code and are not "
            "read: if you trust them, convert with transformers' from_pretrained(folder, "
            "use_safetensors=False).save_pretrained(new_folder)"
        )
    raise ValueError(f"{folder} is no checkpoint: it has a config.json but no model.safetensors")


def auto_class(config: Any) -> Any:
    """The Auto class of a config's architecture; without one, what its family is mostly used as."""
    architecture = (config.architectures or [""])[0]
    if not architecture:
        masked = config.model_type in ("bert", "roberta", "esm")
        architecture = "ForMaskedLM" if masked else "ForCausalLM"
        if config.is_encoder_decoder:
            architecture = "ForConditionalGeneration"
    ends = (auto for end, auto in _AUTO.items() if architecture.endswith(end))
    return getattr(transformers, next(ends, "AutoModel"))


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str | None:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"no dtype {dtype!r}: use float32, bfloat16, float16, float64 or auto")
    return found


def _device_map(device_map: DeviceMap | None) -> Any:
    """`device_map` as accelerate takes it. ValueError for a device this machine does not have."""
    if device_map is None:
        return None
    if isinstance(device_map, str):
        if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            return device_map
        devices = {"": device_map}
    else:
        devices = dict(device_map)
    for device in devices.values():
        if device == "disk":
            continue
        try:
            wanted = torch.device(device)
        except RuntimeError:
            raise ValueError(
                f"no device {device!r}: use cpu, cuda, cuda:0, disk, auto, or a dict of these"
            ) from None
        if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device {device} asked for, but this machine has {torch.cuda.device_count()} "
                "CUDA devices: use auto or cpu"
            )
    return devices


def _require_modules(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    names |= {name for name, _ in model.named_buffers()}
    if unknown := sorted(set(device_map) - names):
        raise ValueError(
            f"the device map places {unknown[0]!r}, which {type(model).__name__} does not have: "
            f"its parts are {', '.join(name for name, _ in model.named_children())}"
        )


@contextmanager
def _one_line(name: str | Path, local: bool) -> Iterator[None]:
    """Turn what loading raises for unusable input into one ValueError line."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        hint = "" if local else f"; {name} is neither a folder nor {_known()}"
        raise ValueError(f"cannot load {name}: {reason}{hint}") from error


@contextmanager
def _quiet(source: str) -> Iterator[None]:
    """Keep transformers' load report (we raise instead) and, for small models, its bar."""
    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    folder = Path(source)
    small = sum(path.stat().st_size for path in folder.glob("*.safetensors")) < _SMALL
    transformers_logging.set_verbosity_error()
    if folder.is_dir() and small:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
