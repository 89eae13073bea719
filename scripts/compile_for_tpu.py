r"""Compile an experiment for TPUs that are not there: does it fit, how fast at best?

    pip install 'jax[tpu]'
    python scripts/compile_for_tpu.py --experiment finetune --preset NAME \
        --topology v5p:4x4x4 --fsdp 16 --tensor 4 --write docs/records

It imports `experiments.MODULE` and compiles what its `programs(config, mesh)` returns
for that topology. Options that are not named below change the preset's config, as they
do when the experiment is run. `--write` keeps the figures for scripts/tables.py.

Nothing is run: times are estimates from what the chips can do at most (docs/tpu.md says
how). The exit code is 1 if a program does not fit.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import pathlib
import re
import sys

import jax
import tyro
from rich.console import Console
from rich.table import Table

from pref_jax.train import costs as costs_lib
from pref_jax.train import run as run_lib
from pref_jax.train import topology as topology_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile, and for which chips."""

    experiment: str  # module of experiments/
    preset: str  # one of its PRESETS
    topology: str  # generation and shape of a slice, such as v5p:4x4x4 or v5e:16x16
    num_slices: int = 1  # such slices, joined by a data-center network
    data: int | None = None  # mesh axis; -1: the chips that are left
    fsdp: int | None = None  # mesh axis; None: as the config has it in `mesh`
    tensor: int | None = None  # mesh axis
    write: str | None = None  # folder of records, such as docs/records


def describe(program, costs, mesh, chip) -> dict:
    """The figures of one program as plain JSON values."""
    times = costs_lib.roofline(costs, mesh, chip)
    ways = ("with_overlap", "without_overlap")
    return {
        "name": costs.name,
        "fits": costs.memory.total <= chip.hbm_bytes,
        "memory": {**dataclasses.asdict(costs.memory), "total": costs.memory.total},
        "useful_flops": costs.useful_flops,
        "formula": costs.formula,
        "flops": costs.flops,
        "hbm_bytes": costs.hbm_bytes,
        "sent": [
            {"kind": kind, "axes": list(axes), "bytes": num_bytes}
            for (kind, axes), num_bytes in costs.sent().items()
        ],
        "unknown_loops": list(costs.unknown_loops),
        "seconds": {
            **{name: getattr(times, name) for name in ("compute", "hbm", "ici", *ways)},
            "limit": times.limit,
        },
        "mfu": {way: times.mfu(getattr(times, way)) for way in ways},
        "advice": costs_lib.advice(program, costs, mesh, chip),
        "compile_seconds": costs.compile_seconds,
    }


def make_record(options: Options, config, mesh, programs: list[dict]) -> dict:
    """All figures with what they were made from; no paths and no host names."""
    environment = run_lib.environment()
    try:
        environment["versions"]["libtpu"] = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        environment["versions"]["libtpu"] = "none"
    chip = topology_lib.find_chip(options.topology)
    return {
        "experiment": options.experiment,
        "preset": options.preset,
        "topology": options.topology,
        "mesh": dict(mesh.shape),
        "chip": {**dataclasses.asdict(chip), "peak_flops": chip.peak_flops},
        "config": _without_folders(dataclasses.asdict(config)),
        "programs": programs,
        "environment": environment,
    }


def _without_folders(value):
    """Plain values whose absolute paths are cut to the last name."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~/")):
        return pathlib.PurePath(value).name
    return value


def record_name(options: Options) -> str:
    """Of the file, such as tpu_8b_v5p_4x4x4."""
    several = f"{options.num_slices}_x_" if options.num_slices > 1 else ""
    name = f"{options.preset}_{several}{options.topology}"
    return "tpu_" + re.sub(r"[^\w.]+", "_", name)


def show(record: dict, console: Console) -> None:
    """Print the figures: a column for each program."""
    chip, mesh = record["chip"], record["mesh"]
    axes = ", ".join(f"{name} {size}" for name, size in mesh.items())
    table = Table(
        title=f"{record['experiment']} {record['preset']} on {record['topology']} "
        f"({axes}): estimate, not run"
    )
    programs = record["programs"]
    table.add_column("of one call")
    for program in programs:
        table.add_column(program["name"], justify="right")

    def row(name, cell):
        table.add_row(name, *(cell(program) for program in programs))

    def gib(num_bytes):
        return f"{num_bytes / GIB:.2f}"

    for part in ("arguments", "outputs", "aliased", "temporaries", "code"):
        row(f"{part}, GiB a chip", lambda p, part=part: gib(p["memory"][part]))
    row(
        "arguments + outputs - aliased + temporaries + code",
        lambda p: f"{gib(p['memory']['total'])} of {gib(chip['hbm_bytes'])}",
    )
    row("fits", lambda p: "yes" if p["fits"] else "NO")
    table.add_section()
    row("useful flops, all chips", lambda p: f"{p['useful_flops']:.4g}")
    row("flops of the products, all chips", lambda p: f"{p['flops']:.4g}")
    row("read and written, GB a chip", lambda p: f"{p['hbm_bytes'] / 1e9:.3g}")
    sent = {(s["kind"], tuple(s["axes"])) for p in programs for s in p["sent"]}
    for kind, over in sorted(sent):
        found = [
            {(s["kind"], tuple(s["axes"])): s["bytes"] for s in p["sent"]}
            for p in programs
        ]
        cells = [f"{sizes.get((kind, over), 0) / 1e9:.3g}" for sizes in found]
        table.add_row(f"{kind} over {', '.join(over)}, GB sent a chip", *cells)
    table.add_section()
    for name, formula in (
        ("compute", "flops / (chips * peak)"),
        ("hbm", "read and written / HBM bandwidth"),
        ("ici", "sent / (links of the axes * link bandwidth)"),
        ("with_overlap", "longest of the three"),
        ("without_overlap", "sum of the three"),
    ):
        label = f"{name.replace('_', ' ')}, s = {formula}"
        row(label, lambda p, name=name: f"{p['seconds'][name]:.4g}")
    row(
        "MFU = useful flops / (chips * peak * s)",
        lambda p: (
            f"{100 * p['mfu']['without_overlap']:.1f} to "
            f"{100 * p['mfu']['with_overlap']:.1f} %"
        ),
    )
    console.print(table)
    if mesh["slice"] > 1:
        console.print(
            "What slices send each other is not in the programs' text: it is in none "
            "of the figures above, and makes a step longer."
        )
    for program in programs:
        console.print(f"{program['name']}: useful flops = {program['formula']}")
        for loop in program["unknown_loops"]:
            console.print(f"  counted once, turns unknown: loop {loop}")
        if program["advice"]:
            missing = program["memory"]["total"] - chip["hbm_bytes"]
            console.print(
                f"{program['name']} does not fit: {gib(missing)} GiB a chip too much. "
                f"In this order, try"
            )
        for line in program["advice"]:
            console.print(f"  - {line}")


def compile_all(options: Options, config, experiment, mesh) -> dict:
    """Compile every program of an experiment; returns the record."""
    chip = topology_lib.find_chip(options.topology)
    programs = [
        describe(program, costs_lib.measure(program, mesh), mesh, chip)
        for program in experiment.programs(config, mesh)
    ]
    return make_record(options, config, mesh, programs)


def load_experiment(name: str):
    """The module of an experiment that can be compiled.

    Raises:
      ValueError: there is none, or it has no `PRESETS` or `programs`.
    """
    if str(ROOT) not in sys.path:  # experiments are not installed
        sys.path.insert(0, str(ROOT))
    try:
        module = importlib.import_module(f"experiments.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("experiments", f"experiments.{name}"):
            raise
        raise ValueError(
            f"`experiment` must name a module of experiments/; got {name!r}."
        ) from None
    missing = [part for part in ("PRESETS", "programs") if not hasattr(module, part)]
    if missing:
        raise ValueError(
            f"experiments.{name} has no {' and no '.join(missing)}: it cannot be "
            f"compiled for another machine. It needs PRESETS, configs by name, and "
            f"programs(config, mesh), which returns a list of `costs.Program`."
        )
    return module


def main(args=None) -> int:
    """The command line; returns the exit code."""
    args = sys.argv[1:] if args is None else args
    options, rest = tyro.cli(
        Options, args=args, description=__doc__, return_unknown_args=True
    )
    # TPUs are not looked for, neither by jax nor by libtpu in the cloud around it.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        experiment = load_experiment(options.experiment)
        config = run_lib.parse_config(
            experiment.PRESETS,
            default=options.preset,
            description=f"Config of experiments.{options.experiment}.",
            args=["--preset", options.preset, *rest],
        )
        axes = dataclasses.asdict(config.mesh) if hasattr(config, "mesh") else {}
        given = {axis: getattr(options, axis) for axis in ("data", "fsdp", "tensor")}
        axes |= {axis: size for axis, size in given.items() if size is not None}
        mesh = topology_lib.topology_mesh(
            options.topology, num_slices=options.num_slices, **axes
        )
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    record = compile_all(options, config, experiment, mesh)
    show(record, Console(width=None if sys.stdout.isatty() else 160))
    if options.write is not None:
        folder = pathlib.Path(options.write)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{record_name(options)}.json"
        run_lib.write_json(path, run_lib.as_read_back(record))
        print(f"wrote {path}")
    return 0 if all(program["fits"] for program in record["programs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
