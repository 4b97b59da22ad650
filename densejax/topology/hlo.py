"""Reads an optimised HLO program: what it moves, computes and sends, with every turn of its loops.

`compiled.cost_analysis()` counts the body of a loop once and has no answer for some devices.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator, Mapping
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
    memory: str  # the count that its bytes belong to


class _Instruction(NamedTuple):
    arrays: list[_Array]  # of its result
    opcode: str
    operands: list[str]  # names, or what stands in the parentheses of a parameter or constant
    attributes: str

    def called(self) -> list[str]:
        names = " ".join(a or b for a, b in _CALLED.findall(self.attributes))
        return re.findall(r"[\w.\-]+", names)


class _Computation(dict[str, _Instruction]):
    """Instructions by name."""

    root: _Instruction


_Program = Mapping[str, _Computation]


def read(text: str) -> Counts:
    """Counts of one execution on one device, from `compiled.as_text()`.

    Returns:
      bytes: of the operands and results of all kernels in the main memory. Where a kernel only
        reads a slice of an operand, or updates a part of it in place, only that part counts.
      on_chip_bytes: the same in a TPU's own memories.
      flops: of matrix products and convolutions, two for a multiply-add. Products with padding
        count, except where padding is what makes the image as wide as the kernel. Products with the
        zeros that the gradient of a strided convolution puts between its inputs do not count.
      kernels, convolutions, custom_calls: how often one runs.
      unknown_loops: loops whose number of turns is not known; their bodies count once.
      all-reduce, ...: bytes of the collectives' operands.
      collectives: how often one runs.
    """
    program, entry = _parse(text)

    @functools.cache
    def count(name: str) -> Counts:
        total, computation = Counts(), program[name]
        for line in computation.values():
            kind = line.opcode.removesuffix("-start")
            if kind in _FREE or kind.endswith("-done"):
                continue
            if kind in _CALLS:
                turns = _turns(program, line, computation) if kind == "while" else 1
                total["unknown_loops"] += turns is None
                for called in line.called():
                    turns = 1 if turns is None else turns
                    total.update({what: turns * n for what, n in count(called).items()})
                continue
            total.update(_arithmetic(program, line, computation) | {"kernels": 1})
            total.update(_traffic(program, line, computation))
            if kind in COLLECTIVES:
                operands = [a for name in line.operands for a in computation[name].arrays]
                total.update({kind: sum(a.bytes for a in operands), "collectives": 1})
        return total

    return +count(entry)


def _parse(text: str) -> tuple[_Program, str]:
    """The program, and the name of the computation where it starts."""
    program, entry = {}, ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            entry = match[2] if match[1] else entry
            computation = program[match[2]] = _Computation()
        elif match := _INSTRUCTION.match(line):
            computation[match[2]] = _instruction(match[3])
            if match[1]:
                computation.root = computation[match[2]]
    return program, entry


def _instruction(text: str) -> _Instruction:
    def closing(start):  # the place of the parenthesis that closes the one at `start`
        depth = 0
        for place in range(start, len(text)):
            depth += (text[place] == "(") - (text[place] == ")")
            if depth == 0:
                return place
        raise ValueError(f"no instruction: {text[:200]}")

    split = closing(0) + 1 if text.startswith("(") else text.index(" ")
    start = text.index("(", split)
    end = closing(start)
    opcode, inside = text[split:start].strip(), text[start + 1 : end]
    is_leaf = opcode in ("parameter", "constant")
    operands = [inside] if is_leaf else re.findall(r"%([\w.\-]+)", inside)
    arrays = []
    for kind, bits, sizes, layout in _ARRAY.findall(text[:split]):
        shape = tuple(int(size.strip("<=")) for size in sizes.split(",") if size)
        size = math.prod(shape) * (1 if kind == "pred" else int(bits) / 8)
        arrays.append(_Array(shape, size, "on_chip_bytes" if "S(" in layout else "bytes"))
    return _Instruction(arrays, opcode, operands, text[end + 1 :])


def _turns(program: _Program, line: _Instruction, computation: _Computation) -> int | None:
    """How often a loop runs: the compiler says it, or the loop tests `counter < constant`."""
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', line.attributes):
        return int(match[1])
    condition = program[re.search(r"condition=%?([\w.\-]+)", line.attributes)[1]]
    test = condition.root
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = (condition[name] for name in test.operands)
    index = re.search(r"index=(\d+)", counter.attributes)
    first = computation[line.operands[0]]
    while index and first.opcode in ("tuple", "copy"):
        operand = int(index[1]) if first.opcode == "tuple" else 0
        first = computation[first.operands[operand]]
    if not index or {first.opcode, limit.opcode} != {"constant"}:
        return None
    return int(limit.operands[0]) - int(first.operands[0])


def _arithmetic(program: _Program, line: _Instruction, computation: _Computation) -> Counts:
    """FLOPs, convolutions and custom calls of a kernel, with everything that is fused into it."""
    total, attributes, target = Counts(), line.attributes, ""
    if line.opcode == "fusion":
        inner = program[line.called()[0]]
        for each in inner.values():
            total.update(_arithmetic(program, each, inner))
    elif line.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', attributes)[1]
        total["custom_calls"] = 1
    is_convolution = line.opcode == "convolution" or target.startswith("__cudnn$conv")
    if not is_convolution and line.opcode != "dot" and not target.startswith("__cublas$"):
        return total
    shapes = [computation[name].arrays[0].shape for name in line.operands[:2]]
    if is_convolution:
        total["flops"] = 2 * _products_of_convolution(line, shapes, target)
        total["convolutions"] = int("window={size" in attributes)
    else:
        axes = re.findall(r"\d+", "".join(_CONTRACTED.search(attributes).groups("")))
        contracted = math.prod(shapes[0][int(axis)] for axis in axes)
        total["flops"] = 2 * math.prod(line.arrays[0].shape) * contracted
    return total


def _products_of_convolution(line: _Instruction, shapes: list[tuple[int, ...]], target: str) -> int:
    image, kernel, output = shapes[0], shapes[1], line.arrays[0].shape
    if target.endswith("BackwardInput"):  # it has the axis labels of the forward pass
        output = image
    elif target.endswith("BackwardFilter"):
        output, kernel = kernel, output
    attributes = line.attributes
    left, right = re.search(r"dim_labels=(\w+)_(\w+)->", attributes).groups()
    pads = re.search(r"pad=([\d_x-]+)", attributes)
    pads = pads[1].split("x") if pads else []
    products = kernel[right.index("i")]  # of each output
    for axis in filter(str.isdigit, right):
        size = kernel[right.index(axis)]
        pad = int(pads[int(axis)].split("_")[0]) if pads else 0
        # A TPU's compiler may swap image and kernel. What moves then is mostly over padding.
        products *= min(size, image[left.index(axis)]) if pad > size // 2 else size
    zeros = re.search(r"lhs_dilate=([\dx]+)", attributes)
    zeros = math.prod(map(int, zeros[1].split("x"))) if zeros else 1
    return math.prod(output) * products // zeros


def _size(arrays: list[_Array]) -> Counts:
    total = Counts()
    for array in arrays:
        total[array.memory] += array.bytes
    return total


def _traffic(program: _Program, line: _Instruction, computation: _Computation) -> Counts:
    """Bytes that a kernel reads and writes."""
    kind, operands = line.opcode, [computation[name].arrays for name in line.operands]
    if kind == "slice-start":  # its result names the operand, too
        operand, part = line.arrays[:2]
        return _size([part, *_in_memory_of(operand, [part])])
    if kind in _SLICES:
        return _size(line.arrays + _in_memory_of(operands[0][0], line.arrays))
    if kind == "dynamic-update-slice":
        return _size(operands[1] + _in_memory_of(line.arrays[0], operands[1]))
    if kind in ("copy-start", "all-gather-start", "collective-permute-start"):
        return _size(line.arrays)  # its result names the operand, too
    if kind != "fusion":
        return _size(line.arrays + sum(operands, []))
    inner, total = program[line.called()[0]], Counts()
    for key, each in inner.items():
        if each.opcode == "parameter":
            operand, slices = operands[int(each.operands[0])], _slices_read(program, key, inner)
            total.update(_size(operand if slices is None else _in_memory_of(operand[0], slices)))
    results = [inner.root] * len(line.arrays)  # one instruction may reduce several arrays
    if inner.root.opcode == "tuple":
        results = [inner[name] for name in inner.root.operands]
    for result, array in zip(results, line.arrays, strict=True):
        while result.opcode == "bitcast":
            result = inner[result.operands[0]]
        written = [array]
        if result.opcode == "dynamic-update-slice":
            written = _in_memory_of(array, inner[result.operands[1]].arrays)
        total.update(_size(written))
    return total


def _in_memory_of(whole: _Array, parts: list[_Array]) -> list[_Array]:
    return [part._replace(memory=whole.memory) for part in parts]


def _slices_read(program: _Program, name: str, computation: _Computation) -> list[_Array] | None:
    """The slices of a value that are read, also by fusions within fusions; None: all of it."""
    slices = []
    for called, use in _uses(name, computation):
        if use.opcode in _SLICES:
            slices += use.arrays
        elif use.opcode == "fusion":
            inner = program[use.called()[0]]
            numbers = [str(number) for number, of in enumerate(use.operands) if of == called]
            for key, each in inner.items():
                if each.opcode == "parameter" and each.operands[0] in numbers:
                    more = _slices_read(program, key, inner)
                    if more is None:
                        return None
                    slices += more
        elif use.opcode != "dynamic-update-slice" or called in use.operands[1:]:
            return None  # such an update, and nothing else, replaces a part in place
    return slices


def _uses(name: str, computation: _Computation) -> Iterator[tuple[str, _Instruction]]:
    """(name of the value there, instruction) of all that read a value, also through bitcasts."""
    for key, use in computation.items():
        if name in use.operands:
            yield from _uses(key, computation) if use.opcode == "bitcast" else [(name, use)]
