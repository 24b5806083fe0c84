"""What would this pickle build, if one ran it?

Nothing runs here. `pickletools.genops` names the opcodes one by one; plain values go on a stack, a
global is written down as text (`Name`), a call as its name and arguments (`Call`). Names and
opcodes that are not expected are refused, so what comes back is plain data.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from io import BytesIO
from typing import Any

STEPS = 100_000
"""Opcodes that are read of one pickle; a tensor takes about forty, a layer one."""
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBER = {"BININT", "BININT1", "BININT2", "LONG1", "INT", "LONG"}
_TEXT = {"BINUNICODE", "SHORT_BINUNICODE", "UNICODE"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Refused(ValueError):
    """What the pickle would have needed."""


@dataclass(frozen=True)
class Name:
    """A global, as text: never looked up."""

    name: str


@dataclass(frozen=True, eq=False)
class Call:
    """A call (or a persistent id, with name ""), as written: never made."""

    name: str
    arguments: Any


def parsed(stream: BytesIO, names: frozenset[str]) -> Any:
    """The value of the next pickle in `stream`, with names and calls as written.

    Raises Refused for a name that is not among `names` and an opcode that torch and lists of ints
    do not use, and what `pickletools` raises on bytes that are no pickle.
    """
    argument: Any
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if step >= STEPS:
            raise Refused("more steps than a ranking takes")
        if name in _CONSTANT:
            stack.append(_CONSTANT[name])
        elif name in _NUMBER | _TEXT | _BYTES:
            stack.append(argument)
        elif name in _TUPLES:
            stack.append(tuple(_popped(stack, marks, _TUPLES[name])))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "STOP":
            (content,) = stack
            return content
        elif name not in ("PROTO", "FRAME"):
            _apply(name, argument, stack, marks, names)
    raise Refused("a pickle without an end")


def _apply(
    name: str, argument: Any, stack: list[Any], marks: list[int], names: frozenset[str]
) -> None:
    """Opcodes that build containers, names and calls."""
    match name:
        case "EMPTY_LIST":
            stack.append([])
        case "EMPTY_DICT":
            stack.append({})
        case "EMPTY_TUPLE":
            stack.append(())
        case "TUPLE":
            stack.append(tuple(_popped(stack, marks)))
        case "LIST":
            stack.append(_popped(stack, marks))
        case "APPEND" | "APPENDS":
            items = _popped(stack, marks, 1 if name == "APPEND" else None)
            _top(stack, list).extend(items)
        case "SETITEM" | "SETITEMS":
            pairs = _popped(stack, marks, 2 if name == "SETITEM" else None)
            if not all(isinstance(key, str) for key in pairs[::2]):
                raise Refused("a dictionary with keys that are no text")
            _top(stack, dict).update(zip(pairs[::2], pairs[1::2], strict=True))
        case "GLOBAL":
            stack.append(_known(str(argument), names))
        case "STACK_GLOBAL":
            module, attribute = _popped(stack, marks, 2)
            stack.append(_known(f"{module} {attribute}" if isinstance(module, str) else "?", names))
        case "REDUCE":
            called, arguments = _popped(stack, marks, 2)
            if not isinstance(called, Name) or not isinstance(arguments, tuple):
                raise Refused("a call of something that is no name")
            stack.append(Call(called.name, arguments))
        case "BINPERSID":
            stack.append(Call("", _popped(stack, marks, 1)[0]))
        case _:
            raise Refused(f"it uses the opcode {name}")


def _popped(stack: list[Any], marks: list[int], count: int | None = None) -> list[Any]:
    """The last `count` values, off the stack; without a count, those after the last mark."""
    start = marks.pop() if count is None else len(stack) - count
    if start < (marks[-1] if marks else 0):
        raise Refused("a stack that runs empty")
    items = stack[start:]
    del stack[start:]
    return items


def _top(stack: list[Any], kind: type) -> Any:
    if not stack or not isinstance(stack[-1], kind):
        raise Refused("an item without its container")
    return stack[-1]


def _known(name: str, names: frozenset[str]) -> Name:
    if name not in names:
        shown = "".join(c for c in name if c.isprintable())[:60].replace(" ", ".")
        raise Refused(f"it asks for {shown}")
    return Name(name)
