"""What does a pickle say, read without unpickling it?

The code of Bansal et al. (2023) leaves its rankings as pickles, and to unpickle is to run what
the file says. This reader runs nothing: `ablate.opcodes` writes down what the pickle would have
built, with every call unmade. One of three such records is recognised, every other one refused:

    a list of ints                    a ranking of layers
    torch._utils._rebuild_tensor_v2   of a storage in the bytes: pickle.dump, old torch.save
    the same in a zip                 torch.save's file

Protocols from 3 on (2 spells bytes as a call). Bytes become numbers by `torch.frombuffer`, within
bounds that are checked here. A file beyond 64 MiB is no ranking and is not opened.
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablate.opcodes import Call, Name, Refused, parsed

LARGEST = 2**26
"""Bytes of the largest file that is opened."""
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}
_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP = b"PK\x03\x04"
NAMES = frozenset(
    {"torch._utils _rebuild_tensor_v2", "torch.storage _load_from_bytes"}
    | {"collections OrderedDict", *(f"torch {storage}" for storage in DTYPES)}
)
"""All that a pickled tensor names."""
DAMAGE = (ValueError, LookupError, EOFError, OSError, NotImplementedError, zipfile.BadZipFile)
"""What genops, zipfile and a stack that runs empty raise on bytes that are no such file."""


def read_pickle(path: str | Path) -> Tensor | list[int]:
    """The float tensor, or the list of ints, in a pickle; nothing in it is executed.

    Raises ValueError, in one line, for anything else.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path.name} has {size / 2**20:.0f} MiB: no ranking is that large")
    data = path.read_bytes()
    try:
        with warnings.catch_warnings():  # pickletools warns of odd escapes in names
            warnings.simplefilter("ignore", DeprecationWarning)
            return _of_zip(data) if data.startswith(_ZIP) else _of_stream(data)
    except DAMAGE as error:
        reason = str(error) if isinstance(error, Refused) else "damaged or cut short"
        raise ValueError(
            f"{path.name} is not read: {reason}. A pickled ranking holds one float tensor or a "
            "list of ints, nothing else; save others as .csv"
        ) from None


def _of_stream(data: bytes) -> Tensor | list[int]:
    stream = io.BytesIO(data)
    first = parsed(stream, NAMES)
    if _is_int(first) and first == _MAGIC:
        stream.seek(0)
        content, storages = _of_legacy(stream)
        return _tensor(content, lambda storage: storages(storage))
    if stream.read(1):
        raise Refused("bytes follow the end of the pickle")
    if isinstance(first, list):
        if not first or not all(_is_int(item) and item >= 0 for item in first):
            raise Refused("a list of something else than layers")
        return first
    return _tensor(first, _inner_storage)


def _of_zip(data: bytes) -> Tensor:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in files if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused("a zip that is no torch.save file")
        folder = pickles[0].removesuffix("data.pkl")

        def member(name: str) -> bytes:
            info = files[f"{folder}{name}"]
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise Refused("a compressed or locked zip, which torch.save does not write")
            return archive.read(info)

        if f"{folder}byteorder" in files and member("byteorder") != b"little":
            raise Refused("numbers with their bytes in big-endian order")
        content = parsed(io.BytesIO(member("data.pkl")), NAMES)
        return _tensor(
            content, lambda storage: _storage(storage, lambda key: member(f"data/{key}"))
        )


def _inner_storage(storage: Any) -> Tensor:
    """What pickle.dump writes for a storage: the bytes of an old torch.save of it."""
    match storage:
        case Call("torch.storage _load_from_bytes", (bytes(inner),)):
            content, storages = _of_legacy(io.BytesIO(inner))
            return storages(content)
    raise Refused("a tensor without its numbers")


def _of_legacy(stream: io.BytesIO) -> tuple[Any, Callable[[Any], Tensor]]:
    """The content of an old torch.save file, and how its one storage is read."""
    magic, version, system, content, keys = (parsed(stream, NAMES) for _ in range(5))
    if magic != _MAGIC or version != 1001 or not isinstance(system, dict):
        raise Refused("not a version of torch.save's old file that is known")
    if system.get("little_endian") is not True:
        raise Refused("numbers with their bytes in big-endian order")
    count = int.from_bytes(stream.read(8), "little")
    raw = stream.read()

    def numbers(key: str) -> bytes:
        if keys != [key]:
            raise Refused("several storages")
        return raw

    def storage(written: Any) -> Tensor:
        found = _storage(written, numbers)
        if len(found) != count:
            raise Refused("a storage of another length than it says")
        return found

    return content, storage


def _storage(written: Any, numbers: Callable[[str], bytes]) -> Tensor:
    """The values of a persistent id ('storage', type, key, place, count[, view])."""
    match written:
        case Call("", ("storage", Name(kind), str(key), str(), count, *view)) if (
            _is_int(count) and view in ([], [None]) and key.isalnum()
        ):
            dtype = DTYPES.get(kind.removeprefix("torch "))
            raw = numbers(key)
            if dtype is None or len(raw) != count * dtype.itemsize or not count:
                raise Refused("a storage of another length than it says")
            return torch.frombuffer(bytearray(raw), dtype=dtype)
    raise Refused("a tensor without its numbers")


def _tensor(content: Any, storage_of: Callable[[Any], Tensor]) -> Tensor:
    match content:
        case Call(
            "torch._utils _rebuild_tensor_v2",
            (storage, offset, tuple(size), tuple(stride), bool(), Call("collections OrderedDict")),
        ):
            numbers = [offset, *size, *stride]
            values = storage_of(storage)
            if not all(_is_int(number) and 0 <= number <= len(values) for number in numbers):
                raise Refused("a tensor of a shape that is none")
            last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
            if len(size) > 4 or not math.prod(size) or max(last + 1, math.prod(size)) > len(values):
                raise Refused("a tensor that reaches beyond its numbers")
            return values.as_strided(size, stride, offset).float().clone()
    raise Refused("something else")


def _is_int(value: object) -> bool:
    return type(value) is int
