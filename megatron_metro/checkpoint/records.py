"""Pickles as plain records: what torch writes about tensors, read without importing or calling anything.

Python's unpickler imports what a file names and calls it. Here a global stays a name, a call or an object stays a
`Record` of a name and its arguments, and only the instructions are known that torch's writers use. A name that is not
expected ends the reading.
"""

import io
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pickletools import genops
from typing import Any

from megatron_metro.config.errors import CheckpointError, UnsafeError, first_line

MAX_STACK = 10_000  # values waiting to be collected; torch's writer collects a thousand pairs at a time


@dataclass(frozen=True, slots=True)
class Global:
    """A name a pickle refers to, such as torch.Size."""

    name: str


class Pairs(list[tuple[Any, Any]]):
    """A dictionary's keys and values, as yet unchecked."""


@dataclass(slots=True, eq=False)
class Record:
    """An object: what would be called, with what, and the items and the state it would be given."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None
    items: Pairs = field(default_factory=Pairs)  # of a dictionary with a class of its own, such as OrderedDict


PERSISTENT_ID = "persistent id"  # the name of a record for what lies outside the pickle: torch's storages


def read_records(content: bytes, path: Path, expected: Collection[str]) -> Any:
    """The value of a pickle, made of None, bool, int, float, str, tuple, list, `Pairs`, `Global` and `Record`.

    Raises UnsafeError, naming the file and the global, where the pickle refers to anything but the `expected` names,
    and CheckpointError where it is damaged or was not written by torch.
    """
    try:
        return _Machine(content).run(expected)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        refuse_foreign(content, path, expected)
        raise CheckpointError(f"{path}: is damaged ({first_line(error)[:200]}); choose another step") from error


def refuse_foreign(content: bytes, path: Path, expected: Collection[str]) -> None:
    """Raise UnsafeError, naming the file and the global, where pickles of any protocol refer to another name."""
    for name in _find_globals(content):
        if name not in expected:
            raise UnsafeError(
                f"{path}: refers to {name[:200]!a}, which loading would run; take files only from whom you trust"
            )


class _Machine:
    """Runs the instructions of a pickle on values that cannot act."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._position = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._expected: Collection[str] = ()

    def run(self, expected: Collection[str]) -> Any:
        """The value; raises ValueError, LookupError, AttributeError or TypeError at anything unusual."""
        self._expected = expected
        while (code := self._content[self._position]) != _STOP:
            self._position += 1
            if code not in _ACTIONS:
                raise ValueError(f"instruction {code:#x} at byte {self._position - 1} is none of torch's")
            _ACTIONS[code](self)
            if len(self._stack) + len(self._marks) > MAX_STACK:
                raise ValueError("more values than torch leaves uncollected")
        if self._position != len(self._content) - 1 or self._marks:
            raise ValueError("ends too early")
        (value,) = self._stack
        return value

    def take(self, count: int) -> bytes:
        """The next bytes."""
        taken = self._content[self._position : self._position + count]
        if len(taken) != count:
            raise ValueError("ends in the middle of an instruction")
        self._position += count
        return taken

    def skip(self, count: int) -> None:
        """Pass over bytes that say nothing new."""
        self.take(count)

    def number(self, size: int, *, signed: bool = False) -> int:
        """The next little-endian number."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def real_number(self) -> float:
        """The next 64-bit floating-point number."""
        (value,) = struct.unpack(">d", self.take(8))
        return float(value)

    def line(self) -> str:
        """The text up to the end of the line."""
        start, self._position = self._position, self._content.index(b"\n", self._position) + 1
        return self._content[start : self._position - 1].decode()

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def pop(self, kind: type) -> Any:
        """The value on top, which must be of this kind."""
        value = self._stack.pop()
        if type(value) is not kind:
            raise ValueError(f"found a {type(value).__name__} in place of a {kind.__name__}")
        return value

    def top(self, kind: type) -> Any:
        """The same, left where it is."""
        value = self.pop(kind)
        self.push(value)
        return value

    def mark(self) -> None:
        """Remember the height of the stack."""
        self._marks.append(len(self._stack))

    def pop_to_mark(self) -> list[Any]:
        """All values since the last mark."""
        height = self._marks.pop()
        values = self._stack[height:]
        del self._stack[height:]
        return values

    def pop_tuple(self, count: int) -> tuple[Any, ...]:
        """So many values, in order."""
        if len(self._stack) < count:
            raise IndexError("too few values")
        values = tuple(self._stack[len(self._stack) - count :])
        del self._stack[len(self._stack) - count :]
        return values

    def save(self, index: int) -> None:
        """Remember the value on top."""
        self._memo[index] = self._stack[-1]

    def memoize(self) -> None:
        """The same, under the next number."""
        self.save(len(self._memo))

    def recall(self, index: int) -> None:
        """Put a remembered value on the stack."""
        self.push(self._memo[index])

    def refer(self, name: str) -> None:
        """Put an expected name on the stack."""
        if name not in self._expected:
            raise ValueError(f"refers to {name!a:.200}")
        self.push(Global(name))

    def refer_to_stack(self) -> None:
        """A name whose two parts are on the stack."""
        name = self.pop(str)
        self.refer(f"{self.pop(str)}.{name}")

    def refer_to_lines(self) -> None:
        """A name in two lines of text."""
        module = self.line()
        self.refer(f"{module}.{self.line()}")

    def call(self) -> None:
        """A call or a new object: nothing happens but a record."""
        arguments = self.pop(tuple)
        self.push(Record(self.pop(Global).name, arguments))

    def build(self) -> None:
        """The state of an object, given once."""
        state = self._stack.pop()
        record = self.top(Record)
        if record.state is not None:
            raise ValueError("an object is given its state twice")
        record.state = state

    def set_items(self, items: list[Any]) -> None:
        """Keys and values in turn, for the dictionary on top."""
        if len(items) % 2:
            raise ValueError("a key has no value")
        is_object = bool(self._stack) and type(self._stack[-1]) is Record
        target = self.top(Record).items if is_object else self.top(Pairs)
        target.extend(zip(items[::2], items[1::2]))

    def append(self, items: list[Any]) -> None:
        """Values for the list on top."""
        self.top(list).extend(items)


_STOP = ord(".")
# The instructions of protocols 2 to 5 that torch's files consist of.
_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda machine: machine.skip(1),  # protocol
    0x95: lambda machine: machine.skip(8),  # length of a frame
    ord("N"): lambda machine: machine.push(None),
    0x88: lambda machine: machine.push(True),
    0x89: lambda machine: machine.push(False),
    ord("K"): lambda machine: machine.push(machine.number(1)),
    ord("M"): lambda machine: machine.push(machine.number(2)),
    ord("J"): lambda machine: machine.push(machine.number(4, signed=True)),
    0x8A: lambda machine: machine.push(machine.number(machine.number(1), signed=True)),
    ord("G"): lambda machine: machine.push(machine.real_number()),
    0x8C: lambda machine: machine.push(machine.take(machine.number(1)).decode()),
    ord("X"): lambda machine: machine.push(machine.take(machine.number(4)).decode()),
    ord("]"): lambda machine: machine.push([]),
    ord("}"): lambda machine: machine.push(Pairs()),
    ord(")"): lambda machine: machine.push(()),
    ord("("): _Machine.mark,
    ord("t"): lambda machine: machine.push(tuple(machine.pop_to_mark())),
    0x85: lambda machine: machine.push(machine.pop_tuple(1)),
    0x86: lambda machine: machine.push(machine.pop_tuple(2)),
    0x87: lambda machine: machine.push(machine.pop_tuple(3)),
    ord("q"): lambda machine: machine.save(machine.number(1)),
    ord("r"): lambda machine: machine.save(machine.number(4)),
    0x94: _Machine.memoize,
    ord("h"): lambda machine: machine.recall(machine.number(1)),
    ord("j"): lambda machine: machine.recall(machine.number(4)),
    ord("s"): lambda machine: machine.set_items(list(machine.pop_tuple(2))),
    ord("u"): lambda machine: machine.set_items(machine.pop_to_mark()),
    ord("a"): lambda machine: machine.append(list(machine.pop_tuple(1))),
    ord("e"): lambda machine: machine.append(machine.pop_to_mark()),
    ord("c"): _Machine.refer_to_lines,
    0x93: _Machine.refer_to_stack,
    ord("R"): _Machine.call,
    0x81: _Machine.call,  # an object made by its class
    ord("b"): _Machine.build,
    ord("Q"): lambda machine: machine.push(Record(PERSISTENT_ID, machine.pop_tuple(1))),
}


def _find_globals(content: bytes) -> Iterator[str]:
    """Every name that pickles, one after the other, refer to, as far as they can be parsed: words of a refusal."""
    stream = io.BytesIO(content)
    texts: deque[str] = deque(["?", "?"], maxlen=2)
    memo: dict[int, str] = {}
    try:
        for instruction, argument, _ in (step for _ in iter(stream.tell, len(content)) for step in genops(stream)):
            name = instruction.name
            if name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".")
            elif name == "STACK_GLOBAL":
                yield ".".join(texts)
            elif name.startswith("EXT"):
                yield f"extension {argument}"
            elif name == "MEMOIZE":
                memo[len(memo)] = texts[-1]
            elif "PUT" in name:
                memo[int(argument or 0)] = texts[-1]
            elif "GET" in name:
                texts.append(memo.get(int(argument or 0), "?"))
            elif isinstance(argument, str):
                texts.append(argument)
    except (ValueError, LookupError, struct.error, OverflowError):
        return  # what cannot be parsed names nothing
