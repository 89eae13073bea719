"""Do the tests notice? Small changes of the maths, and what its tests say to each.

    python scripts/mutants.py --sample 50              a trial, of all files
    python scripts/mutants.py --files pref_jax/rewards.py
    python scripts/mutants.py --confirm 15 --write docs/records

A mutant is a file with one change (`mutations.py`), and is caught if a test fails, if
the process dies or if the time limit is reached. One that survives is a gap in the
tests, unless docs/records/mutants_equivalent.json says why no test can tell it from
the original: a list of its file, function, line, mutation and change, as the record has
them, and a reason. An entry that is not, or no longer, such a survivor is stale.

Processes hold jax and what it compiled, and run one mutant after another; what one
finds helps the next, which begins with the tests that failed before. `--confirm`
repeats some results the slow way: a fresh process on a changed copy of the repository.
Every result goes into runs/mutants.jsonl: an interrupted command goes on where it was,
and results stand until the library or their tests change. With `--files` a record keeps
what it has of other files, each with the commit that it is of.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import wait

import tyro

from mutations import PLACE, Mutant, mutants_of, printed
from pref_jax.train.logging import Progress, configure_logging
from pref_jax.train.run import environment, write_json

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKER = pathlib.Path(__file__).with_name("mutant_worker.py")
EQUIVALENT = "docs/records/mutants_equivalent.json"
FILES = (
    "pref_jax/losses/*.py",
    *(f"pref_jax/{name}.py" for name in ("rewards", "anchors", "targets")),
    *(f"pref_jax/{name}.py" for name in ("q_values", "logps", "numerics")),
    "pref_jax/evals/ranking.py",
)
# Besides the file of the same place: tests/losses/test_pairwise.py of losses/pairwise.
SHARED_TESTS = {
    "pref_jax/losses/*.py": (
        "tests/losses/test_all_losses.py",
        "tests/losses/test_outside_values.py",
    ),
    "pref_jax/losses/entries.py": ("tests/losses/test_pairwise.py",),
    "pref_jax/losses/policy_gradient.py": ("tests/losses/test_advantages.py",),
    "pref_jax/losses/supervised.py": ("tests/losses/test_divergences.py",),
    "pref_jax/logps.py": ("tests/test_token_weights.py",),
    "pref_jax/rewards.py": ("tests/losses/test_diffusion.py",),
}
_LIFETIME = 200  # mutants of a process: jax keeps all that it compiled
_BETWEEN_CONTROLS = 100  # mutants of a file; then the unchanged one must still pass
_logger = logging.getLogger("pref_jax.mutants")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to change, and how to run the tests."""

    files: tuple[str, ...] = ()  # such as pref_jax/rewards.py; none: all
    sample: int | None = None  # mutants drawn at random, for a trial
    seed: int = 0  # of what is drawn
    jobs: int | None = None  # processes; None: one a core
    time_limit: float = 120.0  # seconds, of the tests of one mutant
    confirm: int = 0  # results of either kind that are repeated the slow way
    results: str = "runs/mutants.jsonl"  # what is done
    write: str | None = None  # folder for mutants.json

    def __post_init__(self):
        if self.write is not None and self.sample is not None:
            raise ValueError(
                "`write` makes a record of all mutants of a file; leave out `sample`."
            )
        if self.sample is not None and self.sample < 1:
            raise ValueError(f"`sample` must be at least 1; got {self.sample}.")


def tests_of(file: str, root: pathlib.Path = ROOT) -> tuple[str, ...]:
    """The tests that should notice a change of a file.

    Raises:
      ValueError: there are none.

    >>> tests_of("pref_jax/targets.py")
    ('tests/test_targets.py',)
    """
    path = pathlib.PurePath(file)
    own = pathlib.PurePath("tests", *path.parts[1:-1], f"test_{path.name}").as_posix()
    shared = [t for pattern, t in SHARED_TESTS.items() if path.match(pattern)]
    names = dict.fromkeys([own, *(name for names in shared for name in names)])
    found = tuple(name for name in names if (root / name).is_file())
    if not found:
        raise ValueError(
            f"{file} has no tests: there is none of {', '.join(names)}. Write one, or "
            f"name its tests in SHARED_TESTS."
        )
    return found


def find_mutants(root: pathlib.Path, patterns: Iterable[str] = ()) -> list[Mutant]:
    """All mutants of the files that `patterns` name, by default of `FILES`."""
    found = []
    for pattern in patterns or FILES:
        paths = sorted(root.glob(pattern))
        if patterns and not paths:
            raise ValueError(f"`files` names {pattern}, and there is no such file.")
        for path in paths:
            file = path.relative_to(root).as_posix()
            found += mutants_of(path.read_text("utf-8"), file)
    return found


def _by_file(mutants: Iterable[Mutant]) -> dict[str, list[Mutant]]:
    found = collections.defaultdict(list)
    for mutant in mutants:
        found[mutant.file].append(mutant)
    return dict(found)


def _unchanged(file: str) -> Mutant:
    """A file as it is: its tests must pass."""
    return Mutant(file, "", "", "", "", "")


class _Worker:
    """The process of `mutant_worker.py`, in a session of its own: Ctrl-C is ours.

    Args:
      root: of the repository.
      cache: folder of what jax compiled, for all processes: most of what a test needs
        is the same for all mutants.
    """

    def __init__(self, root: pathlib.Path, cache: str):
        self._errors = tempfile.TemporaryFile()
        self.connection, theirs = Pipe()
        self.answered = 0
        variables = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(root), str(theirs.fileno())],
            env=os.environ | variables,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            start_new_session=True,
        )
        theirs.close()
        try:
            self.connection.recv()  # it has begun
        except EOFError:
            raise ValueError(f"A process does not start:\n{self.errors()}") from None

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()
        self._errors.close()


class Pool:
    """Processes that answer requests, several at once."""

    def __init__(self, root: pathlib.Path, *, jobs: int, time_limit: float):
        self._root, self._jobs, self._time_limit = root, jobs, time_limit
        self._cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._waiting = collections.deque()
        self._idle: list[_Worker] = []
        self._busy: dict = {}  # connection -> worker, what was asked, when

    def run(self, items: Iterable, make_request) -> Iterator[tuple]:
        """Yield (item, answer), in the order in which they end.

        Args:
          items: anything.
          make_request: item -> request of `mutant_worker`, when its turn comes.
        """
        self._waiting.extend(items)
        while self._waiting or self._busy:
            while self._waiting and len(self._busy) < self._jobs:
                worker = self._idle.pop() if self._idle else self._start()
                item = self._waiting.popleft()
                with contextlib.suppress(OSError):  # it is dead, as `_answers` will see
                    worker.connection.send(make_request(item))
                self._busy[worker.connection] = worker, item, time.monotonic()
            yield from self._answers(wait(list(self._busy), timeout=1.0))

    def _answers(self, ready) -> Iterator[tuple]:
        now = time.monotonic()
        for connection, (worker, item, began) in list(self._busy.items()):
            if connection in ready:
                try:
                    answer = connection.recv()
                    worker.answered += 1
                except (EOFError, OSError):
                    answer = {"code": "crash", "output": worker.errors()}
            elif now - began > self._time_limit:
                answer = {"code": "timeout", "output": ""}
            else:
                continue
            del self._busy[connection]
            stopped = answer["code"] in ("crash", "timeout")
            if stopped or worker.answered == _LIFETIME:
                worker.stop()
            else:
                self._idle.append(worker)
            if answer["code"] == "crash" and worker.answered:
                self._waiting.appendleft(item)  # it may have died of another: once more
                continue
            yield item, {"by": None, "loaded": True} | answer | {"seconds": now - began}

    def _start(self) -> _Worker:
        return _Worker(self._root, self._cache.name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in [*self._idle, *(entry[0] for entry in self._busy.values())]:
            worker.stop()
        self._cache.cleanup()


def _digest(root: pathlib.Path, tests: Iterable[str]) -> str:
    """Of all that a result rests on: the library, its tests and what tests import."""
    helpers = (p for p in (root / "tests").rglob("*.py") if p.name[:5] != "test_")
    paths = {*(root / "pref_jax").rglob("*.py"), *helpers, *(root / t for t in tests)}
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """What was found, kept in a file of one line a mutant.

    Args:
      path: of the file.
      digests: file -> digest of what a result of this file rests on. Older lines tell
        only which test to begin with.
    """

    def __init__(self, path: pathlib.Path, digests: dict[str, str]):
        self._path, self._digests = path, digests
        self._found: dict[tuple, dict] = {}
        self._killer: dict[tuple, str] = {}
        self._killers = collections.defaultdict(collections.Counter)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(
            "\n"
        ):  # cut off when the process was killed
            path.write_text("".join(lines[:-1]))
            del lines[-1]
        for line in lines:
            self._take(json.loads(line))

    def _take(self, line: dict) -> None:
        place = tuple(line["place"].values())
        file, function = place[:2]
        if line["digest"] == self._digests.get(file):
            self._found[place] = line
        if line["by"]:
            self._killer[place] = line["by"]
            self._killers[file, function][line["by"]] += 1

    def get(self, mutant: Mutant) -> dict | None:
        """The line of a mutant, if it is done."""
        return self._found.get(tuple(mutant.place.values()))

    def add(self, mutant: Mutant, answer: dict) -> None:
        """Keep what a worker answered."""
        verdict = {0: "survived", "crash": "crash", "timeout": "timeout"}
        line = {
            "place": mutant.place,
            "verdict": verdict.get(answer["code"], "caught"),
            "by": answer["by"],
            "seconds": round(answer["seconds"], 3),
            "digest": self._digests[mutant.file],
        }
        self._take(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def first_tests(self, mutant: Mutant) -> list[str]:
        """Tests that failed before: on this change, else on others of its function."""
        place = tuple(mutant.place.values())
        own = [self._killer[place]] if place in self._killer else []
        return own + [name for name, _ in self._killers[place[:2]].most_common(5)]


def _with_controls(mutants: Iterable[Mutant]) -> Iterator[Mutant]:
    """Mutants, and now and then their file as it is: has one left something behind?"""
    for file, several in _by_file(mutants).items():
        for start in range(0, len(several), _BETWEEN_CONTROLS):
            yield from several[start : start + _BETWEEN_CONTROLS]
            yield _unchanged(file)


def run_tests(
    config: Config, root: pathlib.Path, mutants: list[Mutant], results: Results
) -> None:
    """Add the results of `mutants`.

    Raises:
      ValueError: tests fail on a file as it is, or cannot be run.
    """
    files = list(_by_file(mutants))
    tests = {file: tests_of(file, root) for file in files}
    sources = {file: printed((root / file).read_text("utf-8")) for file in files}

    def request(mutant):
        return {
            "file": mutant.file,
            "source": mutant.source or sources[mutant.file],
            "tests": tests[mutant.file],
            "first": results.first_tests(mutant),
            "mention": mutant.function.rpartition(".")[2],
        }

    def check(file, answer):
        names, code, seconds = " ".join(tests[file]), answer["code"], answer["seconds"]
        if code != 0:
            raise ValueError(
                f"{names} must pass on {file} as it is; got {code} after {seconds:.0f} "
                f"s. If they pass alone, what an earlier mutant left in the process "
                f"spoils them: remove {config.results}.\n{answer['output'][-3000:]}"
            )
        if not answer["loaded"]:
            raise ValueError(f"{names} never import {file}: they cannot notice.")

    jobs, done = config.jobs or os.cpu_count(), 0
    with (
        Pool(root, jobs=jobs, time_limit=config.time_limit) as pool,
        Progress("mutants", len(mutants), unit="mutants") as progress,
    ):
        for control, answer in pool.run(map(_unchanged, files), request):
            check(control.file, answer)
            seconds = answer["seconds"]
            _logger.info("%s passes as it is, in %.1f s", control.file, seconds)
        for mutant, answer in pool.run(_with_controls(mutants), request):
            if not mutant.source:
                check(mutant.file, answer)
                continue
            if answer["code"] in (4, 5):  # pytest's: wrong usage, no tests
                raise ValueError(f"{mutant}: tests do not run.\n{answer['output']}")
            results.add(mutant, answer)
            done += 1
            progress.count(done)


def confirm(root: pathlib.Path, mutants: list[tuple[Mutant, bool]]) -> list[str]:
    """Repeat results the slow way; a line for each that is another one.

    Args:
      root: of the repository.
      mutants: (mutant, whether it was caught).
    """
    others = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress("confirmed", len(mutants), unit="mutants") as progress,
    ):
        clone = pathlib.Path(folder) / "clone"
        left_out = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__")
        shutil.copytree(root, clone, ignore=left_out)
        for done, (mutant, caught) in enumerate(mutants, start=1):
            original = (clone / mutant.file).read_text("utf-8")
            (clone / mutant.file).write_text(mutant.source, "utf-8")
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow"]
            process = subprocess.run(
                [*command, "-p", "no:cacheprovider", *tests_of(mutant.file, root)],
                cwd=clone,
                env=os.environ | {"PYTHONPATH": str(clone)},
                capture_output=True,
            )
            (clone / mutant.file).write_text(original, "utf-8")
            if (process.returncode != 0) != caught:
                others.append(f"{mutant}: exit code {process.returncode}")
            progress.count(done)
    return others


def read_reasons(root: pathlib.Path) -> dict[tuple, str]:
    """Place of an equivalent mutant -> why no test can notice it.

    Raises:
      ValueError: an entry lacks a part or has one too many.
    """
    path = root / EQUIVALENT
    reasons = {}
    for entry in json.loads(path.read_text("utf-8")) if path.exists() else []:
        if set(entry) != {*PLACE, "reason"} or not entry["reason"]:
            raise ValueError(
                f"{path.name}: an entry needs {', '.join(PLACE)} and a reason; got "
                f"{json.dumps(entry)}."
            )
        reasons[tuple(entry[name] for name in PLACE)] = entry["reason"]
    return reasons


def make_record(
    root: pathlib.Path, mutants: list[Mutant], results: Results
) -> dict[str, list | dict]:
    """Counts by file, the survivors, and entries of equivalents that are stale."""
    reasons = read_reasons(root)
    files, survivors, verdicts = {}, [], {}
    for file, several in _by_file(mutants).items():
        counts = collections.Counter()
        for mutant in several:
            place = tuple(mutant.place.values())
            verdict = verdicts[place] = results.get(mutant)["verdict"]
            counts[verdict] += 1
            if verdict == "survived":
                reason = reasons.get(place)
                counts["gap" if reason is None else "equivalent"] += 1
                survivors.append(mutant.place | {"reason": reason})
        files[file] = {
            "tests": list(tests_of(file, root)),
            "mutants": len(several),
            "caught": len(several) - counts["survived"],
            "of_them_stopped": counts["crash"] + counts["timeout"],
            "equivalent": counts["equivalent"],
            "gaps": counts["gap"],
        }
    stale = [
        dict(zip(PLACE, place, strict=True)) | {"now": verdicts.get(place, "gone")}
        for place in reasons
        if verdicts.get(place) != "survived"
    ]
    return {"files": files, "survivors": survivors, "stale": stale}


def run(config: Config, root: pathlib.Path = ROOT) -> dict:
    """Test what is not yet tested; returns the record.

    Raises:
      ValueError: tests fail on a file as it is, or a result is not confirmed.
    """
    mutants, rng = find_mutants(root, config.files), random.Random(config.seed)
    if config.sample is not None:
        size = min(config.sample, len(mutants))
        mutants = [mutants[i] for i in sorted(rng.sample(range(len(mutants)), size))]
    files = _by_file(mutants)
    digests = {file: _digest(root, tests_of(file, root)) for file in files}
    results = Results(root / config.results, digests)
    left = [mutant for mutant in mutants if results.get(mutant) is None]
    _logger.info("%d mutants of %d files, %d left", len(mutants), len(files), len(left))
    if left:
        run_tests(config, root, left, results)
    record = make_record(root, mutants, results)
    if config.sample is not None or config.files:  # what is left out may be stale
        looked_at = files if config.sample is None else ()
        record["stale"] = [x for x in record["stale"] if x["file"] in looked_at]
    if config.confirm:
        repeated = []
        for kind in ("caught", "survived"):
            found = [m for m in mutants if results.get(m)["verdict"] == kind]
            drawn = rng.sample(found, min(config.confirm, len(found)))
            repeated += [(mutant, kind == "caught") for mutant in drawn]
        if others := confirm(root, repeated):
            raise ValueError("A fresh process disagrees:\n" + "\n".join(others))
        record["confirmed"] = len(repeated)
    if config.write is not None:
        seconds = [results.get(mutant)["seconds"] for mutant in mutants]
        record["seconds_per_mutant"] = round(sum(seconds) / len(seconds), 2)
        record["environment"] = environment()
        for counts in record["files"].values():
            counts["commit"] = record["environment"]["commit"]
        path = root / config.write / "mutants.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = record
        if config.files and path.exists():
            kept = _joined(json.loads(path.read_text()), record)
        write_json(path, kept)
    return record


def _joined(old: dict, new: dict) -> dict:
    """A record with its files that were looked at again replaced."""
    others = {f: counts for f, counts in old["files"].items() if f not in new["files"]}
    of_others = {
        part: [entry for entry in old[part] if entry["file"] in others]
        for part in ("survivors", "stale")
    }
    # In the order of the old record, what is new at the end.
    files = {file: new["files"].get(file, old["files"][file]) for file in old["files"]}
    return new | {
        "files": files | new["files"],
        **{part: entries + new[part] for part, entries in of_others.items()},
    }


def report(record: dict) -> None:
    """Print the gaps, what is stale, and a line for each file."""
    for survivor in record["survivors"]:
        if survivor["reason"] is None:
            print("gap:", json.dumps(survivor))
    for place in record["stale"]:
        print(f"stale in {EQUIVALENT}:", json.dumps(place))
    for file, counts in record["files"].items():
        print(
            f"{file}: {counts['caught']} of {counts['mutants']} caught, "
            f"{counts['equivalent']} equivalent, {counts['gaps']} gaps"
        )


def main() -> int:
    """The command line; 1 if there are gaps or stale entries."""
    configure_logging()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        record = run(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("Stopped. The same command goes on.") from None
    report(record)
    gaps = any(survivor["reason"] is None for survivor in record["survivors"])
    return int(gaps or bool(record["stale"]))


if __name__ == "__main__":
    sys.exit(main())
