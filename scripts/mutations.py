"""Small changes of a source, each of which its tests should notice.

Docstrings, messages and annotations stay as they are. A change that leaves the source
what it was, or makes one that another change made already, is left out.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping

_OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_COMPARISONS = {  # the neighbour, the opposite
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.GtE, ast.NotEq),
    ast.NotEq: (ast.Lt, ast.Eq),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_EXTREMES = {"min": "max", "minimum": "maximum", "argmin": "argmax", "any": "all"}
_EXTREMES |= {new: old for old, new in _EXTREMES.items()}
_SYMMETRIC = {"add", "logaddexp", "max", "maximum", "min", "minimum", "multiply"}
_REDUCTIONS = {
    *("all", "any", "argmax", "argmin", "argsort", "cumsum", "log_softmax"),
    *("logsumexp", "max", "mean", "min", "prod", "softmax", "sort", "sum"),
}
_SLOTS = {"CHOSEN": "REJECTED", "REJECTED": "CHOSEN"}
_UNTOUCHED = {"annotation", "returns"}  # fields of a node
_LONGEST_SHOWN = 50  # characters

PLACE = ("file", "function", "line", "mutation", "change")
"""What tells one mutant from another."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A file with one change.

    Attributes:
      file: its path.
      function: where the change is, nested names joined by dots; or "module".
      line: the text of the line.
      mutation: the kind of change, a name of `MUTATIONS`.
      change: "before -> after"; a number is appended where that says it twice.
      source: the whole file, as the syntax tree prints it.
    """

    file: str
    function: str
    line: str
    mutation: str
    change: str
    source: str = dataclasses.field(repr=False)

    @property
    def place(self) -> dict[str, str]:
        """All but the source."""
        return {name: getattr(self, name) for name in PLACE}


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A node and where it stands: below `parents`, the last of which holds it."""

    node: ast.AST
    parents: tuple[ast.AST, ...]
    field: str
    index: int | None
    function: str

    def put(self, new: ast.AST) -> None:
        if self.index is None:
            setattr(self.parents[-1], self.field, new)
        else:
            getattr(self.parents[-1], self.field)[self.index] = new


def _slots(parents: tuple[ast.AST, ...], functions=()) -> Iterator[_Slot]:
    """Every node below the last of `parents` that may change, in order."""
    if isinstance(parents[-1], ast.FunctionDef | ast.ClassDef):
        functions = (*functions, parents[-1].name)
    for field, value in ast.iter_fields(parents[-1]):
        if field in _UNTOUCHED:
            continue
        several = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, node in several:
            if isinstance(node, ast.AST) and not isinstance(node, ast.JoinedStr):
                yield _Slot(
                    node, parents, field, index, ".".join(functions) or "module"
                )
                if not isinstance(node, ast.Raise):
                    yield from _slots((*parents, node), functions)


def _name(call: ast.AST) -> str:
    """`sum` of `x.sum(-1)` and of `sum(x)`; nothing if it is no such call."""
    function = getattr(call, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


def _is_check(call: ast.AST) -> bool:
    """Is it `checks.NAME(...)`, `check_NAME(...)` or `_check_NAME(...)`?"""
    owner = getattr(getattr(call, "func", None), "value", None)
    named = _name(call).lstrip("_").startswith("check_")
    return named or getattr(owner, "id", None) == "checks"


def _literal(node: ast.AST) -> int | None:
    """The integer that is written there, with its sign."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _literal(node.operand)
        return None if inner is None else -inner
    value = getattr(node, "value", None)
    return value if isinstance(node, ast.Constant) and type(value) is int else None


def _number(value: int) -> ast.AST:
    number = ast.Constant(abs(value))
    return ast.UnaryOp(ast.USub(), number) if value < 0 else number


def _changed(node: ast.AST, **fields) -> ast.AST:
    """A copy of one node, with some fields changed."""
    return type(node)(**dict(ast.iter_fields(node)) | fields)


def _exchanged(values: list, i: int, new) -> list:
    return [*values[:i], new, *values[i + 1 :]]


# A mutation: (node, parent) -> nodes to put in its place.


def _sign(node, parent):
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand


def _not(node, parent):
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield node.operand


def _operator(node, parent):
    if isinstance(node, ast.BinOp | ast.AugAssign):
        new = _OPERATORS.get(type(node.op))
        if new is not None:
            yield _changed(node, op=new())


def _comparison(node, parent):
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for new in _COMPARISONS[type(operator)]:
                yield _changed(node, ops=_exchanged(node.ops, i, new()))


def _boolean(node, parent):
    if isinstance(node, ast.BoolOp):
        new = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield _changed(node, op=new())


def _constant(node, parent):
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
        signed = isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.USub)
        if node.value != 0 and not signed:  # that one is left to `sign`
            yield ast.UnaryOp(ast.USub(), node)


def _where(node, parent):
    for i, keyword in enumerate(getattr(node, "keywords", ())):
        if isinstance(node, ast.Call) and keyword.arg == "where":
            others = node.keywords[:i] + node.keywords[i + 1 :]
            yield _changed(node, keywords=others)
            negated = ast.keyword("where", ast.UnaryOp(ast.Invert(), keyword.value))
            yield _changed(node, keywords=_exchanged(node.keywords, i, negated))


def _branches(node, parent):
    if isinstance(node, ast.IfExp):
        yield _changed(node, body=node.orelse, orelse=node.body)
    elif _name(node) == "where" and len(node.args) == 3:
        condition, first, second = node.args
        yield _changed(node, args=[condition, second, first])


def _arguments(node, parent):
    if not isinstance(node, ast.Call):
        return
    args, keywords = node.args, node.keywords
    if len(args) == 2 and _name(node) not in _SYMMETRIC and not _is_check(node):
        yield _changed(node, args=args[::-1])
    index = {keyword.arg: i for i, keyword in enumerate(keywords)}
    pairs = [(a.removeprefix("anchor_"), a) for a in index if a and "anchor_" in a]
    for first, second in (*pairs, ("low", "high"), ("chosen", "rejected")):
        if second not in index:
            continue
        other = keywords[index[second]]
        if first in index:
            own = keywords[index[first]]
            new = _exchanged(keywords, index[first], ast.keyword(first, other.value))
            new[index[second]] = ast.keyword(second, own.value)
            yield _changed(node, keywords=new)
        elif len(args) == 1 and second.startswith("anchor_"):
            new = ast.keyword(second, args[0])
            new = _exchanged(keywords, index[second], new)
            yield _changed(node, args=[other.value], keywords=new)


def _extreme(node, parent):
    for field in ("attr", "id"):
        new = _EXTREMES.get(getattr(node, field, None))
        if new is not None:
            yield _changed(node, **{field: new})


def _log_sigmoid(node, parent):
    if _name(node) in ("log_sigmoid", "sigmoid", "softplus"):
        yield _changed(node, args=[ast.UnaryOp(ast.USub(), node.args[0])])


def _axis(node, parent):
    if isinstance(node, ast.keyword) and node.arg == "axis":
        axis = _literal(node.value)
        if axis is not None:
            yield ast.keyword("axis", _number(-1 if axis == 0 else 0))
    elif _name(node) in _REDUCTIONS and node.args:
        axis = _literal(node.args[-1])
        if axis is not None:
            new = _number(-1 if axis == 0 else 0)
            yield _changed(node, args=[*node.args[:-1], new])


def _stop_gradient(node, parent):
    if _name(node) == "stop_gradient":
        yield node.args[0]
    elif getattr(node, "attr", None) == "stop_gradient" and _name(parent) != node.attr:
        yield ast.parse("lambda x: x", mode="eval").body


def _slot(node, parent):
    if isinstance(node, ast.Name) and node.id in _SLOTS:
        yield ast.Name(_SLOTS[node.id], node.ctx)


def _update(node, parent):
    if isinstance(node, ast.AugAssign):
        yield ast.Pass()


def _check(node, parent):
    if isinstance(node, ast.Expr) and _is_check(node.value):
        yield ast.Pass()
    elif isinstance(node, ast.Call) and _is_check(node):
        if not isinstance(parent, ast.Expr) and len(node.args) == 1:
            yield node.args[0]


def _error(node, parent):
    if isinstance(node, ast.Raise):
        yield ast.Pass()


MUTATIONS: Mapping[str, Callable[[ast.AST, ast.AST], Iterator[ast.AST]]] = {
    "sign": _sign,  # -x: x
    "not": _not,  # not x, ~x: x
    "operator": _operator,
    "comparison": _comparison,
    "boolean": _boolean,  # and, or
    "constant": _constant,  # n: n + 1, -n; True, False
    "where": _where,  # where=w: dropped, where=~w
    "branches": _branches,  # of where(c, x, y) and x if c else y
    "arguments": _arguments,  # f(x, y), f(x, anchor_x=y), f(low=x, high=y): swapped
    "extreme": _extreme,  # min and max, any and all
    "log_sigmoid": _log_sigmoid,  # the sign of its argument
    "axis": _axis,  # the first instead of another, or the last
    "stop_gradient": _stop_gradient,  # removed
    "slot": _slot,  # CHOSEN and REJECTED
    "update": _update,  # x += y: removed
    "check": _check,  # checks.check_NAME(...): removed
    "error": _error,  # raise: removed
}


def _shown(slot: _Slot) -> ast.AST:
    """The largest expression around a node that is short, or the node itself."""
    shown = slot.node
    for parent in reversed(slot.parents):
        if not isinstance(parent, ast.expr | ast.keyword):
            break
        if len(ast.unparse(parent)) > _LONGEST_SHOWN:
            break
        shown = parent
    return shown


def printed(source: str) -> str:
    """A source as mutants have it: printed from its syntax tree.

    >>> printed("x = (1)  # one")
    'x = 1'
    """
    return ast.unparse(ast.parse(source))


def mutants_of(source: str, file: str) -> list[Mutant]:
    """All mutants of a file, in its order.

    Args:
      source: the text of the file.
      file: its path, which the mutants carry.

    >>> for mutant in mutants_of("half = -x / 2", "half.py"):
    ...     print(f"{mutant.mutation:9} {mutant.change}")
    operator  -x / 2 -> -x * 2
    sign      -x / 2 -> x / 2
    constant  -x / 2 -> -x / 3
    constant  -x / 2 -> -x / -2
    """
    tree, lines = ast.parse(source), source.splitlines()
    seen, told, found = {ast.unparse(tree)}, collections.Counter(), []
    for slot in _slots((tree,)):
        for name, mutate in MUTATIONS.items():
            for new in mutate(slot.node, slot.parents[-1]):
                shown = _shown(slot)
                before = ast.unparse(shown)
                slot.put(new)
                mutated = ast.unparse(tree)
                after = ast.unparse(new if shown is slot.node else shown)
                slot.put(slot.node)
                if mutated in seen:
                    continue
                seen.add(mutated)
                if isinstance(slot.node, ast.Raise):
                    before = f"raise {_name(slot.node.exc)}"
                if isinstance(new, ast.Pass):
                    after = "(removed)"
                line = lines[slot.node.lineno - 1].strip()
                key = (slot.function, line, name, f"{before} -> {after}")
                told[key] += 1
                number = f" ({told[key]})" if told[key] > 1 else ""
                change = key[-1] + number
                found.append(Mutant(file, slot.function, line, name, change, mutated))
    return found
