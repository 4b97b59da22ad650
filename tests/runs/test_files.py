"""Small files are whole or reported; no read hangs; a changed record is noticed."""

import json
import os
import socket

import pytest
from etils import epath

from densejax.config import UserError
from densejax.runs import files


def put(path, kind):
    """Leaves something that is no file of text."""
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(os.path.relpath(path))  # an address has room for a hundred bytes
    else:
        path.write_bytes(b'{"a": "\xff"}')


@pytest.mark.parametrize("kind", ["directory", "fifo", "dangling link", "socket", "latin-1"])
def test_what_is_no_text_file_is_named_and_never_waited_for(tmp_path, kind):
    path = epath.Path(tmp_path / "a[1]b")
    put(tmp_path / "a[1]b", kind)
    with pytest.raises(UserError, match=r"a\[1\]b cannot be read \(.*move away"):
        files.read_text(path)


def test_text_is_read_and_an_absent_file_is_none(tmp_path):
    (tmp_path / "file").write_text("ä\n")
    (tmp_path / "link").symlink_to("file")
    assert files.read_text(epath.Path(tmp_path / "link")) == "ä\n"
    assert files.read_text(epath.Path(tmp_path / "nothing")) is None
    assert files.read_text(epath.Path(tmp_path / "file" / "below")) is None


@pytest.mark.parametrize("text", ["foo://run", "/tmp/a://b", "runs/\udcff"])
def test_a_path_that_nothing_can_open_is_named_with_its_flag(text):
    with pytest.raises(UserError, match="--workdir=.*give a"):
        files.path_of("--workdir", text)


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.path_of("--output", "~/x") == epath.Path(tmp_path / "x")
    assert files.path_of("workdir", tmp_path / "y") == epath.Path(tmp_path / "y")


def test_two_writers_of_one_name_have_files_of_their_own(tmp_path, monkeypatch):
    # Of two machines both may have the same process number.
    monkeypatch.setattr(os, "getpid", lambda: 7)
    seen = set()
    replace = type(epath.Path(tmp_path)).replace

    def look(self, target):
        seen.add(self.name)
        return replace(self, target)

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", look)
    for _ in range(2):
        files.write(epath.Path(tmp_path / "a"), "content")
    assert len(seen) == 2 and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_write_json_replaces_and_keeps_the_old_file_when_it_fails(tmp_path):
    files.write_json(tmp_path / "a.json", {"z": 0.1, "a": [1]})
    with open(tmp_path / "a.json") as reader:  # at work during the next write
        files.write_json(tmp_path / "a.json", {"z": 0.2})
        assert json.load(reader) == {"z": 0.1, "a": [1]}
    assert json.loads((tmp_path / "a.json").read_text()) == {"z": 0.2}
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"z": object()})
    assert "0.2" in (tmp_path / "a.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_record_that_was_changed_is_found_out_and_an_old_one_opens():
    record = {"versions": {"code": "1", "matmul_precision": "default on cpu"}, "x": 0.1}
    sealed = files.seal(record)
    assert files.unseal(sealed) == record
    text = json.dumps(sealed)
    changed = 0
    for place in range(len(text)):
        for bit in range(7):
            other = text[:place] + chr(ord(text[place]) ^ (1 << bit)) + text[place + 1 :]
            try:
                found = files.unseal(json.loads(other))
            except (ValueError, LookupError, TypeError, AttributeError):
                continue
            changed += found != record
    assert changed == 0
    old = {"versions": {"code": "1"}, "x": 0.1}
    assert files.unseal(old) == old
