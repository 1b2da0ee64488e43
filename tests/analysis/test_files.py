"""Atomic writing: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ellq.analysis.files import new_folder, write_bytes, write_text


def test_text_is_written_as_utf8_with_its_line_ends(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "ℓq\r\nline\n")
    assert path.read_bytes() == "ℓq\r\nline\n".encode()


def test_missing_folders_are_created_and_an_old_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.bin"
    write_bytes(path, b"old, and longer")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["c.bin"]


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / "a.txt", "old")

    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    target = write_text(tmp_path / "target.txt", "old")
    link = tmp_path / "link.txt"
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_device_is_written_to_and_not_replaced() -> None:
    write_text("/dev/null", "nothing")
    assert not Path("/dev/null").is_file()


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    reference.write_text("")
    assert write_text(tmp_path / "a", "").stat().st_mode == reference.stat().st_mode


def test_a_path_below_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"file/x\.txt cannot be written"):
        write_text(tmp_path / "file" / "x.txt", "")
    with pytest.raises(NotADirectoryError, match=r"deeper/x\.txt cannot be written"):
        write_text(tmp_path / "file" / "deeper" / "x.txt", "")


def test_a_folder_is_no_place_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="Name a file inside it"):
        write_text(tmp_path, "")


def test_a_write_below_proc_is_refused_in_one_sentence() -> None:
    with pytest.raises(OSError, match="/proc/ellq/x cannot be written"):
        write_text("/proc/ellq/x", "")


def test_new_folder_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "above" / "out"
    with new_folder(path, replaces=()) as folder:
        (folder / "a").write_text("1")
        assert not path.exists()
        assert folder.parent == path.parent
    assert os.listdir(path.parent) == ["out"]
    assert (path / "a").read_text() == "1"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_block_leaves_the_old_folder_and_no_trace(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "a").write_text("old")

    def fail() -> None:
        with new_folder(path, replaces={"a"}) as folder:
            (folder / "a").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert (path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_folder_of_ours_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with new_folder(path, replaces=()) as folder:
        (folder / "a").write_text("old")
        (folder / "b").mkdir()
    with new_folder(path, replaces={"a", "b", "c"}) as folder:
        (folder / "a").write_text("new")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(path) == ["a"]
    assert (path / "a").read_text() == "new"


def test_a_foreign_file_is_named_before_the_block_starts(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(FileExistsError, match=r"holds 'thesis\.tex'.*Choose another folder"),
        new_folder(tmp_path, replaces={"a"}),
    ):
        pytest.fail("the block must not start")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_foreign_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    with pytest.raises(FileExistsError, match="thesis"), new_folder(path, replaces={"a"}):
        (path / "thesis.tex").write_text("")
    assert os.listdir(path) == ["thesis.tex"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(FileExistsError, match="is a file"), new_folder(tmp_path / "out", replaces={"out"}):
        pytest.fail("the block must not start")


@pytest.mark.parametrize("place", ["/proc/ellq/out", "below/out"])
def test_an_unwritable_place_is_refused_before_the_block_starts(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").write_text("a file")
    with pytest.raises(OSError, match=f"{place} cannot be written"), new_folder(place, replaces=()):
        pytest.fail("the block must not start")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_before_the_block_starts(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="cannot be written"), new_folder(tmp_path / "out", replaces=()):
            pytest.fail("the block must not start")
    finally:
        tmp_path.chmod(0o700)


def test_the_current_folder_is_not_replaced_under_our_feet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="Choose a folder inside it"), new_folder(".", replaces=()):
        pytest.fail("the block must not start")


def test_the_old_folder_returns_if_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "a").write_text("old")
    rename = Path.rename
    calls = []

    def fails_second(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_second)
    with pytest.raises(OSError, match="disk gone"), new_folder(path, replaces={"a"}):
        pass
    assert os.listdir(tmp_path) == ["out"]
    assert (path / "a").read_text() == "old"
