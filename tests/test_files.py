"""Atomic files: whole or not there, whatever goes wrong while they are written."""

import errno
import os
import resource
import signal

import pytest

from compress.errors import SetupError
from compress.files import TEMPORARY_PREFIX, atomic_path


def _old(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    return path


def test_a_file_replaces_the_old_one_when_it_is_whole(tmp_path):
    path = _old(tmp_path)
    with atomic_path(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(TEMPORARY_PREFIX)
        assert temporary.suffix == ".onnx"
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def _write(path, content, error=None):
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
        if error:
            raise error


def test_any_error_keeps_the_old_file(tmp_path):
    path = _old(tmp_path)
    with pytest.raises(KeyError):
        _write(path, b"half", KeyError("stop"))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_size_limit_keeps_the_old_file(tmp_path):
    path = _old(tmp_path)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with (
            pytest.raises(SetupError, match=r"model.onnx cannot be written: the file is larger.*errno 27") as error,
            atomic_path(path) as temporary,
        ):
            temporary.write_bytes(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.exit_code == 8
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_even_from_inside_another_error(tmp_path):
    path = _old(tmp_path)
    wrapped = RuntimeError("a library wraps it")
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left") as error:
        full.write(b"x")
    wrapped.__cause__ = error.value
    with pytest.raises(SetupError, match=r"model\.onnx cannot be written: the disk is full"):
        _write(path, b"half", wrapped)
    assert path.read_bytes() == b"old"


def test_a_failed_rename_keeps_the_old_file(tmp_path, monkeypatch):
    path = _old(tmp_path)

    def refuse(source, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(source))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SetupError, match="read-only"), atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_and_a_folder_in_the_way(tmp_path):
    with (
        pytest.raises(SetupError, match=r"folder .*nowhere does not exist"),
        atomic_path(tmp_path / "nowhere" / "m"),
    ):
        pass
    with pytest.raises(SetupError, match="a folder of this name"), atomic_path(tmp_path):
        pass


def test_a_permission_error_about_another_file_is_left_as_it_is(tmp_path):
    with pytest.raises(PermissionError), atomic_path(tmp_path / "m"):
        raise PermissionError(errno.EACCES, "denied", str(tmp_path / "input"))


def test_a_link_is_followed_and_the_mode_is_that_of_a_new_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.write_bytes(b"new")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "plain").stat().st_mode
