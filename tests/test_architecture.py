"""Who imports whom, where third parties live, and how large a file may grow.

    experiments   scripts   tests
                    |
              model_folders
                    |
    train   data   models   sampling   envs   report        do not import each other
                    |
                  method
                    |
    losses  rewards  q_values  anchors  targets  logps  evals     pure maths: jax, numpy
                    |
              types   checks   numerics   loops   axes   processes

Imports point down only, also those inside functions.
"""

import ast
import dataclasses
import graphlib
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import pref_jax
from pref_jax import losses

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    ("types", "checks", "numerics", "loops", "axes", "processes"),
    ("losses", "rewards", "q_values", "anchors", "targets", "logps", "evals"),
    ("method",),
    ("train", "data", "models", "sampling", "envs", "report"),
    ("model_folders",),
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
METHOD, TOP = 2, 3

HOMES = {
    "flax": ("pref_jax.models",),
    "optax": ("pref_jax.train",),
    "orbax": ("pref_jax.train",),
    "grain": ("pref_jax.data",),
    "tensorflow_datasets": ("pref_jax.data",),
    "transformers": ("pref_jax.models.pretrained", "pref_jax.data.templates"),
}
SLOW_TO_IMPORT = ("transformers", "tensorflow_datasets")
FORBIDDEN = ("torch", "tensorflow")
OF_PURE_MODULES = {"jax", "numpy", "jaxtyping", "pref_jax", *sys.stdlib_module_names}
HEAVY = (*HOMES, *FORBIDDEN, "matplotlib")

TOP_LEVEL = {
    *("setup.py", "pref_jax", "experiments", "tests", "scripts", "README.md"),
    *("LICENSE", "docs"),
}
NO_NOUN = {"util", "utils", "helper", "helpers", "misc", "core"}
MAX_LINES_OF_CODE = 600


@dataclasses.dataclass(frozen=True)
class Import:
    """One import statement's target, as written in one module."""

    module: str
    target: str
    line: int
    lazy: bool  # inside a function, or for type checkers alone

    def __str__(self):
        return f"{self.module}:{self.line} imports {self.target}"


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports_of(sources: dict[str, str]) -> list[Import]:
    """Every import in `{path: source}`; `from a import b` is a.b where that is one."""
    modules = {module_name(path) for path in sources}
    found = []

    def visit(node, module, package, lazy):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in modules else base for name in names]
        else:
            targets = []
        found.extend(Import(module, target, node.lineno, lazy) for target in targets)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lazy = True
        if isinstance(node, ast.If):
            test = getattr(node.test, "attr", getattr(node.test, "id", None))
            lazy = lazy or test == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.expr):
                visit(child, module, package, lazy)

    for path, source in sources.items():
        module = module_name(path)
        is_package = path.endswith("__init__.py")
        package = module if is_package else module.rpartition(".")[0]
        visit(ast.parse(source), module, package, lazy=False)
    return found


def is_in(module: str, home: str) -> bool:
    return module == home or module.startswith(home + ".")


def room_of(module: str) -> str:
    """`losses` of `pref_jax.losses.pairwise`; nothing for the package itself."""
    return [*module.split("."), ""][1]


def layer_violations(sources: dict[str, str]) -> list[str]:
    """Imports inside pref_jax that point up or sideways, or leave it upwards."""
    violations = []
    for module in sorted({module_name(path) for path in sources}):
        room = room_of(module)
        if is_in(module, "pref_jax") and room and room not in LAYER:
            violations.append(f"{module}: `{room}` has no layer in this test")
    for found in imports_of(sources):
        if not is_in(found.module, "pref_jax"):
            continue
        if is_in(found.target, "experiments") or is_in(found.target, "scripts"):
            violations.append(f"{found}: pref_jax stands below it")
        if not is_in(found.target, "pref_jax"):
            continue
        if found.target == "pref_jax":
            violations.append(f"{found}: import from the module that defines the name")
            continue
        room, target = room_of(found.module), room_of(found.target)
        if room in ("", target):
            continue
        above, below = LAYER.get(room, TOP), LAYER.get(target, TOP)
        if below > above:
            violations.append(f"{found}: a layer above it")
        elif above == below == TOP:
            violations.append(f"{found}: rooms of the top layer stay apart")
    return violations


def cycle_violations(sources: dict[str, str]) -> list[str]:
    graph = {module_name(path): set() for path in sources}
    for found in imports_of(sources):
        if found.target in graph and found.target != found.module:
            graph[found.module].add(found.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def experiment_violations(sources: dict[str, str]) -> list[str]:
    """Experiments that import each other: what two share is in worlds or pref_jax.

    An experiment is a module or a package.
    """
    return [
        str(found)
        for found in imports_of(sources)
        if is_in(found.module, "experiments")
        and is_in(found.target, "experiments")
        and not is_in(found.target, "experiments.worlds")
        and room_of(found.target) != room_of(found.module)
    ]


def third_party_violations(sources: dict[str, str]) -> list[str]:
    """Packages away from home, at the top of a module, or in the pure maths."""
    violations = []
    for found in imports_of(sources):
        package = found.target.split(".")[0]
        if package in FORBIDDEN and not is_in(found.module, "tests.parity"):
            violations.append(f"{found}: only tests/parity compares with it")
        if not is_in(found.module, "pref_jax"):
            continue
        homes = HOMES.get(package, ("pref_jax",))
        if not any(is_in(found.module, home) for home in homes):
            violations.append(f"{found}: it belongs in {' or '.join(homes)}")
        if package in SLOW_TO_IMPORT and not found.lazy:
            violations.append(f"{found}: import it inside the function that needs it")
        layer = LAYER.get(room_of(found.module), TOP)
        if layer <= METHOD and package not in OF_PURE_MODULES:
            violations.append(f"{found}: pure maths needs jax and numpy alone")
    return violations


def lines_of_code(source: str) -> int:
    """Counts lines that hold more than comments, docstrings and blanks."""
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENCODING)
    blank += (tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in blank:
            lines.update(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines.difference_update(
                range(node.body[0].lineno, node.body[0].end_lineno + 1)
            )
    return len(lines)


def heavy_imports(modules: list[str], folder: Path) -> dict[str, list[str]]:
    """For each module in turn: which heavy packages a fresh Python then holds."""
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1].split():\n"
        "    importlib.import_module(name)\n"
        "    print(name, *(p for p in sys.argv[2].split() if p in sys.modules))\n"
    )
    command = [sys.executable, "-c", program, " ".join(modules), " ".join(HEAVY)]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    lines = (line.split() for line in process.stdout.splitlines())
    return {name: heavy for name, *heavy in lines if heavy}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in ("pref_jax", "experiments", "scripts", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def test_imports_point_down(sources):
    assert layer_violations(sources) == []


def test_no_module_imports_itself_in_a_circle(sources):
    assert cycle_violations(sources) == []


def test_experiments_do_not_import_each_other(sources):
    assert experiment_violations(sources) == []


def test_third_parties_stay_in_their_homes(sources):
    assert third_party_violations(sources) == []


def test_pure_maths_loads_nothing_heavy(sources):
    pure = [
        name
        for name in map(module_name, sources)
        if is_in(name, "pref_jax") and LAYER.get(room_of(name), 0) <= METHOD
    ]
    assert "pref_jax.types" in pure
    assert heavy_imports(pure, ROOT) == {}


def test_modules_are_named_after_a_noun(sources):
    named = {path: set(module_name(path).split(".")) for path in sources}
    assert [path for path, names in named.items() if names & NO_NOUN] == []


def test_no_file_is_too_long(sources):
    lengths = {path: lines_of_code(source) for path, source in sources.items()}
    assert {p: n for p, n in lengths.items() if n > MAX_LINES_OF_CODE} == {}


def test_every_public_name_is_where_the_package_says():
    for name in pref_jax.__all__:
        assert getattr(pref_jax, name) is not None
    assert set(dir(pref_jax)) == set(pref_jax.__all__)
    assert set(losses.__all__) <= set(pref_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pref_jax.nothing


def test_top_level_holds_only_what_is_agreed(tracked_files):
    entries = {path.parts[0] for path in tracked_files}
    assert {name for name in entries if name[0] != "."} <= TOP_LEVEL


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("losses/pairwise.py", "from pref_jax.train import step", "layer above"),
        ("types.py", "def f():\n  import pref_jax.logps", "layer above"),
        ("data/rows.py", "from ..models.decoder import hidden", "stay apart"),
        ("train/step.py", "from experiments import xpo", "stands below"),
        ("logps.py", "from pref_jax import dpo_loss", "that defines the name"),
        ("extra.py", "", "`extra` has no layer"),
        ("losses/pairwise.py", "from pref_jax.rewards import implicit", None),
        ("train/step.py", "from . import state\nimport pref_jax.method", None),
        ("method.py", "from pref_jax import anchors", None),
    ],
)
def test_the_layers_are_checked(path, source, message):
    others = ("train/step.py", "train/state.py", "models/decoder.py", "anchors.py")
    sources = {f"pref_jax/{name}": "" for name in ("__init__.py", *others)}
    violations = layer_violations(sources | {f"pref_jax/{path}": source})
    assert len(violations) == (message is not None)
    assert message is None or message in violations[0]


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("pref_jax/train/step.py", "from flax import nnx", "belongs in pref_jax.mod"),
        ("pref_jax/data/rows.py", "import optax", "belongs in pref_jax.train"),
        ("pref_jax/data/templates.py", "import transformers", "inside the function"),
        ("pref_jax/data/rows.py", "def f():\n  import torch.nn", "only tests/parity"),
        ("experiments/xpo.py", "import tensorflow", "only tests/parity"),
        ("pref_jax/evals/ranking.py", "import scipy.stats", "jax and numpy alone"),
        ("pref_jax/data/templates.py", "def f():\n  import transformers", None),
        ("pref_jax/train/step.py", "import optax\nimport orbax.checkpoint", None),
        ("pref_jax/logps.py", "import math\nimport jax.numpy as jnp", None),
        ("experiments/xpo.py", "import tyro, optax", None),
        ("tests/parity/test_llama.py", "import torch", None),
    ],
)
def test_the_homes_are_checked(path, source, message):
    violations = third_party_violations({path: source})
    assert len(violations) == (message is not None)
    assert message is None or message in violations[0]


def test_circles_and_ties_between_experiments_are_found():
    a, b = "from pref_jax.b import x", "def f():\n  from .a import y"
    assert cycle_violations({"pref_jax/a.py": a, "pref_jax/b.py": b})
    assert not cycle_violations({"pref_jax/a.py": a, "pref_jax/b.py": ""})
    shared = "from experiments.worlds import bandit\n"
    xpo = {"experiments/xpo.py": shared, "experiments/worlds/bandit.py": ""}
    assert not experiment_violations(xpo)
    assert experiment_violations(xpo | {"experiments/adpo.py": "from . import xpo"})
    parts = {
        "experiments/adpo/__init__.py": "",
        "experiments/adpo/__main__.py": "from experiments.adpo import arms",
        "experiments/adpo/arms.py": shared,
    }
    assert not experiment_violations(xpo | parts)
    parts["experiments/adpo/arms.py"] = "from experiments import xpo"
    assert experiment_violations(xpo | parts)


def test_lines_of_code_leave_out_comments_docstrings_and_blanks():
    source = '"""A.\n\nB.\n"""\n\n# c\nx = """1\n2\n"""  # d\ndef f():\n  """E."""\n'
    assert lines_of_code(source + "  return (\n    x\n  )\n") == 3 + 1 + 3


def test_heavy_imports_are_seen(tmp_path):
    (tmp_path / "flax.py").touch()
    (tmp_path / "maths.py").write_text("import flax")
    (tmp_path / "light.py").touch()
    assert heavy_imports(["light", "maths"], tmp_path) == {"maths": ["flax"]}
