"""Files, folders and globs."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_vae.inputs import find_inputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "._a.jpg", "x/d.png", "x/y/c.png", ".git/e.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"")
    return tmp_path / "photos"


def names(*sources: object) -> list[str]:
    return [str(name) for _, name in find_inputs([str(source) for source in sources], {".png", ".jpg"})]


def test_folders(folder: Path) -> None:
    assert names(folder) == ["a.JPG", "b.png", "x/d.png", "x/y/c.png"]
    assert [path for path, _ in find_inputs([folder / "x"], {".png"})] == [folder / "x/d.png", folder / "x/y/c.png"]


def test_files_are_taken_whatever_they_are_called(folder: Path) -> None:
    assert names(folder / "x/y/c.png", folder / "notes.txt") == ["c.png", "notes.txt"]


def test_globs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(f"{folder}/*") == ["a.JPG", "b.png"]
    assert names(f"{folder}/**/*.png") == ["b.png", "x/d.png", "x/y/c.png"]
    assert names(f"{folder}/x/*/c.pn?") == ["y/c.png"]
    monkeypatch.chdir(folder)
    assert names("*.png") == ["b.png"]
    assert names("x/**/[cd].png") == ["d.png", "y/c.png"]


def test_a_file_may_be_called_like_a_glob(folder: Path) -> None:
    (folder / "x[1].png").write_bytes(b"")
    assert names(folder / "x[1].png") == ["x[1].png"]


def test_links_are_followed_to_files(folder: Path) -> None:
    (folder / "x" / "link.png").symlink_to(folder / "b.png")
    (folder / "x" / "broken.png").symlink_to(folder / "missing.png")
    assert names(folder / "x") == ["d.png", "link.png", "y/c.png"]


def test_sources_that_give_nothing(folder: Path) -> None:
    for source in ("missing.png", "missing"):
        with pytest.raises(ValueError, match=rf"{source}: no such file or folder"):
            names(folder / "b.png", folder / source)
    (folder / "empty").mkdir()
    for source in (folder / "empty", f"{folder}/*.webp", f"{folder}/missing/*.png"):
        with pytest.raises(ValueError, match=r"holds no file that ends in \.jpg, \.png"):
            names(source)
