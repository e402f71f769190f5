"""Other systems than Linux, as far as they can be imitated here."""

import ctypes
import errno
import os
from types import SimpleNamespace

import psutil
import pytest

from adapruner.base import progress
from adapruner.base.files import copy_folder, link_or_copy
from adapruner.run import memory


@pytest.fixture
def _no_proc(monkeypatch, tmp_path):
    """As on Windows and macOS: no /proc, and no symbols of the C library of GNU."""
    monkeypatch.setattr(progress, "Path", lambda name: tmp_path / "none" / str(name).lstrip("/"))

    def refuse(_: None) -> None:
        raise TypeError("bad argument type for built-in operation")  # what Windows says to CDLL(None)

    monkeypatch.setattr(ctypes, "CDLL", refuse)


@pytest.mark.usefixtures("_no_proc")
@pytest.mark.parametrize(
    ("reported", "peak"), [({"rss": 5, "peak_wset": 9}, 9), ({"rss": 5}, 5)], ids=["windows", "macos"]
)
def test_peak_memory_without_proc(reported, peak, monkeypatch):
    assert not progress.reset_peak_memory()
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(**reported))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert progress.peak_memory() == peak
    with progress.Reporter(quiet=True).stage("a stage"):
        pass


def test_all_memory_is_usable_without_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path / "none")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10, available=7))
    assert memory.total_and_free(memory._CPU) == (10, 7)


def test_files_are_copied_where_they_cannot_be_linked(tmp_path, monkeypatch):
    """As on a file system without hard links, or on another drive."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(bytes(2**22 + 1))
    link_or_copy(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert not target.samefile(source)


def test_a_copy_that_was_cut_off_is_made_again(tmp_path):
    """A linked file is the same as its source, over which nothing can be copied."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "large").write_bytes(bytes(2**22 + 1))
    (source / "small").write_bytes(b"a")
    for _ in range(2):
        copy_folder(source, tmp_path / "target")
    assert (tmp_path / "target" / "large").samefile(source / "large")
    assert not (tmp_path / "target" / "small").samefile(source / "small")
