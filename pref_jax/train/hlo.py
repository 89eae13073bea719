"""What an optimised XLA program moves: its collectives and its memory traffic.

Both are read off `compiled.as_text()`, since `compiled.cost_analysis()` counts the body
of a loop once and says nothing of collectives. Here whatever runs inside a loop counts
as often as the loop turns.

    found = collectives(compiled.as_text(), mesh)
    inside = [c for c in found if "layers" in c.scope and c.loops]
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from pref_jax.loops import most_turns

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
"""What XLA calls its collectives."""

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of one chip."""

    dtype: str  # as XLA writes it: bf16, f32, s32
    dims: tuple[int, ...]
    space: int = 0  # memory space: 0 is HBM, 1 the fast memory beside the cores

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Bytes, without the padding of tiled layouts."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(bits[1])
        return math.ceil(self.size * bits / 8)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`. What the TPU compiler writes as an all-reduce whose result
        is sliced at once, inside one fused kernel, is a reduce-scatter.
      axes: mesh axes that it runs over, in the order of the mesh.
      group_size: chips that exchange with each other, n.
      bytes_sent: bytes that one chip sends in one execution. A ring is assumed: of the
        gathered array of an all-gather, the input of a reduce-scatter, and the array of
        an all-to-all (n - 1) / n; of the array of an all-reduce 2 (n - 1) / n; of a
        collective-permute or a broadcast, all.
      executions: of one call of the program.
      is_exact: False if a loop around it turns an unknown number of times, and is
        counted as if once: `executions` is then a lower bound.
      outputs: the arrays of one chip that it makes.
      scope: `op_name` of its metadata, such as "jit(step)/jvp(layers)/while/body/...",
        or that of what surrounds it where the compiler made it without one.
      loops: scopes of the loops around it, the outermost first.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    bytes_sent: float
    executions: int
    is_exact: bool
    outputs: tuple[Shape, ...]
    scope: str
    loops: tuple[str, ...]

    @property
    def total_bytes(self) -> float:
        """Bytes that one chip sends in one call of the program."""
        return self.bytes_sent * self.executions


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result, a tuple's one after the other
    operands: tuple[str, ...]
    argument: str  # what stands in the parentheses of the opcode
    attributes: str  # what follows them

    def called(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def branches(self) -> list[str]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if listed:
            return _NAME.findall(listed[1])
        both = (self.called("true_computation"), self.called("false_computation"))
        return [name for name in both if name]

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class _Computation:
    name: str
    instructions: dict[str, _Instruction]
    root: str

    def parameter(self, number: int) -> _Instruction:
        return next(
            i
            for i in self.instructions.values()
            if i.opcode == "parameter" and int(i.argument) == number
        )

    @functools.cached_property
    def users(self) -> dict[str, list[_Instruction]]:
        found = collections.defaultdict(list)
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with is closed."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    raise ValueError(f"a parenthesis is never closed in the HLO text {text[:80]!r}.")


def _read_shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size) for size in dims.split(",") if size)
        shapes.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(shapes)


def _read_instruction(name: str, text: str) -> _Instruction:
    end = _closing(text) + 1 if text[0] == "(" else text.index(" ")
    shapes, text = _read_shapes(text[:end]), text[end:].lstrip()
    opcode, _, _ = text.partition("(")
    text = text[len(opcode) :]
    end = _closing(text)
    argument, attributes = text[1:end], text[end + 1 :]
    operands = tuple(_NAME.findall(argument))
    return _Instruction(name, opcode, shapes, operands, argument, attributes)


def _read(hlo_text: str) -> tuple[dict[str, _Computation], str]:
    """Computations by name, and which of them is the entry."""
    computations, entry, name, instructions, root = {}, None, None, {}, ""
    for line in hlo_text.splitlines():
        header = _HEADER.match(line)
        if header:
            name, instructions = header[2], {}
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            computations[name] = _Computation(name, instructions, root)
            name = None
        elif name and (found := _LINE.match(line)):
            instructions[found[2]] = _read_instruction(found[2], line[found.end() :])
            root = found[2] if found[1] else root
    if entry is None:
        raise ValueError(
            "the HLO text has no ENTRY computation; give `compiled.as_text()` of an "
            f"optimised program. It begins with {hlo_text[:80]!r}."
        )
    return computations, entry


class _Program:
    """Computations that call each other, and how often their loops turn."""

    def __init__(self, hlo_text: str):
        self.computations, self.entry = _read(hlo_text)

    def trips(self, computation: _Computation, loop: _Instruction) -> int | None:
        """How often a loop turns; None when the text does not tell.

        XLA for CPU writes it down. XLA for TPU does not: it is worked out for a loop
        that adds a constant to a counter and compares it with another.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        body = self.computations[loop.called("body")]
        compared = self._comparison(condition)
        if compared is None:
            return None
        index, limit, direction = compared
        start_tuple = computation.instructions[loop.operands[0]]
        if start_tuple.opcode != "tuple":
            return None
        start = self._linear(computation, start_tuple.operands[index])
        root = body.instructions[body.root]
        if root.opcode != "tuple":
            return None
        step = self._linear(body, root.operands[index])
        if start is None or start[0] is not None or step is None or step[0] != index:
            return None
        if step[1] < 1 or direction not in ("LT", "LE"):
            return None
        last = limit + (direction == "LE")
        return max(0, -(-(last - start[1]) // step[1]))

    def _comparison(self, condition) -> tuple[int, int, str] | None:
        """(entry of the carry, constant, direction) of `carry[entry] < constant`."""
        root, bindings, inside = condition.instructions[condition.root], None, condition
        if root.opcode == "fusion":
            bindings = [self._linear(condition, name) for name in root.operands]
            inside = self.computations[root.called("calls")]
            root = inside.instructions[inside.root]
        if root.opcode != "compare":
            return None
        sides = [self._linear(inside, name, bindings) for name in root.operands]
        if None in sides or sides[0][0] is None or sides[1][0] is not None:
            return None
        direction = re.search(r"direction=(\w+)", root.attributes)[1]
        return sides[0][0], sides[1][1] - sides[0][1], direction

    def _linear(self, computation, name: str, bindings=None):
        """(i, c) where a scalar is entry i of the carry plus c, or i None: c alone."""
        instruction = computation.instructions[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant" and re.fullmatch(r"-?\d+", instruction.argument):
            return None, int(instruction.argument)
        if opcode == "parameter" and bindings is not None:
            return bindings[int(instruction.argument)]
        if opcode == "get-tuple-element" and bindings is None:
            of = computation.instructions[operands[0]].opcode
            index = int(re.search(r"index=(\d+)", instruction.attributes)[1])
            return (index, 0) if of == "parameter" else None
        if opcode in ("copy", "bitcast", "convert", "copy-done"):
            return self._linear(computation, operands[0], bindings)
        if opcode == "copy-start":
            return self._linear(computation, operands[0], bindings)
        if opcode == "fusion":
            inside = self.computations[instruction.called("calls")]
            values = [self._linear(computation, x, bindings) for x in operands]
            return self._linear(inside, inside.root, values)
        if opcode == "add":
            parts = [self._linear(computation, x, bindings) for x in operands]
            if None in parts or None not in (parts[0][0], parts[1][0]):
                return None
            index = parts[1][0] if parts[0][0] is None else parts[0][0]
            return index, parts[0][1] + parts[1][1]
        return None


def _device_grid(dims: Sequence[int], reshape: str, permutation: str | None):
    """The device ids `[dims]<=[reshape]T(permutation)`, XLA's iota form."""
    sizes = [int(size) for size in reshape.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    if permutation:
        ids = ids.transpose([int(axis) for axis in permutation.split(",")])
    return ids.reshape(dims)


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """The groups of a collective, in any of the three spellings of XLA.

        {{0,1},{2,3}}      [2,2]<=[4]T(0)      mesh['a'=2,'b'=2] {'b'}

    Args:
      attributes: of the instruction.
      num_devices: all of them, which an empty list of groups stands for.

    Returns:
      i64[number of groups, n], positions in the mesh's list of devices.

    Raises:
      ValueError: another spelling.

    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0), x=1", 4).tolist()
    [[0, 2], [1, 3]]
    """
    found = re.search(r"replica_groups=(.*)", attributes)
    text = found[1] if found else ""
    if not found or text.startswith("{}"):
        return np.arange(num_devices)[None]
    if listed := re.match(r"\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", text):
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return np.array([[int(i) for i in group.split(",")] for group in groups])
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = [int(size) for size in iota[1].split(",")]
        return _device_grid(dims, iota[2], iota[3])
    if named := re.match(r"mesh\[([^\]]*)\](.*?) \{([^}]*)\}", text):
        return _groups_of_axes(*named.groups())
    raise ValueError(f"replica groups of an unknown spelling: {text[:120]!r}.")


def _groups_of_axes(mesh: str, order: str, axes: str) -> np.ndarray:
    """Groups of `mesh[MESH], device_ids=(ORDER) {AXES}`, also of parts of axes.

    A part of an axis is `name:(k)s`: the axis has the sizes k, s and what is left, and
    s is meant.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", mesh)}
    dims = list(sizes.values())
    ids = np.arange(math.prod(dims)).reshape(dims)
    if iota := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", order):
        ids = _device_grid(dims, *iota.groups())
    elif listed := re.search(r"device_ids=\(([\d,]+)\)", order):
        ids = np.array([int(i) for i in listed[1].split(",")]).reshape(dims)
    grouped = re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", axes)
    split, inside = [], []
    for name, size in sizes.items():
        parts = sorted(
            (int(k or 1), int(s or size)) for n, k, s in grouped if n == name
        )
        before = 1
        for pre, part in parts:
            split += [pre // before, part]
            inside.append(len(split) - 1)
            before = pre * part
        split.append(size // before)
    outside = [i for i in range(len(split)) if i not in inside]
    num = math.prod(split[i] for i in inside)
    return ids.reshape(split).transpose(outside + inside).reshape(-1, num)


def _axes_of(groups: np.ndarray, mesh) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ."""
    places = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(itertools.compress(mesh.axis_names, differ))


def _kind(instruction: _Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _outputs(instruction: _Instruction) -> tuple[Shape, ...]:
    """What a collective makes; the start of an asynchronous one lists more."""
    shapes = instruction.shapes
    if instruction.opcode == "collective-permute-start":
        return shapes[1:2]
    if instruction.opcode in ("all-gather-start", "reduce-scatter-start"):
        return shapes[len(shapes) // 2 :]
    return shapes


def _bytes_sent(kind: str, outputs: tuple[Shape, ...], n: int) -> float:
    made = sum(shape.num_bytes for shape in outputs)
    share = (n - 1) / n
    return {
        "all-gather": share * made,
        "all-reduce": 2 * share * made,
        "reduce-scatter": (n - 1) * made,  # the input is n times the output
        "all-to-all": share * made,
        "ragged-all-to-all": share * made,
        "collective-permute": made,
        "collective-broadcast": made,
    }[kind]


def _describe(
    instruction, mesh, inside: str
) -> tuple[str, tuple[str, ...], int, float]:
    """Kind, axes, group size and bytes of one execution."""
    kind, outputs = _kind(instruction), _outputs(instruction)
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)
    if pairs:
        groups = np.array(re.findall(r"(\d+),(\d+)", pairs[1]), dtype=int)
        axes = _axes_of(groups, mesh)
        n = math.prod(mesh.shape[axis] for axis in axes)
        return kind, axes, n, _bytes_sent(kind, outputs, n)
    groups = replica_groups(instruction.attributes, mesh.devices.size)
    n = groups.shape[1]
    num_bytes = _bytes_sent(kind, outputs, n)
    if kind == "all-reduce" and "all-reduce-scatter" in inside:
        kind, num_bytes = "reduce-scatter", num_bytes / 2
    return kind, _axes_of(groups, mesh), n, num_bytes


def collectives(hlo_text: str, mesh) -> list[Collective]:
    """Every collective of an optimised program, in the order of the text.

    Asynchronous ones count once, where they start. Of a conditional, only the branch
    that sends most is listed. A loop that the text gives no number of turns for is
    taken once (`unknown_loops`).

    Args:
      hlo_text: `compiled.as_text()`.
      mesh: `jax.sharding.Mesh` that the program was compiled for.

    Raises:
      ValueError: not the text of a program, or replica groups of an unknown spelling.
    """
    program = _Program(hlo_text)
    fused = set()

    def in_computation(name, executions, is_exact, loops, scope):
        computation = program.computations[name]
        found = []
        for instruction in computation.instructions.values():
            here = instruction.op_name or scope
            within = (executions, is_exact, loops, here)
            if _kind(instruction):
                if "async_collective_fusion_config" in instruction.attributes:
                    # The TPU compiler repeats it in each kernel that it runs beside.
                    channel = re.search(r"channel_id=(\d+)", instruction.attributes)[1]
                    if channel in fused:
                        continue
                    fused.add(channel)
                kind, axes, n, num_bytes = _describe(instruction, mesh, name)
                outputs = _outputs(instruction)
                if n > 1:
                    found.append(
                        Collective(
                            *(kind, axes, n, num_bytes, executions, is_exact),
                            *(outputs, here, loops),
                        )
                    )
            elif instruction.opcode == "while":
                trips = program.trips(computation, instruction)
                turns = executions * (_turns(trips, instruction) or 1)
                exact = is_exact and trips is not None
                for part in ("condition", "body"):
                    inside = (turns, exact, (*loops, here), here)
                    found += in_computation(instruction.called(part), *inside)
            elif instruction.opcode == "conditional":
                branches = [in_computation(b, *within) for b in instruction.branches]
                found += max(branches, key=lambda b: sum(c.total_bytes for c in b))
            elif called := _called(instruction):
                found += in_computation(called, *within)
        return found

    return in_computation(program.entry, 1, True, (), "")


def unknown_loops(hlo_text: str) -> list[str]:
    """Scopes of the loops whose number of turns the text does not tell.

    Args:
      hlo_text: `compiled.as_text()`.
    """
    program = _Program(hlo_text)
    return [
        instruction.op_name or instruction.name
        for computation in program.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while"
        and _turns(program.trips(computation, instruction), instruction) is None
    ]


def kernel_scopes(hlo_text: str) -> dict[str, str]:
    """Every kernel of an optimised program and the scope that it belongs to.

    A kernel without a scope of its own has that of the loop or branch it stands in.

    Args:
      hlo_text: `compiled.as_text()`.
    """
    program = _Program(hlo_text)
    found = {}

    def visit(name: str, scope: str) -> None:
        for instruction in program.computations[name].instructions.values():
            here = instruction.op_name or scope
            if instruction.opcode == "while":
                parts = [instruction.called(p) for p in ("condition", "body")]
            elif instruction.opcode == "conditional":
                parts = instruction.branches
            elif instruction.opcode == "call":
                parts = [_called(instruction)]
            else:
                found[instruction.name] = here
                continue
            for part in parts:
                visit(part, here)

    visit(program.entry, "")
    return found


def _turns(trips: int | None, loop: _Instruction) -> int | None:
    """How often a loop turns: what the text tells, or at most, or None."""
    return most_turns(loop.op_name) if trips is None else trips


def _called(instruction: _Instruction) -> str | None:
    """The computation that an instruction runs once, if there is one."""
    if instruction.opcode in ("fusion", "async-start", "custom-call"):
        return instruction.called("calls")
    return instruction.called("to_apply") if instruction.opcode == "call" else None


def gathers_of(found: Sequence[Collective], array, mesh) -> list[Collective]:
    """All-gathers that bring together all of one array, such as a stack of layers.

    A parameter of stacked layers should be gathered layer by layer, inside the loop
    over them: an all-gather of the whole stack holds the model on every chip.

    Args:
      found: of `collectives`.
      array: with `shape` and a `NamedSharding`, such as a leaf of the parameters.
      mesh: of the program.

    Returns:
      Those that make an array of the shape that `array` has on a chip when the axes
      that they run over are taken out of its sharding; compilers may have turned its
      dimensions around or merged some.
    """
    matches = []
    for collective in found:
        whole, local, gathered = list(array.shape), [], False
        for size, entry in itertools.zip_longest(whole, array.sharding.spec):
            names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
            left = [name for name in names if name not in collective.axes]
            gathered |= len(left) < len(names)
            local.append(size // math.prod(mesh.shape[name] for name in left))
        is_whole = any(_is_merged(local, shape.dims) for shape in collective.outputs)
        if collective.kind == "all-gather" and gathered and is_whole:
            matches.append(collective)
    return matches


def _is_merged(dims: Sequence[int], merged: Sequence[int]) -> bool:
    """Whether each of `merged` is the product of `dims` of its own, all being used."""
    dims = [size for size in dims if size > 1]
    merged = [size for size in merged if size > 1]
    if not merged or math.prod(dims) != math.prod(merged):
        return not dims and not merged
    places = range(len(dims))
    for number in range(1, len(dims) + 1):
        for chosen in itertools.combinations(places, number):
            if math.prod(dims[i] for i in chosen) == merged[0]:
                rest = [dims[i] for i in places if i not in chosen]
                if _is_merged(rest, merged[1:]):
                    return True
    return False


_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"),
}


def bytes_accessed(hlo_text: str) -> float:
    """Bytes that one chip reads from and writes to HBM in one call: an estimate.

    Each kernel reads its operands once and writes its result once, loop bodies as often
    as they turn (once, where the text does not tell); of a conditional, the branch that
    accesses most. What is sliced out of an array or updated in place counts with the
    size of the slice, and what the TPU compiler keeps in fast memory not at all.

    Args:
      hlo_text: `compiled.as_text()`.
    """
    program = _Program(hlo_text)

    @functools.cache
    def of_computation(name: str) -> float:
        computation = program.computations[name]
        instructions = computation.instructions.values()
        return sum(of_instruction(computation, x) for x in instructions)

    def of_instruction(computation, instruction) -> float:
        opcode = instruction.opcode
        if opcode == "while":
            trips = program.trips(computation, instruction)
            turns = _turns(trips, instruction) or 1
            return turns * of_computation(instruction.called("body"))
        if opcode == "conditional":
            return max(of_computation(branch) for branch in instruction.branches)
        if opcode in ("call", "async-start") and _called(instruction):
            return of_computation(_called(instruction))
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0
        if "AllocateBuffer" in instruction.attributes:
            return 0
        if opcode == "fusion":
            return _fusion_bytes(program, computation, instruction)
        return _kernel_bytes(computation, instruction)

    return of_computation(program.entry)


def _in_hbm(shapes) -> int:
    return sum(shape.num_bytes for shape in shapes if shape.space == 0)


def _kernel_bytes(computation, instruction) -> float:
    opcode, shapes = instruction.opcode, instruction.shapes
    operands = [computation.instructions[name].shapes for name in instruction.operands]
    if opcode.endswith("-start"):  # the result lists what is read and what is written
        return _in_hbm(shapes)
    if opcode in ("dynamic-slice", "slice", "gather"):
        read = dataclasses.replace(shapes[0], space=operands[0][0].space)
        return _in_hbm((read, *shapes))
    if opcode in ("dynamic-update-slice", "scatter"):
        update = operands[1 if opcode == "dynamic-update-slice" else -1]
        return _in_hbm(update) * 2
    return sum(map(_in_hbm, operands)) + _in_hbm(shapes)


def _fusion_bytes(program, computation, instruction) -> float:
    inside = program.computations[instruction.called("calls")]
    total = 0
    for number, name in enumerate(instruction.operands):
        shapes = computation.instructions[name].shapes
        if _in_hbm(shapes):
            sliced = _sliced(program, inside, inside.parameter(number).name)
            total += _in_hbm(shapes) if sliced is None else sliced
    root = inside.instructions[inside.root]
    roots = root.operands if root.opcode == "tuple" else (root.name,)
    if len(roots) != len(instruction.shapes):
        return total + _in_hbm(instruction.shapes)
    for name, shape in zip(roots, instruction.shapes, strict=True):
        updated = _updated(program, inside, name)
        if shape.space == 0:
            total += shape.num_bytes if updated is None else updated
    return total


def _updated(program, computation, name: str) -> int | None:
    """Bytes written of an array that is updated in place; None if all is written."""
    instruction = computation.instructions[name]
    if instruction.opcode == "bitcast":
        return _updated(program, computation, instruction.operands[0])
    if instruction.opcode == "fusion":
        inside = program.computations[instruction.called("calls")]
        return _updated(program, inside, inside.root)
    if instruction.opcode == "dynamic-update-slice":
        update = computation.instructions[instruction.operands[1]]
        return sum(shape.num_bytes for shape in update.shapes)
    return None


def _sliced(program, computation, name: str) -> int | None:
    """Bytes read of an array that only slices are taken of; None if all is read."""
    if name == computation.root:
        return None
    total = 0
    for user in computation.users[name]:
        if user.opcode == "bitcast":
            read = _sliced(program, computation, user.name)
        elif user.opcode == "fusion":
            inside = program.computations[user.called("calls")]
            parameter = inside.parameter(user.operands.index(name))
            read = _sliced(program, inside, parameter.name)
        elif user.operands.count(name) > 1 or user.operands[0] != name:
            read = None
        elif user.opcode in ("dynamic-slice", "slice", "gather"):
            read = sum(shape.num_bytes for shape in user.shapes)
        else:
            read = 0 if user.opcode == "dynamic-update-slice" else None
        if read is None:
            return None
        total += read
    return total
