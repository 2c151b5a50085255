"""Sources: a folder or shards, opened in every way that users may write it, and all that can be wrong with it."""

import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
from PIL import Image

from ssl_global.data import source as source_module
from ssl_global.data.decode import BadImage
from ssl_global.data.pack import pack
from ssl_global.data.source import FolderSource, Source, open_source
from ssl_global.errors import UserError


def make_images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + number, 4), (number, 0, 0)).save(folder / name, "PNG")
    return folder


def make_shards(out: Path, folder: Path, shard_bytes: int = 1) -> list[str]:
    return [
        str(shard) for shard in pack(FolderSource(str(folder)), out, shard_bytes=shard_bytes, progress=False).shards
    ]


def keys(source: Source) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def contents(source: Source) -> list[bytes]:
    return [source.read(index) for index in range(len(source))]


def refused(path: object, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_source(str(path))
    assert "\n" not in str(caught.value)
    for word in (str(path), *words):
        assert word in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- folder


def test_folder_lists_images_of_any_depth_in_order(tmp_path: Path) -> None:
    make_images(tmp_path, "b.PNG", "a.jpg", "deep/er/c.webp", ".hidden.png", ".git/d.png")
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(str(tmp_path))
    assert keys(source) == ["a.jpg", "b.PNG", "deep/er/c.webp"]
    assert source.read(1) == (tmp_path / "b.PNG").read_bytes()
    assert (source.labels, source.classes) == (None, None)
    assert source.describe() == "3 images, no labels"


def test_first_folders_are_the_classes(tmp_path: Path) -> None:
    source = open_source(str(make_images(tmp_path, "dog/x/1.png", "cat/1.png", "cat/2.png")))
    assert source.classes == ["cat", "dog"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1]
    assert source.describe() == "3 images, 2 classes"


@pytest.mark.parametrize("names", [["only/1.png", "only/2.png"], ["cat/1.png", "dog/2.png", "3.png"]])
def test_no_labels_unless_every_image_has_one_of_several(tmp_path: Path, names: list[str]) -> None:
    assert open_source(str(make_images(tmp_path, *names))).labels is None


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    make_images(tmp_path / "elsewhere", "1.png")
    make_images(tmp_path / "data", "cat/2.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "round").symlink_to(tmp_path / "data")
    assert keys(open_source(str(tmp_path / "data"))) == ["cat/2.png", "dog/1.png"]


def test_a_file_that_cannot_be_read_is_one_bad_image(tmp_path: Path) -> None:
    make_images(tmp_path, "1.png", "2.png")
    (tmp_path / "3.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "4.png")
    source = open_source(str(tmp_path))
    (tmp_path / "1.png").unlink()
    assert keys(source) == ["1.png", "2.png", "3.png"]
    for index in (0, 2):
        with pytest.raises(BadImage, match="No such file"):
            source.read(index)


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    make_images(tmp_path, os.fsdecode(b"\xff.png"))
    assert open_source(str(tmp_path)).fingerprint


# -------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    folder = make_images(tmp_path / "photos", "cat/1.png", "cat/2.png", "dog/3.png")
    return make_shards(tmp_path / "shards", folder)


@pytest.mark.parametrize("way", ["", "photos-*.tar", "photos-{000000..000002}.tar", "photos-00000[0-2].tar"])
def test_every_way_to_name_shards(tmp_path: Path, shards: list[str], way: str) -> None:
    source = open_source(str(tmp_path / "shards" / way))
    assert keys(source) == [f"photos-00000{n}.tar/00000000{n}" for n in range(3)]
    assert contents(source) == contents(open_source(str(tmp_path / "photos")))
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1]
    assert source.classes == ["cat", "dog"]
    assert source.describe() == "3 images in 3 shards, 2 classes"


def test_one_shard(shards: list[str]) -> None:
    assert open_source(shards[1]).describe() == "1 image in 1 shard, 2 classes"


def test_braces_keep_their_order(tmp_path: Path, shards: list[str]) -> None:
    source = open_source(str(tmp_path / "shards" / "photos-{000002,000000}.tar"))
    assert keys(source) == ["photos-000002.tar/000000002", "photos-000000.tar/000000000"]


def test_a_path_is_first_of_all_a_path(tmp_path: Path) -> None:
    odd = tmp_path / "a{1,2}[x]*"
    make_shards(odd, make_images(tmp_path / "photos", "1.png"))
    assert len(open_source(str(odd))) == 1
    assert len(open_source(str(odd / "photos-000000.tar"))) == 1


def test_shards_of_one_name_in_two_folders_have_unique_keys(tmp_path: Path) -> None:
    for place in ("x", "y"):
        make_shards(tmp_path / place, make_images(tmp_path / place / "photos", "1.png"))
    assert keys(open_source(str(tmp_path / "{x,y}" / "photos-000000.tar"))) == [
        "x/photos-000000.tar/000000000",
        "y/photos-000000.tar/000000000",
    ]


def test_more_shards_than_open_files(shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "may_stay_open", lambda wanted: 1)
    source = open_source(str(tmp_path / "shards"))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert contents(source) == contents(source) == contents(open_source(str(tmp_path / "photos")))
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after <= before + 1


def test_shard_that_becomes_shorter_is_named(tmp_path: Path, shards: list[str]) -> None:
    source = open_source(str(tmp_path / "shards"))
    os.truncate(shards[1], 520)
    with pytest.raises(UserError, match=r"photos-000001\.tar: became shorter since it was opened: byte \d+ is gone"):
        source.read(1)


# ---------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("where", ["photos", "shards"])
def test_pickled_and_forked(tmp_path: Path, shards: list[str], where: str) -> None:
    source = open_source(str(tmp_path / where))
    expected = contents(source)
    assert contents(pickle.loads(pickle.dumps(source))) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(source.read, range(3)) == expected


@pytest.mark.parametrize("where", ["photos", "shards"])
def test_fingerprint_is_of_the_data_not_of_its_place(tmp_path: Path, shards: list[str], where: str) -> None:
    before = open_source(str(tmp_path / where)).fingerprint
    (tmp_path / where).rename(tmp_path / "moved")
    assert open_source(str(tmp_path / "moved")).fingerprint == before


def test_fingerprint_sees_name_size_and_order(tmp_path: Path, shards: list[str]) -> None:
    folder = tmp_path / "photos"
    prints = [open_source(str(folder)).fingerprint]
    (folder / "dog" / "3.png").rename(folder / "dog" / "4.png")
    prints.append(open_source(str(folder)).fingerprint)
    with (folder / "dog" / "4.png").open("ab") as file:
        file.write(b"\0")
    prints.append(open_source(str(folder)).fingerprint)
    for braces in ("{000000,000001}", "{000001,000000}"):
        prints.append(open_source(str(tmp_path / "shards" / f"photos-{braces}.tar")).fingerprint)
    assert len(set(prints)) == 5


# ------------------------------------------------------------------------------------------------------------- refused


def test_what_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such file or folder")
    refused(tmp_path / "nothing.tar", "no such file or folder")
    refused(tmp_path / "no-*.tar", "no shard matches")


def test_folders_without_images(tmp_path: Path) -> None:
    refused(tmp_path, "no image in this folder")
    (tmp_path / "notes.txt").write_text("no image")
    refused(tmp_path, "no image in this folder", ".jpg")


def test_braces_name_the_missing_shard(tmp_path: Path, shards: list[str]) -> None:
    refused(tmp_path / "shards" / "photos-{000000..000004}.tar", "photos-000003.tar is missing")
    refused(tmp_path / "shards" / "photos-{000000..000002.tar", "brace is not closed")
    refused(tmp_path / "shards" / "photos-{000000,000000}.tar", "photos-000000.tar twice")


@pytest.mark.parametrize(
    ("scheme", "words"), [("pipe:", "data.reader stream"), ("gopher://", "unknown scheme"), ("file:", "no shard there")]
)
def test_urls_that_are_no_shards(scheme: str, words: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    refused(f"{scheme}touch {mark}", words)
    assert not mark.exists()


def test_no_pipe_out_of_braces(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    refused(f"{{pipe:touch {mark},x}}", "is missing")
    assert not mark.exists()


def test_files_that_are_no_shard(tmp_path: Path, shards: list[str]) -> None:
    refused(tmp_path / "photos" / "cat" / "1.png", "is no .tar file")
    refused(tmp_path / "photos" / "cat" / "*.png", "is no .tar file")


def test_a_folder_of_both(tmp_path: Path, shards: list[str]) -> None:
    make_images(tmp_path / "shards", "1.png")
    refused(tmp_path / "shards", "both .tar shards and image files")


def test_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may list any folder")
    make_images(tmp_path, "in/1.png")
    (tmp_path / "in").chmod(0)
    refused(tmp_path, "cannot be listed")


def test_labels_that_classes_json_does_not_name(tmp_path: Path, shards: list[str]) -> None:
    (tmp_path / "shards" / "classes.json").write_text('["cat"]')
    with pytest.raises(UserError, match=r"classes\.json: names 1 classes, but the shards hold the label 1"):
        open_source(str(tmp_path / "shards"))


@pytest.mark.parametrize("names", ["{", "[1, 2]", '{"cat": 0}', "[" * 100_000])
def test_a_classes_json_that_names_nothing_is_left_aside(tmp_path: Path, shards: list[str], names: str) -> None:
    (tmp_path / "shards" / "classes.json").write_text(names)
    source = open_source(str(tmp_path / "shards"))
    assert source.labels is not None
    assert source.classes is None
