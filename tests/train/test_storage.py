"""What is written to a disk or a bucket is whole, and what grows is copied up."""

import importlib.util
import shutil
import threading
import time

import pytest
from etils import epath

import object_store
from pref_jax.train import storage
from pref_jax.train.storage import (
    Mirror,
    as_folder,
    fetch,
    is_object_store,
    write_text,
)


@pytest.fixture
def bucket(monkeypatch):
    return object_store.install(monkeypatch)


def test_the_double_refuses_what_a_store_cannot_do(bucket):
    folder = epath.Path("gs://bucket/a")
    folder.mkdir(parents=True)
    assert not folder.exists()
    (folder / "x").write_text("one")
    assert folder.is_dir() and bucket.puts == ["/bucket/a/x"]
    with pytest.raises(AssertionError, match="no mode 'ab'"):
        (folder / "x").open("ab")
    with pytest.raises(AssertionError, match="cannot rename"):
        (folder / "x").rename(folder / "y")
    file = (folder / "z").open("wb")
    file.write(b"part")
    assert not (folder / "z").exists()
    file.close()
    assert (folder / "z").read_bytes() == b"part"


def test_a_disk_needs_no_package_and_a_bucket_says_which_is_missing(monkeypatch):
    found = importlib.util.find_spec

    def without(name, *args):
        return None if name in ("gcsfs", "tensorflow") else found(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert as_folder("runs/a") == epath.Path("runs/a")
    with pytest.raises(ImportError) as raised:
        as_folder("gs://bucket/runs")
    assert "gs://bucket/runs lies on Google Cloud Storage" in str(raised.value)
    assert "pip install 'pref_jax[tpu]'" in str(raised.value)


def test_other_stores_are_refused_by_name(bucket):
    with pytest.raises(ValueError, match="on a disk or on gs://; got 's3://b/runs'"):
        as_folder("s3://b/runs")
    assert is_object_store(as_folder("gs://b/runs")) and not is_object_store("b/runs")


def test_a_text_is_written_in_one_request(bucket):
    path = epath.Path("gs://bucket/run/done.json")
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert bucket.puts == 2 * ["/bucket/run/done.json"]


def test_a_mirror_copies_what_has_changed(bucket):
    remote = epath.Path("gs://bucket/run")
    with Mirror(remote, seconds=None) as mirror:
        folder = mirror.folder
        (folder / "events").mkdir()
        (folder / "a.txt").write_text("1")
        (folder / "events" / "b").write_text("2")
        (folder / "link").symlink_to(folder / "a.txt")
        assert not remote.exists()
        mirror.flush()
        mirror.flush()
        assert bucket.puts == ["/bucket/run/a.txt", "/bucket/run/events/b"]
        (folder / "a.txt").write_text("longer")
    assert bucket.puts[2:] == ["/bucket/run/a.txt"]
    assert (remote / "a.txt").read_text() == "longer"
    assert not folder.exists()


def test_a_mirror_copies_by_itself_and_tries_again(bucket, monkeypatch, caplog):
    remote = epath.Path("gs://bucket/run")
    failing = threading.Event()
    failing.set()
    write_bytes = epath.Path.write_bytes

    def unreliable(path, data):
        if failing.is_set():
            raise OSError("no network")
        return write_bytes(path, data)

    monkeypatch.setattr(type(remote), "write_bytes", unreliable)
    with Mirror(remote, seconds=0.01) as mirror:
        (mirror.folder / "a").write_text("1")
        deadline = time.monotonic() + 10
        while "could not copy to gs://bucket/run: no network" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        failing.clear()
        while not (remote / "a").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_what_could_not_be_copied_at_the_end_is_kept_and_named(bucket, monkeypatch):
    def refuse(path, data):
        raise OSError("quota")

    remote = epath.Path("gs://bucket/run")
    monkeypatch.setattr(type(remote), "write_bytes", refuse)
    mirror = Mirror(remote, seconds=None)
    (mirror.folder / "a").write_text("1")
    with pytest.raises(OSError, match="run: quota\nThe files stay in ") as raised:
        mirror.close()
    assert str(mirror.folder) in str(raised.value)
    assert (mirror.folder / "a").read_text() == "1"
    monkeypatch.undo()
    shutil.rmtree(mirror.folder)


def test_a_file_is_not_read_while_it_is_written(bucket):
    remote = epath.Path("gs://bucket/run")
    with Mirror(remote, seconds=None) as mirror:
        (mirror.folder / "a").write_text("1")
        with mirror.lock:
            copier = threading.Thread(target=mirror.flush)
            copier.start()
            (mirror.folder / "a").write_text("1 2")
            time.sleep(0.05)
            assert not bucket.puts
            (mirror.folder / "a").write_text("1 2 3")
        copier.join()
        assert (remote / "a").read_text() == "1 2 3"


# --- copies of what lies in a bucket --------------------------------------------------


@pytest.fixture
def cache(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(**files):
    """Objects of gs://bucket/data by name; `__` is a dot and `_` a slash."""
    for name, text in files.items():
        path = name.replace("__", ".").replace("_", "/")
        epath.Path(f"gs://bucket/data/{path}").write_bytes(text.encode())


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in files
        if not path.name.startswith(".")
    }


def test_a_folder_is_copied_once_and_then_what_has_changed(cache, caplog):
    caplog.set_level("INFO", "pref_jax")
    put(a__json="one", b__bin="weights", c__json="three", deep_a__json="inside")
    patterns = ("*.json", "*.txt")
    folder = fetch("gs://bucket/data/", patterns=patterns)
    assert folder == str(cache / "bucket" / "data")
    assert contents(cache) == {
        "bucket/data/a.json": "one",
        "bucket/data/c.json": "three",
    }
    assert "copying 2 files" in caplog.text
    caplog.clear()
    fetch("gs://bucket/data", patterns=patterns)
    assert caplog.text == ""
    put(a__json="once more")
    epath.Path("gs://bucket/data/c.json").unlink()
    fetch("gs://bucket/data", patterns=patterns)
    assert "copying 1 files" in caplog.text
    assert contents(cache) == {"bucket/data/a.json": "once more"}


def test_a_file_that_was_deleted_or_cut_here_is_copied_again(cache):
    put(a__json="one")
    here = cache / "bucket" / "data" / "a.json"
    for spoil in (here.unlink, lambda: here.write_text("o"), lambda: None):
        assert fetch("gs://bucket/data/a.json") == str(here)
        assert here.read_text() == "one"
        spoil()


def test_a_pattern_comes_back_as_a_pattern_of_the_copies(cache):
    put(x_a__jsonl="one", x_y_b__jsonl="two", x_note__txt="other")
    found = fetch("gs://bucket/data/*/y/*.jsonl")
    assert found == str(cache / "bucket/data/*/y/*.jsonl")
    assert contents(cache / "bucket/data") == {"x/y/b.jsonl": "two"}
    fetch("gs://bucket/data/x/a*")
    assert contents(cache / "bucket/data") == {
        "x/a.jsonl": "one",
        "x/y/b.jsonl": "two",
    }


def test_a_bucket_is_not_searched_through_and_through(cache):
    with pytest.raises(ValueError, match="write each level as `\\*`"):
        fetch("gs://bucket/data/**/*.jsonl")


def test_a_copy_that_fails_leaves_nothing_that_looks_whole(cache, monkeypatch):
    put(a__json="one")

    def fail(source, file, chunk):
        file.write(b"on")
        raise OSError("connection lost")

    with monkeypatch.context() as broken:
        broken.setattr(storage.shutil, "copyfileobj", fail)
        with pytest.raises(OSError, match="connection lost"):
            fetch("gs://bucket/data")
    assert contents(cache) == {}
    fetch("gs://bucket/data")
    assert contents(cache) == {"bucket/data/a.json": "one"}


def test_what_is_not_there_or_does_not_fit_is_an_error(cache, monkeypatch):
    with pytest.raises(ValueError, match="gs://bucket/none: there is no such file or"):
        fetch("gs://bucket/none")
    put(a__json="one")
    with pytest.raises(ValueError, match=r"or nothing in it that is named \*\.safeten"):
        fetch("gs://bucket/data", patterns=("*.safetensors",))
    usage = shutil.disk_usage(".")._replace(free=2)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="disk has 0.0 GB left. Set PREF_JAX_CACHE"):
        fetch("gs://bucket/data")
