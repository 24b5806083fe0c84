"""Pickles of one tensor or of layers are read; whatever else one holds is refused and never run."""

from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ablate.pickled_rankings import read_pickle

SCORES = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


def _saved(content: Any, new: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=new)
    return stream.getvalue()


def _written(content: Any) -> dict[str, bytes]:
    """`content` in every way torch and pickle write it."""
    ways = {f"pickle{p}": pickle.dumps(content, protocol=p) for p in range(3, 6)}
    return ways | {"old": _saved(content, False), "zip": _saved(content, True)}


WAYS = tuple(_written(SCORES))


def _read(data: bytes, folder: Path) -> Any:
    path = folder / "ranking.pkl"
    path.write_bytes(data)
    return read_pickle(path)


def _refusal(data: bytes, folder: Path) -> str:
    with pytest.raises(ValueError, match=r"^ranking\.pkl is not read: ") as caught:
        _read(data, folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    return message


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "tensor",
    [
        SCORES,
        SCORES.T,  # strides
        SCORES[1:4, 2:],  # an offset into a larger storage
        SCORES.double(),
        SCORES.half(),
        SCORES.bfloat16(),
        SCORES.clone().requires_grad_(),
        SCORES[:1],
    ],
    ids=["plain", "transposed", "slice", "double", "half", "bfloat16", "grad", "one layer"],
)
def test_a_tensor_is_read_as_torch_reads_it(way: str, tensor: torch.Tensor, tmp_path: Path):
    found = _read(_written(tensor)[way], tmp_path)
    assert torch.equal(found, tensor.detach().float())
    assert not found.requires_grad


@pytest.mark.parametrize("protocol", range(6))
def test_a_list_of_layers_is_read(protocol: int, tmp_path: Path):
    layers = [63, 0, 1, 300, 2, 62]
    assert _read(pickle.dumps(layers, protocol=protocol), tmp_path) == layers


class _Runs:
    """A pickle of this calls `function(*arguments)` when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _attacks(trace: Path) -> dict[str, Any]:
    command = f"touch {trace}"
    runs = _Runs(os.system, command)
    deep: Any = runs
    for _ in range(50):
        deep = [deep]
    return {
        "system": runs,
        "eval": _Runs(builtins.eval, f"__import__('os').system('{command}')"),
        "getattr": _Runs(getattr, "", "join"),
        "in a list": [1, 2, runs],
        "deep": deep,
        "in a dict": {"scores": SCORES, "x": runs},
        "in an ordered dict": collections.OrderedDict(a=runs),
        "import": _Runs(__import__, "os"),
        "nested": _Runs(_Runs, runs),
        "torch.load": _Runs(torch.load, str(trace)),
        "bytes": _Runs(torch.storage._load_from_bytes, pickle.dumps(runs)),  # pyright: ignore
        "rebuild": _Runs(torch._utils._rebuild_tensor_v2, runs, 0, (1,), (1,), False, {}),  # pyright: ignore
    }


@pytest.mark.parametrize("attack", list(_attacks(Path("x"))))
def test_nothing_is_executed(attack: str, tmp_path: Path):
    trace = tmp_path / "trace"
    content = _attacks(trace)[attack]
    ways = [pickle.dumps(content, protocol=p) for p in range(6)]
    if attack not in ("bytes",):
        ways += [_saved(content, new) for new in (True, False)]
    for data in ways:
        _refusal(data, tmp_path)
        assert not trace.exists()
    if attack == "system":  # the trap is a trap
        pickle.loads(ways[0])
        assert trace.exists()


def test_the_name_that_was_asked_for_is_told(tmp_path: Path):
    assert "it asks for posix.system" in _refusal(pickle.dumps(_Runs(os.system, "x")), tmp_path)
    message = _refusal(b"cos\nsystem\n(S'touch /tmp/x'\ntR.", tmp_path)
    assert "it asks for os.system" in message
    assert "opcode INST" in _refusal(b"(ios\nsystem\n.", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        [],
        [1.5],
        [True],
        ["0"],
        [-1],
        [[1]],
        None,
        7,
        "text",
        {"mean": SCORES},
        [SCORES],
        (1, 2),
        np.zeros(3),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(0, 4),
        torch.nn.Parameter(SCORES),
        torch.nn.Linear(2, 2),
        torch.zeros(3, dtype=torch.complex64),
    ],
    ids=lambda c: type(c).__name__,
)
def test_other_contents_are_refused(content: Any, tmp_path: Path):
    for data in _written(content).values():
        _refusal(data, tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_cut_short_is_refused(way: str, tmp_path: Path):
    whole = _written(SCORES)[way]
    for length in range(0, len(whole), 1 + len(whole) // 150):
        _refusal(whole[:length], tmp_path)
    if way != "zip":
        _refusal(whole + b"x", tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_file_is_read_as_a_tensor_or_refused(way: str, tmp_path: Path):
    whole = bytearray(_written(SCORES[:2, :3].clone())[way])
    generator = np.random.default_rng(0)
    for place in generator.permutation(len(whole))[:400]:
        damaged = whole.copy()
        damaged[place] ^= int(generator.integers(1, 256))
        try:
            found = _read(bytes(damaged), tmp_path)
        except ValueError as error:
            assert str(error).startswith("ranking.pkl is not read: ")  # noqa: PT017
        else:
            assert isinstance(found, torch.Tensor)


@pytest.mark.parametrize("claim", [(6, (5, 7), (7, 1)), (0, (6, 7), (7, 1)), (0, (5, 7), (8, 1))])
def test_a_tensor_beyond_its_numbers_is_refused(claim: tuple[Any, ...], tmp_path: Path):
    offset, size, stride = claim

    class Liar:
        def __reduce__(self) -> Any:
            rebuild, arguments = SCORES.__reduce_ex__(2)
            claimed = (arguments[0], offset, size, stride, False, collections.OrderedDict())
            return rebuild, claimed

    assert "beyond its numbers" in _refusal(pickle.dumps(Liar()), tmp_path)


def test_zips_that_torch_does_not_write_are_refused(tmp_path: Path):
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        packed = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(_saved(SCORES, True))) as source,
            zipfile.ZipFile(packed, "w", method) as target,
        ):
            for name in source.namelist():
                content = b"big" if "byteorder" in name else source.read(name)
                target.writestr(name, content)
        words = "compressed" if method == zipfile.ZIP_DEFLATED else "big-endian"
        assert words in _refusal(packed.getvalue(), tmp_path)


def test_what_is_too_large_is_not_opened(tmp_path: Path):
    path = tmp_path / "large.pkl"
    with path.open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match="large.pkl has 64 MiB: no ranking is that large"):
        read_pickle(path)
    _refusal(b"\x80\x02" + b"N0" * 60_000 + b"N.", tmp_path)
