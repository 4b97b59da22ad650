"""One run at a time per directory, and no run goes on with another configuration unnoticed."""

import errno
import hashlib
import json
import os
import socket
import sys

import jax
import ml_collections
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from densejax.runs import files, workdir
from densejax.runs.workdir import WorkdirError, difference, digest, open_run
from tests import small

make_config = small.tiny  # `changes` by dotted key with `__` for the dot


def history(path):
    """The starts recorded in a run directory."""
    return [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]


def test_default_name_ignores_what_a_resume_may_change():
    base = workdir.default(make_config())
    assert base.startswith("runs/tiny-") and len(base) == len("runs/tiny-") + 8
    same = [
        make_config(log__every_steps=7),
        make_config(checkpoint__keep_latest=9),
        make_config(data__directory="/data"),
        make_config().lock(),
        ml_collections.FrozenConfigDict(make_config()),
    ]
    same += [make_config(data__manual_dir="/archives")]  # of a set that is known
    assert {workdir.default(config) for config in same} == {base}
    folders = [make_config(data__storage="auto", data__manual_dir=name) for name in ("a", "b")]
    assert len({digest(config) for config in folders}) == 2
    other = [
        make_config(seed=1),
        make_config(train__epochs=1),  # a trial must not become the real run's first part
        make_config(model__blocks=(1, 2)),
        make_config(train__batch_size=65),
        make_config(checkpoint__select="best"),
        make_config(data__name="log"),
    ]
    assert len({digest(config) for config in [make_config(), *other]}) == 1 + len(other)


def test_digest_is_that_of_canonical_json():
    config = ml_collections.ConfigDict({"b": {"y": (1, None)}, "a": 0.5, "train": {"epochs": 3}})
    text = '{"a": "0.5", "b.y": "[1, null]", "train.epochs": "3"}'
    assert digest(config) == hashlib.sha256(text.encode()).hexdigest()


def test_difference_is_flat_sorted_and_takes_a_tuple_for_a_list():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None, "gone": True, "empty": {}}
    new = {"a": {"b": 1.5, "c": (1, 2)}, "d": "x", "new": {"k": 0}, "empty": {}}
    assert difference(old, new) == [
        "a.b: 1 -> 1.5",
        'd: null -> "x"',
        "gone: true -> (absent)",
        "new.k: (absent) -> 0",
    ]
    assert difference(old, old) == []


def test_a_new_run_a_resume_and_what_they_record(tmp_path):
    path = tmp_path / "runs" / "a"
    with open_run(path, make_config()) as require_held:
        require_held()
        assert json.loads((path / "lock").read_text())["pid"] == os.getpid()
    assert sorted(entry.name for entry in path.iterdir()) == ["config.json", "history.jsonl"]
    with open_run(path, make_config(train__epochs=301, log__every_steps=7)):
        pass
    assert json.loads((path / "config.json").read_text())["train"]["epochs"] == 301
    first, second = history(path)
    assert first["changes"] == []
    assert second["changes"] == ["log.every_steps: 3 -> 7", "train.epochs: 2 -> 301"]
    assert first["host"] == socket.gethostname() and first["command"] == sys.argv
    assert {"jax", "flax", "densejax"} <= set(first["versions"])


def test_nobody_else_may_write_what_is_written_in_a_run(tmp_path):
    before = os.umask(0)
    try:
        with open_run(tmp_path / "run", make_config()):
            (tmp_path / "run" / "folder").mkdir()  # as orbax makes its own
            written = [tmp_path / "run", *(tmp_path / "run").iterdir()]
            assert len(written) == 5  # the lock too
            assert [path.name for path in written if path.stat().st_mode & 0o022] == []
        assert os.umask(0) == 0
    finally:
        os.umask(before)


def test_another_configuration_is_shown_and_only_forced(tmp_path):
    with open_run(tmp_path, make_config()):
        pass
    changed = make_config(seed=1, model__blocks=(1, 2), train__epochs=1)
    with pytest.raises(WorkdirError) as caught, open_run(tmp_path, changed):
        pass
    assert "(model.blocks: [1, 1] -> [1, 2]; seed: 0 -> 1)" in str(caught.value)
    assert "--resume=force" in str(caught.value) and "epochs" not in str(caught.value)
    assert not (tmp_path / "lock").exists() and len(history(tmp_path)) == 1
    with open_run(tmp_path, changed, force=True):
        pass
    assert "seed: 0 -> 1" in history(tmp_path)[-1]["changes"]
    with open_run(tmp_path, changed):
        pass


def test_a_reader_needs_a_run_of_its_configuration_but_no_lock(tmp_path):
    with pytest.raises(WorkdirError, match="not a run directory"):
        workdir.check(tmp_path / "nowhere", make_config())
    with open_run(tmp_path, make_config()):
        workdir.check(tmp_path, make_config(train__epochs=1))
        with pytest.raises(WorkdirError, match="seed: 0 -> 1"):
            workdir.check(tmp_path, make_config(seed=1))
    assert len(history(tmp_path)) == 1


def test_creation_killed_before_config_json_starts_anew(tmp_path):
    with open_run(tmp_path, make_config()):
        pass
    (tmp_path / "config.json").unlink()
    with open_run(tmp_path, make_config(seed=1)):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/nowhere"])
def test_a_path_that_cannot_be_made_is_one_clear_line(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError) as caught, open_run(tmp_path / name, make_config()):
        pass
    assert f"workdir={tmp_path / name}: " in str(caught.value)
    assert "Choose a --workdir" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": 1}'])
def test_a_damaged_config_is_an_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WorkdirError, match="json is damaged"), open_run(tmp_path, make_config()):
        pass


def test_other_code_or_data_are_refused_with_the_difference_and_only_forced(tmp_path):
    config, found = make_config(), workdir.versions() | {"data": "0123"}
    with open_run(tmp_path, config, current=found):
        pass
    with open_run(tmp_path, config, current=found):
        pass
    other = found | {"data": "4567", "jax": "9.9"}
    with pytest.raises(WorkdirError) as caught, open_run(tmp_path, config, current=other):
        pass
    assert f'(versions.data: "0123" -> "4567"; versions.jax: "{found["jax"]}" -> "9.9")' in str(
        caught.value
    )
    with pytest.raises(WorkdirError, match="versions.code"):
        workdir.check(tmp_path, config, workdir.versions() | {"code": "changed"})
    workdir.check(tmp_path, config)  # to read is always allowed
    with open_run(tmp_path, config, force=True, current=other):
        pass
    assert 'versions.data: "0123" -> "4567"' in history(tmp_path)[-1]["changes"]
    assert history(tmp_path)[-1]["versions"] == other


def test_the_code_version_is_of_what_can_change_a_number(tmp_path):
    code = {
        "models/layers.py": 'def pool(x):\n    """The mean."""\n    return x.mean()\n',
        "analysis/plots.py": "import os\n",
    }

    def digest_with(**changes):
        for name, text in (code | changes).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        workdir.code_digest.cache_clear()
        return workdir.code_digest(tmp_path)

    before, layers = digest_with(), code["models/layers.py"]
    for old, new in [("The mean.", "Their mean."), ("x.mean()", "x.mean()  # why\n\n")]:
        assert digest_with(**{"models/layers.py": layers.replace(old, new)}) == before
    assert digest_with(**{"models/layers.py": layers.replace("mean()", "sum()")}) != before
    assert digest_with(**{"analysis/plots.py": "import sys\n"}) == before
    assert digest_with(**{"data/new.py": "x = 1\n"}) != before  # it counts until it is known not to
    assert workdir.code_digest() == workdir.versions()["code"] != before


def test_what_was_not_recorded_yet_is_not_compared_but_for_the_code():
    current = {"code": "1", "x64": "False"}
    assert workdir.version_changes({"code": "1"}, current) == []
    assert workdir.version_changes({"x64": "False"}, current) == ['versions.code: (absent) -> "1"']


def test_precision_is_part_of_the_versions(monkeypatch):
    assert workdir.versions()["matmul_precision"] == "default on cpu"
    with jax.default_matmul_precision("highest"):
        assert workdir.versions()["matmul_precision"] == "highest on cpu"
    flags = (
        "--xla_cpu_enable_fast_math=true --xla_dump_to=/x --xla_force_host_platform_device_count=4"
    )
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert workdir.versions()["xla_flags"] == "--xla_cpu_enable_fast_math=true"
    assert workdir.versions()["x64"] == "False"


@pytest.mark.parametrize("kept", ["checkpoints/7/MANIFEST", "metrics.jsonl", "summary.json"])
def test_what_has_no_config_json_is_not_taken_up_without_a_word(tmp_path, kept):
    (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / kept).write_text("mine")
    with pytest.raises(WorkdirError, match="but no config.json"), open_run(tmp_path, make_config()):
        pass
    assert (tmp_path / kept).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [kept.partition("/")[0]]


@pytest.mark.parametrize(
    "line",
    [
        "x",
        "1",
        "[]",
        100_000 * "[",
        '{"versions": 1}',
        '{"versions": {"code": "1"}, "changes": {}}',
        '{"versions": {"code": "1", "matmul_precision": "default on cpu"}, "changes": []}',
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_every_line_of_the_history_is_checked_before_a_step(tmp_path, line, place):
    with open_run(tmp_path, make_config()):
        pass
    (good,) = (tmp_path / "history.jsonl").read_text().splitlines()
    lines = [line, good] if place else [good, line]
    (tmp_path / "history.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(WorkdirError, match="history.jsonl is damaged"):
        with open_run(tmp_path, make_config()):
            pass


def test_a_full_disk_leaves_no_lock_and_no_half_of_a_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", refuse)
    with pytest.raises(WorkdirError, match="No space left"), open_run(tmp_path, make_config()):
        pass
    assert list(tmp_path.iterdir()) == []


class Bucket(MemoryFileSystem):
    """An object store: files are written whole, with no append and no exclusive creation."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.partition("://")[2].strip("/") if "://" in path else path.rstrip("/")

    def _open(self, path, mode="rb", **options):
        assert mode in ("rb", "wb"), mode
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket(monkeypatch):
    """A path in it."""
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gcs", Bucket)
    cache = epath.backend._FileSystemSpecBackend._get_filesystem
    cache.cache_clear()
    monkeypatch.setattr(Bucket, "store", {})
    yield epath.Path("gs://bucket/run")
    cache.cache_clear()


def test_a_run_directory_in_an_object_store(bucket):
    with open_run(bucket, make_config()) as require_held:
        require_held()
        with pytest.raises(WorkdirError, match="in use"), open_run(bucket, make_config()):
            pass
    with open_run(bucket, make_config(train__epochs=301)):
        pass
    with pytest.raises(WorkdirError, match="seed: 0 -> 1"), open_run(bucket, make_config(seed=1)):
        pass
    assert sorted(path.name for path in bucket.iterdir()) == ["config.json", "history.jsonl"]
    assert [start["changes"] for start in workdir.history(bucket)] == [
        [],
        ["train.epochs: 2 -> 301"],
    ]


def test_a_directory_that_hosts_do_not_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "VISIBILITY_TIMEOUT", 0.0)
    monkeypatch.setattr(workdir.jax, "process_index", lambda: 1)
    with pytest.raises(WorkdirError, match="process 1 does not see .* all hosts share"):
        with open_run(tmp_path, make_config()):
            pass
