"""The trunk's output on disk, and what becomes of it where the disk has no room."""

import contextlib
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_model

from kallm.errors import WrongConfiguration
from kallm.model import cache
from kallm.model.cache import HiddenCache, TrunkPass, available_bytes, free_disk_bytes, kept_bytes
from kallm.model.trunk import Passage, Trunk, split

LENGTH, WIDTH = 64, 48


@pytest.fixture(scope="module")
def trunk() -> Trunk:
    return split(make_model(), 2)[0]


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 259, (40, LENGTH), generator=generator)
    return [Passage(row, torch.arange(LENGTH)) for row in ids]


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let the kernel refuse larger files, as a full disk refuses to grow one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_kept_and_computed_values_are_the_trunks_own(trunk: Trunk, passages: list[Passage], tmp_path: Path) -> None:
    kept, passing = HiddenCache(trunk, passages, tmp_path, "m"), TrunkPass(trunk, passages)
    passing.hold([3, 4], lambda: None)
    for index in (3, 4, 5):
        expected = trunk(passages[index])
        for found in (kept[index], kept[index], passing[index]):
            assert torch.equal(found, expected)
    assert kept.num_missing() == 37


def test_what_is_held_is_run_once_and_let_go_at_the_next_step(passages: list[Passage]) -> None:
    class Counted(Trunk):
        calls = 0

        def forward(self, passage: Passage) -> torch.Tensor:
            self.calls += 1
            return super().forward(passage)

    trunk = Counted(make_model().base_model, 3)
    passing = TrunkPass(trunk, passages)
    passing.hold([0, 1], lambda: None)
    for _ in range(6):
        passing[0], passing[1]
    assert trunk.calls == 2
    passing.hold([1, 2], lambda: None)
    assert trunk.calls == 3
    passing[0]
    assert trunk.calls == 4


def test_the_caches_size_is_known_before_and_after(trunk: Trunk, passages: list[Passage], tmp_path: Path) -> None:
    assert kept_bytes(trunk, passages, tmp_path, "m") == 0
    assert not list(tmp_path.iterdir())
    made = HiddenCache(trunk, passages, tmp_path, "m")
    assert made.num_left_bytes == made.num_bytes == len(passages) * LENGTH * WIDTH * 4
    for index in range(len(passages)):
        made[index]
    assert made.num_left_bytes == made.num_missing() == 0
    assert kept_bytes(trunk, passages, tmp_path, "m") >= made.num_bytes


def test_values_that_a_crash_left_half_written_are_computed_again(
    trunk: Trunk, passages: list[Passage], tmp_path: Path
) -> None:
    first = HiddenCache(trunk, passages, tmp_path, "m")
    expected = first[7].clone()
    (file,) = tmp_path.glob("*.hidden")
    with open(file, "r+b") as opened:
        opened.seek(7 * LENGTH * WIDTH * 4 + 100)
        opened.write(b"\0\0\0\0")
    again = HiddenCache(trunk, passages, tmp_path, "m")
    assert torch.equal(again[7], expected)
    assert torch.equal(HiddenCache(trunk, passages, tmp_path, "m")[7], expected)


@pytest.mark.parametrize("free", [0, 1000])
def test_a_disk_with_too_little_room_is_said_and_the_values_stay(
    trunk: Trunk, passages: list[Passage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    with pytest.warns(UserWarning, match=r"not kept .* only .* GB are free there; make room, or set KALLM_CACHE"):
        made = HiddenCache(trunk, passages, tmp_path, "m")
    assert not made.is_kept
    assert made.num_missing() == len(made)
    assert torch.equal(made[2], trunk(passages[2]))
    assert not list(tmp_path.iterdir())


def test_files_that_nobody_has_open_give_way_the_longest_unused_first(
    trunk: Trunk, passages: list[Passage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(passages) * LENGTH * WIDTH * 4

    def fill(name: str, opened_s: int) -> HiddenCache:
        before = set(tmp_path.iterdir())
        made = HiddenCache(trunk, passages, tmp_path, name)
        for index in range(len(passages)):
            made[index]
        for file in set(tmp_path.iterdir()) - before:
            os.utime(file, (opened_s, opened_s))
        return made

    held = fill("held", 1)  # the oldest, but open
    fill("recent", 3)
    fill("old", 2)
    for name in ("old", "recent"):
        assert kept_bytes(trunk, passages, tmp_path, name) >= size

    def used() -> int:
        return sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())

    disk = used() + size // 2  # it has room for half a file more
    monkeypatch.setattr(cache, "free_disk_bytes", lambda folder: disk - used())
    monkeypatch.setattr(cache, "_FREE_SHARE", 1.0)
    assert 2.5 * size <= available_bytes(trunk, passages, tmp_path, "new") < 3 * size
    said: list[str] = []
    assert HiddenCache(trunk, passages, tmp_path, "new", say=said.append).is_kept
    assert "that was unused for longest" in said[0]
    assert kept_bytes(trunk, passages, tmp_path, "old") == 0
    assert all(kept_bytes(trunk, passages, tmp_path, name) >= size for name in ("held", "recent"))
    assert torch.equal(held[7], trunk(passages[7]))


def test_a_disk_that_becomes_full_is_said_once_and_freed(trunk: Trunk, passages: list[Passage], tmp_path: Path) -> None:
    said: list[str] = []
    made = HiddenCache(trunk, passages, tmp_path, "m", say=said.append)
    made[0]
    with files_of_at_most(10 * LENGTH * WIDTH * 4):
        found = [made[index] for index in range(len(passages))]
    assert all(torch.equal(values, trunk(passage)) for values, passage in zip(found, passages, strict=True))
    (sentence,) = said
    assert "the disk became full" in sentence
    assert not list(tmp_path.iterdir())
    assert not made.is_kept


def test_a_file_larger_than_the_file_system_takes_is_said(
    trunk: Trunk, passages: list[Passage], tmp_path: Path
) -> None:
    said: list[str] = []
    with files_of_at_most(1000):
        made = HiddenCache(trunk, passages, tmp_path, "m", say=said.append)
    assert "no file may be so large" in said[0]
    assert torch.equal(made[1], trunk(passages[1]))


def test_a_cache_that_another_process_removed_is_said(trunk: Trunk, passages: list[Passage], tmp_path: Path) -> None:
    said: list[str] = []
    made = HiddenCache(trunk, passages, tmp_path, "m", say=said.append)
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(made[1], trunk(passages[1]))
    assert "its files were removed" in said[0]


def test_a_folder_that_cannot_be_written_is_one_sentence(trunk: Trunk, passages: list[Passage], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "trunk"
    with pytest.raises(WrongConfiguration, match=r"cache folder .*file/trunk cannot be written \(.*\): make it"):
        HiddenCache(trunk, passages, folder, "m")
    assert free_disk_bytes(folder) == free_disk_bytes(tmp_path)
