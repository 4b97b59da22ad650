"""Reads an optimised HLO program: what it moves, computes and sends, with every turn of its loops.

`compiled.cost_analysis()` counts a loop's body once and says nothing for some devices.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|branch_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{([\d,]*)\}|ensions":\[([\d,"]*)\])')
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_CALLS = ("while", "call", "conditional", "async")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
         "partition-id", "replica-id", "opt-barrier")  # fmt: skip
_SLICES = ("slice", "dynamic-slice", "gather")
Counts = collections.Counter


class _Array(NamedTuple):
    shape: tuple[int, ...]
    bytes: float
    place: str


class _Instruction(NamedTuple):
    name: str
    arrays: list[_Array]  # of its result
    opcode: str
    operands: list[str]
    attributes: str

    def called(self) -> list[str]:
        names = " ".join(a or b for a, b in _CALLED.findall(self.attributes))
        return re.findall(r"[\w.\-]+", names)


def read(text: str) -> Counts:
    """Counts of one execution on one device, from `compiled.as_text()`.

    Returns:
      bytes: of every kernel's operands and results in the main memory. Of what it only slices the
        slice counts, of what it updates in place the update.
      on_chip_bytes: the same in a TPU's own memories.
      flops: of matrix products and convolutions, two for a multiply-add. Padding counts as if it
        was multiplied, but for what makes an input as wide as its kernel; the holes of a strided
        convolution's gradient do not.
      kernels, convolutions, custom_calls: how often one runs.
      unknown_loops: loops whose number of turns is not known; they count once.
      all-reduce, ...: bytes of the collectives' operands.
      collectives: how often one runs.
    """
    program, entry = {}, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            entry = match[2] if match[1] else entry
            lines = program[match[2]] = {}
        elif match := _INSTRUCTION.match(line):
            lines[match[2]] = lines["ROOT"] = _instruction(match[2], match[3])
            if not match[1]:
                del lines["ROOT"]

    @functools.cache
    def run(name: str) -> Counts:
        total, lines = Counts(), program[name]
        for key, line in lines.items():
            kind = line.opcode.removesuffix("-start")
            if key == "ROOT" or kind in _FREE or kind.endswith("-done"):
                continue
            if kind in _CALLS:
                turns = _turns(program, line, lines) if kind == "while" else 1
                total["unknown_loops"] += turns is None
                for called in line.called():
                    total.update({what: (turns or 1) * n for what, n in run(called).items()})
                continue
            total.update(_arithmetic(program, line, lines) | {"kernels": 1})
            total.update(_traffic(program, line, lines))
            if kind in COLLECTIVES:
                total[kind] += sum(a.bytes for name in line.operands for a in lines[name].arrays)
                total["collectives"] += 1
        return total

    return +run(entry)


def _instruction(name: str, text: str) -> _Instruction:
    def end(start):  # where the parenthesis that opens there closes
        depth = 0
        for place in range(start, len(text)):
            depth += (text[place] == "(") - (text[place] == ")")
            if depth == 0:
                return place
        raise ValueError(f"no instruction: {text[:200]}")

    split = end(0) + 1 if text.startswith("(") else text.index(" ")
    start = text.index("(", split)
    opcode, inside = text[split:start].strip(), text[start + 1 : end(start)]
    is_leaf = opcode in ("parameter", "constant")  # inside are a place and a value
    operands = [inside] if is_leaf else re.findall(r"%([\w.\-]+)", inside)
    arrays = []
    for kind, bits, sizes, layout in _ARRAY.findall(text[:split]):
        shape = tuple(int(size.strip("<=")) for size in sizes.split(",") if size)
        size = math.prod(shape) * (1 if kind == "pred" else int(bits) / 8)
        arrays.append(_Array(shape, size, "on_chip_bytes" if "S(" in layout else "bytes"))
    return _Instruction(name, arrays, opcode, operands, text[end(start) + 1 :])


def _turns(program, line: _Instruction, lines) -> int | None:
    """How often a loop's body runs, from what the compiler says or `counter < constant`."""
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', line.attributes):
        return int(match[1])
    condition = program[re.search(r"condition=%?([\w.\-]+)", line.attributes)[1]]
    test = condition["ROOT"]
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = (condition[name] for name in test.operands)
    place = re.search(r"index=(\d+)", counter.attributes)
    first = lines[line.operands[0]]
    while place and first.opcode in ("tuple", "copy"):
        first = lines[first.operands[int(place[1]) if first.opcode == "tuple" else 0]]
    if not place or {first.opcode, limit.opcode} != {"constant"}:
        return None
    return int(limit.operands[0]) - int(first.operands[0])


def _arithmetic(program, line: _Instruction, lines) -> Counts:
    """FLOPs, convolutions and custom calls of a kernel, whatever is fused into it."""
    total, attributes, target = Counts(), line.attributes, ""
    if line.opcode == "fusion":
        inner = program[line.called()[0]]
        for key, each in inner.items():
            total.update(_arithmetic(program, each, inner) if key != "ROOT" else {})
    elif line.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', attributes)[1]
        total["custom_calls"] = 1
    if line.opcode == "convolution" or target.startswith("__cudnn$conv"):
        output, kernel = line.arrays[0].shape, lines[line.operands[1]].arrays[0].shape
        if target.endswith("BackwardInput"):  # its labels stay those of the forward pass
            output = lines[line.operands[0]].arrays[0].shape
        elif target.endswith("BackwardFilter"):
            output, kernel = kernel, output
        left, right = re.search(r"dim_labels=(\w+)_(\w+)->", attributes).groups()
        image, taps = lines[line.operands[0]].arrays[0].shape, kernel[right.index("i")]
        pads = re.search(r"pad=([\d_x-]+)", attributes)
        pads = pads[1].split("x") if pads else []
        for axis in filter(str.isdigit, right):
            size = kernel[right.index(axis)]
            pad = int(pads[int(axis)].split("_")[0]) if pads else 0
            # A TPU's compiler may swap image and kernel; what slides then is mostly on padding.
            taps *= min(size, image[left.index(axis)]) if pad > size // 2 else size
        holes = re.search(r"lhs_dilate=([\dx]+)", attributes)
        holes = math.prod(map(int, holes[1].split("x"))) if holes else 1
        total["flops"] = 2 * math.prod(output) * taps // holes
        total["convolutions"] = int("window={size" in attributes)
    elif line.opcode == "dot" or target.startswith("__cublas$"):
        axes = re.findall(r"\d+", "".join(_CONTRACTED.search(attributes).groups("")))
        shape = lines[line.operands[0]].arrays[0].shape
        contracted = math.prod(shape[int(axis)] for axis in axes)
        total["flops"] = 2 * math.prod(line.arrays[0].shape) * contracted
    return total


def _size(arrays: list[_Array]) -> Counts:
    total = Counts()
    for array in arrays:
        total[array.place] += array.bytes
    return total


def _traffic(program, line: _Instruction, lines) -> Counts:
    """Bytes that a kernel reads and writes."""
    kind, operands = line.opcode, [lines[name].arrays for name in line.operands]
    if kind == "slice-start":  # it names the operand, too
        operand, part = line.arrays[:2]
        return _size([part, part._replace(place=operand.place)])
    if kind in _SLICES:
        return _size(line.arrays + _there(line.arrays, operands[0]))
    if kind == "dynamic-update-slice":
        return _size(operands[1] + _there(operands[1], line.arrays))
    if kind in ("copy-start", "all-gather-start", "collective-permute-start"):
        return _size(line.arrays)  # it names the operand, too
    if kind != "fusion":
        return _size(line.arrays + sum(operands, []))
    inner, total = program[line.called()[0]], Counts()
    for key, each in inner.items():  # what is read
        if each.opcode != "parameter" or key == "ROOT":
            continue
        parts, operand = _parts(program, key, inner), operands[int(each.operands[0])]
        total.update(_size(operand if parts is None else _there(parts, operand)))
    root = inner["ROOT"]
    written = [root] * len(line.arrays)  # more than one of a reduction of several arrays
    if root.opcode == "tuple":
        written = [inner[name] for name in root.operands]
    for each, array in zip(written, line.arrays, strict=True):
        while each.opcode == "bitcast":
            each = inner[each.operands[0]]
        is_update = each.opcode == "dynamic-update-slice"
        update = [array] if not is_update else _there(inner[each.operands[1]].arrays, [array])
        total.update(_size(update))
    return total


def _there(parts: list[_Array], whole: list[_Array]) -> list[_Array]:
    """Parts of an array, which lie where it lies."""
    return [part._replace(place=whole[0].place) for part in parts]


def _parts(program, name: str, lines) -> list[_Array] | None:
    """The slices that are read of a value, also by fusions inside of fusions; None: all of it."""
    parts = []
    for called, use in _uses(name, lines):
        if use.opcode in _SLICES:
            parts += use.arrays
        elif use.opcode == "fusion":
            inner = program[use.called()[0]]
            places = [str(place) for place, of in enumerate(use.operands) if of == called]
            for key, each in inner.items():
                if each.opcode == "parameter" and key != "ROOT" and each.operands[0] in places:
                    more = _parts(program, key, inner)
                    if more is None:
                        return None
                    parts += more
        elif not _updates(use, called):
            return None
    return parts


def _uses(name: str, lines) -> Iterator[tuple[str, _Instruction]]:
    """(what it is called there, instruction) for all that read a value, through its bitcasts."""
    for key, use in lines.items():
        if key != "ROOT" and name in use.operands:
            yield from _uses(key, lines) if use.opcode == "bitcast" else [(name, use)]


def _updates(line: _Instruction, name: str) -> bool:
    """Whether an instruction changes a part of the value of that name and keeps the rest."""
    kept = line.opcode == "dynamic-update-slice" and line.operands[0] == name
    return kept and name not in line.operands[1:]
