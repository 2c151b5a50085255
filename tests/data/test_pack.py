"""Packing: the shards hold the source, whatever stops the work and however many share it; its figures are right."""

import errno
import fcntl
import io
import json
import os
import re
import shutil
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import warm
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssl_global.data import pack as pack_module
from ssl_global.data import progress as progress_module
from ssl_global.data.decode import BadImage
from ssl_global.data.pack import name_of, pack, plan
from ssl_global.data.source import FolderSource, Source, open_source
from ssl_global.data.summary import describe, read_summary
from ssl_global.errors import UserError

SHARD_BYTES = 6_000


def encoded(height: int, width: int, kind: str = "JPEG", mode: str = "RGB", seed: int = 0, **options: Any) -> bytes:
    random = np.random.default_rng([seed, height, width])
    noise = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    smooth = noise.resize((4, 4)).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    (smooth if mode == "RGBA" else smooth.convert("RGB").convert(mode)).save(file, kind, **options)
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Source:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return open_source(str(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Source:
    files = {
        f"{('ant', 'bee', 'cow')[number % 3]}/{number:02d}.JPG": encoded(20 + number, 40 - number, seed=number)
        for number in range(18)
    }
    return write(tmp_path / "my photos", files)


def files_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def pack_quietly(source: Source, out: Path, shard_bytes: int = SHARD_BYTES, **options: Any) -> pack_module.Packed:
    options = {"processes": 2, "progress": False} | options
    return pack(source, out, shard_bytes=shard_bytes, **options)


def members(*shards: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


# ------------------------------------------------------------------------------------------------------ what is packed


def test_shards_hold_the_source(tmp_path: Path, folder: Source) -> None:
    packed = pack_quietly(folder, tmp_path / "out")
    source = open_source(str(tmp_path / "out"))
    assert [source.read(i) for i in range(18)] == [folder.read(i) for i in range(18)]
    assert source.labels is not None
    assert folder.labels is not None
    assert source.labels.tolist() == folder.labels.tolist()
    assert source.classes == folder.classes == ["ant", "bee", "cow"]
    assert [shard.name for shard in packed.shards] == [f"my_photos-{n:06d}.tar" for n in range(len(packed.shards))]
    assert (packed.num_images, packed.written) == (18, len(packed.shards))
    assert len(packed.shards) > 4
    beside = {"classes.json", "my_photos-pack.json", "my_photos-summary.json"}
    indexes = {file for file in files_in(tmp_path / "out") if file.endswith(".index.npz")}
    assert set(files_in(tmp_path / "out")) == {shard.name for shard in packed.shards} | beside | indexes


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_webdataset_reads_them(tmp_path: Path, folder: Source) -> None:
    packed = pack_quietly(folder, tmp_path / "out")
    dataset = webdataset.WebDataset([str(shard) for shard in packed.shards], shardshuffle=False)
    samples = [(sample["__key__"], sample["jpg"], int(sample["cls"])) for sample in dataset]
    assert folder.labels is not None
    assert samples == [(f"{i:09d}", folder.read(i), folder.labels[i]) for i in range(18)]


def test_shards_can_be_packed_again(tmp_path: Path, folder: Source) -> None:
    first = pack_quietly(folder, tmp_path / "first")
    shards = open_source(f"{tmp_path}/first/my_photos-{{000000..{len(first.shards) - 1:06d}}}.tar")
    second = pack_quietly(shards, tmp_path / "second", shard_bytes=2 * SHARD_BYTES)
    assert [shard.name for shard in second.shards] == [f"my_photos-{n:06d}.tar" for n in range(len(second.shards))]
    assert len(second.shards) < len(first.shards)
    assert members(*second.shards) == members(*first.shards)
    assert (tmp_path / "second" / "classes.json").read_bytes() == (tmp_path / "first" / "classes.json").read_bytes()
    for figure in ("mean", "std"):  # the sums are taken in another order
        assert second.summary[figure] == pytest.approx(first.summary[figure], rel=1e-14)
    for figure in ("images", "formats", "modes", "width", "height", "classes", "broken", "duplicates"):
        assert second.summary[figure] == first.summary[figure]


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("options", [{}, {"resize": 24}, {"quality": 50}])
def test_any_number_of_processes_writes_the_same_bytes(
    tmp_path: Path, folder: Source, processes: int, options: dict[str, int]
) -> None:
    write(Path(folder.path), {"bee/broken.jpg": b"no image", "cow/again.jpg": folder.read(0)})
    source = open_source(folder.path)
    pack_quietly(source, tmp_path / "two", processes=2, **options)
    pack_quietly(source, tmp_path / "other", processes=processes, **options)
    assert files_in(tmp_path / "two") == files_in(tmp_path / "other")


def test_member_is_named_after_what_the_file_is(tmp_path: Path) -> None:
    kinds = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}
    files = {f"{kind}.jpeg": encoded(9, 7, kind) for kind in kinds}
    files["MPO.jpeg"] = encoded(9, 7, "MPO", save_all=True, append_images=[Image.new("RGB", (3, 3))])
    source = write(tmp_path / "photos", files)
    packed = pack_quietly(source, tmp_path / "out")
    by_key = {name.partition(".")[0]: (name.partition(".")[2], data) for name, data in members(*packed.shards).items()}
    for number, name in enumerate(sorted(files)):
        suffix = kinds.get(name.removesuffix(".jpeg"), "jpg")
        assert by_key[f"{number:09d}"] == (suffix, files[name])
    assert packed.summary["formats"] == {"BMP": 1, "GIF": 1, "JPEG": 2, "PNG": 1, "TIFF": 1, "WEBP": 1}
    assert packed.summary["classes"] is None
    assert not (tmp_path / "out" / "classes.json").exists()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/my photos/", "my_photos"),
        ("shards/train-{000..099}.tar", "train"),
        ("shards/train-*.tar", "train"),
        ("s3://bucket/in/train-{000..099}.tar", "train"),
        ("datasets:beans@train", "beans_train"),
        ("x/[0-9]*.tar", "images"),
        ("/", "images"),
        ("été", "t"),
        ("shards/{a,b}/val.1.tar", "val.1"),
    ],
)
def test_name_of_the_shards(path: str, name: str) -> None:
    assert name_of(path) == name


def test_name_of_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "birds [2020]").mkdir()
    monkeypatch.chdir(tmp_path / "birds [2020]")
    assert name_of(".") == name_of(str(tmp_path / "birds [2020]")) == "birds_2020"


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=30), st.integers(1, 30_000), st.booleans())
def test_plan(sizes: list[int], shard_bytes: int, labelled: bool) -> None:
    used = np.array([(-(-size // 512) + (3 if labelled else 1)) * 512 for size in sizes])
    shards = plan(used, shard_bytes)
    assert [image for shard in shards for image in shard] == list(range(len(sizes)))
    for shard, after in zip(shards, [*shards[1:], None], strict=True):
        held = sum(used[shard.start : shard.stop]) + 1024
        assert len(shard) == 1 or held <= shard_bytes
        assert after is None or held + used[after.start] > shard_bytes


def test_planned_sizes_are_the_written_ones(tmp_path: Path, folder: Source) -> None:
    packed = pack_quietly(folder, tmp_path / "out")
    for shard in packed.shards:
        with tarfile.open(shard) as tar:
            last = tar.getmembers()[-1]
            assert last.offset_data + 512 + 1024 <= SHARD_BYTES
        assert shard.stat().st_size == -(-(last.offset_data + 512 + 1024) // 10240) * 10240


# ------------------------------------------------------------------------------------------------------ written anew


def upright(data: bytes) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.getexif().get(0x0112) == 6:
        image = image.transpose(Image.Transpose.ROTATE_270)
    return image.convert("RGB")


@pytest.mark.parametrize(
    ("height", "width", "new"),
    [(100, 60, (53, 32)), (60, 100, (32, 53)), (33, 33, (32, 32)), (33, 400, (32, 388)), (47, 48, (32, 33))],
)
def test_shorter_side_becomes_n(tmp_path: Path, height: int, width: int, new: tuple[int, int]) -> None:
    data = encoded(height, width, "PNG")
    source = write(tmp_path / "photos", {"a.png": data})
    packed = pack_quietly(source, tmp_path / "out", resize=32)
    made = members(*packed.shards)["000000000.jpg"]
    expected = io.BytesIO()
    upright(data).resize(new[::-1], Image.Resampling.BICUBIC).save(expected, "JPEG", quality=92, subsampling=0)
    assert Image.open(io.BytesIO(made)).size == new[::-1]
    assert made == expected.getvalue()
    assert packed.summary["height"] == {"min": new[0], "median": new[0], "max": new[0]}
    assert packed.summary["width"] == {"min": new[1], "median": new[1], "max": new[1]}


def test_what_is_not_larger_stays_as_it_is(tmp_path: Path) -> None:
    files = {"a.png": encoded(32, 900, "PNG"), "b.gif": encoded(5, 5, "GIF"), "c.jpg": encoded(500, 31)}
    packed = pack_quietly(write(tmp_path / "photos", files), tmp_path / "out", resize=32, quality=10)
    assert list(members(*packed.shards).values()) == list(files.values())


def test_upright_grey_and_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    half_clear = Image.new("RGBA", (64, 64), (0, 0, 0, 51))
    file = io.BytesIO()
    half_clear.save(file, "PNG")
    files = {
        "clear.png": file.getvalue(),
        "grey.jpg": encoded(50, 70, mode="L"),
        "turned.jpg": encoded(50, 70, exif=exif),
    }
    packed = pack_quietly(write(tmp_path / "photos", files), tmp_path / "out", resize=32)
    clear, grey, turned = (Image.open(io.BytesIO(data)) for data in members(*packed.shards).values())
    assert (clear.format, clear.mode, clear.size) == ("JPEG", "RGB", (32, 32))
    assert set(np.array(clear).flatten().tolist()) == {204}
    assert (grey.format, grey.mode, grey.size) == ("JPEG", "L", (45, 32))
    assert (turned.format, turned.size, dict(turned.getexif())) == ("JPEG", (32, 45), {})
    expected = np.array(upright(files["turned.jpg"]).resize((32, 45), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(np.array(turned) - expected).mean() < 3
    assert packed.summary["modes"] == {"L": 1, "RGB": 2}


def test_quality_alone_writes_every_image_anew(tmp_path: Path, folder: Source) -> None:
    packed = pack_quietly(folder, tmp_path / "out", quality=20)
    for number, data in enumerate(data for name, data in members(*packed.shards).items() if name.endswith("jpg")):
        expected = io.BytesIO()
        upright(folder.read(number)).save(expected, "JPEG", quality=20, subsampling=0)
        assert data == expected.getvalue()


def test_many_bands_are_left_alone(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for bands in (4, 7):
        (tmp_path / "tiles").mkdir(exist_ok=True)
        pixels = random.integers(0, 2**16 if bands == 7 else 2**8, (60, 50, bands))
        tifffile.imwrite(
            tmp_path / "tiles" / f"{bands}.tif",
            pixels.astype(np.uint16 if bands == 7 else np.uint8),
            photometric="minisblack" if bands == 7 else "rgb",
            planarconfig="contig",
            extrasamples=None if bands == 7 else ["unspecified"],
        )
    packed = pack_quietly(open_source(str(tmp_path / "tiles")), tmp_path / "out", resize=32)
    for number, bands in enumerate((4, 7)):
        assert members(*packed.shards)[f"{number:09d}.tif"] == (tmp_path / "tiles" / f"{bands}.tif").read_bytes()
    assert packed.summary["modes"] == {"7 bands": 1, "RGB": 1}
    assert packed.summary["width"] == {"min": 50, "median": 50, "max": 50}


def test_bands_alone_have_no_mean(tmp_path: Path) -> None:
    (tmp_path / "tiles").mkdir()
    tifffile.imwrite(tmp_path / "tiles" / "1.tif", np.zeros((9, 9, 13), np.uint16), planarconfig="contig")
    packed = pack_quietly(open_source(str(tmp_path / "tiles")), tmp_path / "out")
    assert (packed.summary["mean"], packed.summary["std"]) == (None, None)
    assert "mean" not in describe(packed.summary)
    assert read_summary([str(shard) for shard in packed.shards]) is None


def test_too_long_for_a_jpeg(tmp_path: Path) -> None:
    source = write(tmp_path / "photos", {"a.png": (data := encoded(17, 70_000, "PNG"))})
    assert members(*pack_quietly(source, tmp_path / "a", resize=16).shards)["000000000.png"] == data
    assert members(*pack_quietly(source, tmp_path / "b", quality=90).shards)["000000000.png"] == data


def test_shards_are_about_as_large_as_asked(tmp_path: Path) -> None:
    files = {f"{n:03d}.png": encoded(96 + n % 9, 120, "PNG", seed=n) for n in range(80)}
    packed = pack_quietly(write(tmp_path / "photos", files), tmp_path / "out", shard_bytes=40_000, resize=32)
    sizes = [shard.stat().st_size for shard in packed.shards[:-1]]
    assert len(sizes) >= 2
    assert all(0.7 * 40_000 < size < 1.3 * 40_000 for size in sizes)


# ------------------------------------------------------------------------------------------------- broken and duplicate


def unreadable(source: Source, monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    read = FolderSource.read

    def read_some(self: FolderSource, index: int) -> bytes:
        if index in numbers:
            raise BadImage("cannot be read: Input/output error")
        return read(self, index)

    monkeypatch.setattr(FolderSource, "read", read_some)


def test_broken_images_are_left_out_and_named(tmp_path: Path, folder: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = encoded(90, 90, "PNG", seed=5)[:-400]
    write(Path(folder.path), {"ant/a.jpg": b"no image", "bee/b.png": cut, "cow/0.jpg": b""})
    source = open_source(folder.path)
    unreadable(source, monkeypatch, 3)
    packed = pack_quietly(source, tmp_path / "out")
    bad = {entry["image"]: entry["reason"] for entry in packed.summary["broken"]}
    assert list(bad) == [source.key(3), "ant/a.jpg", "bee/b.png", "cow/0.jpg"]
    assert bad["ant/a.jpg"].startswith("8 bytes that are no JPEG")
    assert bad[source.key(3)] == "cannot be read: Input/output error"
    assert packed.summary["num_broken"] == 4
    assert packed.num_images == packed.summary["images"] == 17
    good = [number for number in range(21) if source.key(number) not in bad]
    keys = [name.partition(".")[0] for name in members(*packed.shards) if name.endswith("jpg")]
    assert keys == [f"{number:09d}" for number in good]
    assert packed.summary["classes"] == {"ant": 5, "bee": 6, "cow": 6}
    assert "left out, broken: 4: " + source.key(3) in describe(packed.summary)
    assert "and 1 more" in describe(packed.summary)


def test_a_shard_of_broken_images_is_not_there(tmp_path: Path) -> None:
    files = {f"{n}.jpg": b"x" * 600 if n in (2, 3) else encoded(20, 20, seed=n) for n in range(6)}
    source = write(tmp_path / "photos", files)
    packed = pack_quietly(source, tmp_path / "out", shard_bytes=1)
    assert [shard.name for shard in packed.shards] == [f"photos-00000{n}.tar" for n in (0, 1, 4, 5)]
    assert packed.summary["shards"] == packed.written == 4
    assert pack_quietly(source, tmp_path / "out", shard_bytes=1).written == 0
    assert len(open_source(str(tmp_path / "out"))) == 4
    assert read_summary([str(shard) for shard in packed.shards]) is not None


def test_nothing_but_broken_images(tmp_path: Path) -> None:
    source = write(tmp_path / "photos", {"a.jpg": b"x", "b.jpg": b"y"})
    with pytest.raises(UserError, match=r"none of its 2 images can be read; a\.jpg: 1 bytes that are no JPEG"):
        pack_quietly(source, tmp_path / "out")
    assert files_in(tmp_path / "out") == {}


def test_reasons_are_the_same_in_every_run() -> None:
    assert pack_module.without_addresses("no <BytesIO object at 0x7f12ab>") == "no <BytesIO object>"


@pytest.mark.parametrize("options", [{}, {"resize": 16}])
def test_duplicates_are_found_and_kept(tmp_path: Path, options: dict[str, int]) -> None:
    first, second = encoded(20, 20), encoded(20, 20, seed=1)
    files = {"0": first, "1": second, "2": first, "3": b"broken", "4": b"broken", "5": first, "6": second}
    source = write(tmp_path / "photos", {f"{name}.jpg": data for name, data in files.items()})
    packed = pack_quietly(source, tmp_path / "out", shard_bytes=3_000, **options)
    assert len(packed.shards) > 2
    same = [(pair["image"], pair["same_as"]) for pair in packed.summary["duplicates"]]
    assert same == [("2.jpg", "0.jpg"), ("5.jpg", "0.jpg"), ("6.jpg", "1.jpg")]
    assert packed.summary["num_duplicates"] == 3
    assert packed.num_images == 5
    assert "there twice, kept: 3: 2.jpg = 0.jpg, 5.jpg = 0.jpg, 6.jpg = 1.jpg" in describe(packed.summary)


@given(st.lists(st.integers(0, 6), max_size=40))
def test_duplicates_against_the_slow_loop(values: list[int]) -> None:
    digests = np.array([(value % 2, value) for value in values], dtype=np.uint64).reshape(-1, 2)
    images = 10 + 3 * np.arange(len(values))
    slow = [(images[i], images[values.index(v)]) for i, v in enumerate(values) if values.index(v) < i]
    assert pack_module.duplicates(images, digests).tolist() == [list(pair) for pair in slow]


def test_long_lists_are_cut_but_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "MOST_LISTED", 2)
    files = {f"{n}.jpg": b"x" if n % 2 else encoded(8, 8) for n in range(10)}
    packed = pack_quietly(write(tmp_path / "photos", files), tmp_path / "out")
    assert [len(packed.summary[name]) for name in ("broken", "duplicates")] == [2, 2]
    assert [packed.summary[f"num_{name}"] for name in ("broken", "duplicates")] == [5, 4]


# ------------------------------------------------------------------------------------------------------------- summary


def test_figures_against_numpy(tmp_path: Path) -> None:
    files = {
        "a/0.png": encoded(30, 50, "PNG"),
        "a/1.png": encoded(10, 20, "PNG", "L"),
        "b/2.jpg": encoded(41, 7),
        "b/3.webp": encoded(13, 90, "WEBP", lossless=True),
        "c/4.gif": encoded(8, 8, "GIF", "P"),
        "c/5.jpg": b"broken",
    }
    packed = pack_quietly(write(tmp_path / "photos", files), tmp_path / "out")
    images = [
        np.array(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64) / 255
        for data in list(files.values())[:5]
    ]
    mean = np.mean([image.mean((0, 1)) for image in images], axis=0)
    square = np.mean([(image**2).mean((0, 1)) for image in images], axis=0)
    summary = packed.summary
    np.testing.assert_allclose(summary["mean"], mean, rtol=1e-13)
    np.testing.assert_allclose(summary["std"], np.sqrt(square - mean**2), rtol=1e-12)
    heights, widths = zip(*(image.shape[:2] for image in images), strict=True)
    for name, sides in (("height", heights), ("width", widths)):
        assert summary[name] == {"min": min(sides), "median": np.median(sides), "max": max(sides)}
    assert summary["formats"] == {"GIF": 1, "JPEG": 1, "PNG": 2, "WEBP": 1}
    assert summary["modes"] == {"L": 1, "P": 1, "RGB": 3}
    assert summary["classes"] == {"a": 2, "b": 2, "c": 1}
    assert (summary["images"], summary["shards"]) == (5, len(packed.shards))
    assert summary["bytes"] == sum(shard.stat().st_size for shard in packed.shards)
    assert json.loads((tmp_path / "out" / "photos-summary.json").read_text()) == summary


def test_figures_are_of_the_images_as_packed(tmp_path: Path, folder: Source) -> None:
    packed = pack_quietly(folder, tmp_path / "out", resize=17, quality=30)
    images = [Image.open(io.BytesIO(data)) for name, data in members(*packed.shards).items() if "jpg" in name]
    means = [np.array(image, dtype=np.float64).mean((0, 1)) / 255 for image in images]
    np.testing.assert_allclose(packed.summary["mean"], np.mean(means, axis=0), rtol=1e-13)
    assert {min(image.size) for image in images} == {17}


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 9), st.sampled_from(["L", "RGB"]))
def test_moments_of_an_image(height: int, width: int, seed: int, mode: str) -> None:
    data = encoded(height, width, "PNG", mode, seed)
    pixels = np.array(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64).reshape(-1, 3) / 255
    found = pack_module.examine(data, None, None).moments
    assert found is not None
    np.testing.assert_allclose(found, [pixels.mean(0), (pixels**2).mean(0)], rtol=1e-13)


@given(st.dictionaries(st.integers(1, 50), st.integers(1, 9), min_size=1, max_size=9))
def test_spread_against_numpy(counts: dict[int, int]) -> None:
    values = np.repeat(list(counts), list(counts.values()))
    expected = {"min": values.min(), "median": np.median(values), "max": values.max()}
    assert pack_module.spread(Counter(counts)) == expected


def test_reading_the_summary_of_several_packs(tmp_path: Path, folder: Source) -> None:
    ant = open_source(str(Path(folder.path) / "ant"))
    others = write(tmp_path / "others", {f"{n}.png": encoded(9, 9, "PNG", seed=n) for n in range(4)})
    first, second = pack_quietly(ant, tmp_path / "out"), pack_quietly(others, tmp_path / "out")
    together = {f"{len(source)}-{n}.png": source.read(n) for source in (ant, others) for n in range(len(source))}
    both = pack_quietly(write(tmp_path / "both", together), tmp_path / "out both")
    paths = [str(shard) for shard in (*second.shards, *first.shards)]
    summary = read_summary(paths)
    assert summary is not None
    assert summary["images"] == 10
    for figure in ("mean", "std"):
        assert summary[figure] == pytest.approx(both.summary[figure], rel=1e-12)
    alone = read_summary([os.path.relpath(shard) for shard in first.shards])
    assert alone is not None
    assert alone["mean"] == pytest.approx(first.summary["mean"], rel=1e-14)


def test_no_summary_for_a_part_or_for_something_else(tmp_path: Path, folder: Source) -> None:
    paths = [str(shard) for shard in pack_quietly(folder, tmp_path / "out").shards]
    assert read_summary(paths) is not None
    assert read_summary(paths[1:]) is None
    assert read_summary([*paths, str(tmp_path / "else.tar")]) is None
    assert read_summary([]) is None
    kept = Path(paths[0]).read_bytes()
    Path(paths[0]).unlink()
    assert read_summary(paths) is None
    assert read_summary(paths[1:]) is None
    Path(paths[0]).write_bytes(kept + bytes(512))
    assert read_summary(paths) is None
    Path(paths[0]).write_bytes(kept)
    assert read_summary(paths) is not None
    (tmp_path / "out" / "my_photos-summary.json").write_text("{}")
    assert read_summary(paths) is None
    (tmp_path / "out" / "my_photos-summary.json").unlink()
    assert read_summary(paths) is None


def test_description(tmp_path: Path, folder: Source) -> None:
    write(Path(folder.path), {"ant/new\nline.jpg": b"broken"})
    source = open_source(folder.path)
    lines = describe(pack_quietly(source, tmp_path / "out").summary).splitlines()
    assert re.fullmatch(r"18 images in \d+ shards, \d+\.\d kB", lines[0])
    assert lines[1] == "formats: 18 JPEG; modes: 18 RGB"
    assert lines[2] == "width 23 to 40, median 31.5; height 20 to 37, median 28.5"
    assert re.fullmatch(r"mean 0\.\d{4} 0\.\d{4} 0\.\d{4}, std 0\.\d{4} 0\.\d{4} 0\.\d{4}", lines[3])
    assert lines[4] == "3 classes of 6 to 6 images"
    assert lines[5].startswith(r"left out, broken: 1: ant/new\nline.jpg (6 bytes that are no")
    assert len(lines) == 6


def test_names_that_are_no_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "photos")
    os.makedirs(folder + b"/caf\xe9")
    os.makedirs(folder + b"/tea")
    for name in (b"/caf\xe9/1.jpg", b"/tea/2.jpg"):
        Path(os.fsdecode(folder + name)).write_bytes(encoded(9, 9))
    packed = pack_quietly(open_source(str(tmp_path / "photos")), tmp_path / "out")
    assert r"tea/2.jpg = caf\udce9/1.jpg" in describe(packed.summary)
    assert open_source(str(tmp_path / "out")).classes == ["caf\udce9", "tea"]


# -------------------------------------------------------------------------------------------------------------- stopped


def workers_end_at(image: int, monkeypatch: pytest.MonkeyPatch, end: Callable[[], None]) -> None:
    read, parent = FolderSource.read, os.getpid()

    def read_or_end(source: FolderSource, index: int) -> bytes:
        if index == image and os.getpid() != parent:
            end()
        return read(source, index)

    monkeypatch.setattr(FolderSource, "read", read_or_end)


def shoot_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("at", [0, 1, 9, 17])
@pytest.mark.parametrize("options", [{}, {"resize": 20}])
def test_goes_on_after_a_worker_was_shot(
    tmp_path: Path, folder: Source, monkeypatch: pytest.MonkeyPatch, at: int, options: dict[str, int]
) -> None:
    pack_quietly(folder, tmp_path / "whole", **options)
    workers_end_at(at, monkeypatch, shoot_self)
    out = tmp_path / "shot"
    with pytest.raises(UserError, match=r"a worker process ended with code -9"):
        pack_quietly(folder, out, **options)
    monkeypatch.undo()
    monkeypatch.setattr(pack_module, "estimate", None)  # it is in the note
    done = {shard.name: shard.stat().st_mtime_ns for shard in out.glob("*.tar")}
    packed = pack_quietly(folder, out, **options)
    assert packed.written == len(packed.shards) - len(done)
    assert files_in(out) == files_in(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    assert pack_quietly(folder, out, **options).written == 0


SLOW = """
import sys, time
from pathlib import Path
from ssl_global.data.pack import pack
from ssl_global.data.source import FolderSource, open_source
read = FolderSource.read
def read_slowly(self, index):
    time.sleep(0.1)
    return read(self, index)
FolderSource.read = read_slowly
try:
    pack(open_source(sys.argv[1]), Path(sys.argv[2]), shard_bytes=int(sys.argv[3]), processes=2)
except KeyboardInterrupt:
    sys.exit(130)
"""


def started(source: Source, out: Path) -> warm.Started:
    """A call of its own process group, that has finished a shard and is at the next."""
    for _ in range(3):  # where others have the processors, one may be over before it was looked at
        process = warm.python("-c", SLOW, source.path, out, SHARD_BYTES, group=True)
        while process.poll() is None:
            if list(out.glob("*.tar")) and list(out.glob("*.unfinished")):
                return process
            time.sleep(0.01)
        _, said = process.communicate()
        assert process.returncode == 0, said
        shutil.rmtree(out)
    raise AssertionError("always over before it was looked at")


def group_is_gone(process: warm.Started) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("whole_group", [True, False])
def test_goes_on_after_kill_9(tmp_path: Path, folder: Source, whole_group: bool) -> None:
    process = started(folder, tmp_path / "killed")
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.communicate()
    done = {shard.name: shard.stat().st_mtime_ns for shard in (tmp_path / "killed").glob("*.tar")}
    packed = pack_quietly(folder, tmp_path / "killed")  # waits for orphans to end, if there are any
    assert len(packed.shards) - len(done) - 2 <= packed.written <= len(packed.shards) - len(done)
    pack_quietly(folder, tmp_path / "whole")
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")
    assert {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in done} == done


@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c(tmp_path: Path, folder: Source, whole_group: bool) -> None:
    process = started(folder, tmp_path / "out")
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert (process.returncode, said) == (130, "")
    assert group_is_gone(process)
    assert not list((tmp_path / "out").glob("*.unfinished"))
    pack_quietly(folder, tmp_path / "out")
    pack_quietly(folder, tmp_path / "whole")
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_torn_figures_are_made_again(tmp_path: Path, folder: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine leaves them whose power failed."""
    pack_quietly(folder, tmp_path / "whole")
    workers_end_at(15, monkeypatch, shoot_self)
    with pytest.raises(UserError):
        pack_quietly(folder, tmp_path / "out", processes=1)
    monkeypatch.undo()
    figures = sorted((tmp_path / "out").glob(".*.json"))
    assert len(figures) >= 2
    figures[0].write_bytes(figures[0].read_bytes()[:50])
    figures[1].unlink()
    pack_quietly(folder, tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_a_lost_shard_is_written_again(tmp_path: Path, folder: Source) -> None:
    packed = pack_quietly(folder, tmp_path / "out")
    before = files_in(tmp_path / "out")
    packed.shards[2].unlink()
    assert pack_quietly(folder, tmp_path / "out").written == 1
    assert files_in(tmp_path / "out") == before


def test_leftovers_of_other_options_do_no_harm(tmp_path: Path, folder: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rm OUT/*` leaves what is hidden."""
    workers_end_at(15, monkeypatch, shoot_self)
    with pytest.raises(UserError):
        pack_quietly(folder, tmp_path / "out", processes=1, shard_bytes=1)
    monkeypatch.undo()
    for file in (tmp_path / "out").glob("my_photos*"):
        file.unlink()
    assert list((tmp_path / "out").glob(".my_photos*"))
    pack_quietly(folder, tmp_path / "out")
    pack_quietly(folder, tmp_path / "whole")
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_a_second_call_at_once_is_refused(tmp_path: Path, folder: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "SECONDS_TO_WAIT", 0.0)
    pack_quietly(folder, tmp_path / "out")
    with (tmp_path / "out" / "my_photos-pack.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"my_photos-pack\.json: another process is packing"):
            pack_quietly(folder, tmp_path / "out")
    assert pack_quietly(folder, tmp_path / "out").written == 0


# -------------------------------------------------------------------------------------------------------------- refused


def test_refuses_a_source_that_changed(tmp_path: Path, folder: Source) -> None:
    pack_quietly(folder, tmp_path / "out")
    write(Path(folder.path), {"ant/new.jpg": b"new"})
    with pytest.raises(UserError, match=r"my_photos-pack\.json: packing was begun with other images"):
        pack_quietly(open_source(folder.path), tmp_path / "out")


def test_refuses_other_labels(tmp_path: Path, folder: Source) -> None:
    pack_quietly(folder, tmp_path / "out")
    assert folder.labels is not None
    folder.labels[0] = 2
    with pytest.raises(UserError, match="begun with other labels"):
        pack_quietly(folder, tmp_path / "out")


def test_refuses_other_options(tmp_path: Path, folder: Source) -> None:
    pack_quietly(folder, tmp_path / "out")
    for options, said in (
        ({"shard_bytes": 7_000}, "shard_bytes = 6000, not 7000"),
        ({"resize": 16}, "resize = None, not 16"),
        ({"quality": 90}, "quality = None, not 90"),
    ):
        with pytest.raises(UserError, match=f"packing was begun with {said}; give another folder"):
            pack_quietly(folder, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard_bytes": 0}, "shard_bytes = 0: at least 1"),
        ({"processes": 0}, "processes = 0: at least 1"),
        ({"resize": 15}, "resize = 15: .* at least 16"),
        ({"quality": 0}, "quality = 0: .* from 1 to 100"),
        ({"quality": 101}, "quality = 101"),
    ],
)
def test_refuses_options_that_cannot_be(tmp_path: Path, folder: Source, options: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        pack_quietly(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_refuses_shards_and_classes_from_elsewhere(tmp_path: Path, folder: Source) -> None:
    for name, content in {"my_photos-000000.tar": "x", "classes.json": '["other"]'}.items():
        out = tmp_path / f"with {name}"
        out.mkdir()
        (out / name).write_text(content)
        with pytest.raises(UserError, match="give another folder for the shards"):
            pack_quietly(folder, out)
        assert files_in(out) == {name: content.encode()}


def test_refuses_the_folder_of_the_images(tmp_path: Path, folder: Source) -> None:
    with pytest.raises(UserError, match="holds the images themselves"):
        pack_quietly(folder, Path(folder.path))


def test_two_packs_may_share_their_out(tmp_path: Path, folder: Source) -> None:
    pack_quietly(folder, tmp_path / "out")
    (tmp_path / "my photos").rename(tmp_path / "my")  # "my-*.tar" must not take "my_photos-000000.tar" for its own
    pack_quietly(open_source(str(tmp_path / "my")), tmp_path / "out")
    assert len(open_source(str(tmp_path / "out" / "my-*.tar"))) == 18


def test_image_that_changes_while_it_is_packed(tmp_path: Path, folder: Source) -> None:
    (Path(folder.path) / folder.key(3)).write_bytes(b"shorter")
    with pytest.raises(UserError, match=re.escape(f"{folder.key(3)} changed while it was packed")):
        pack_quietly(folder, tmp_path / "out", shard_bytes=10**6)
    assert list(files_in(tmp_path / "out")) == ["my_photos-pack.json"]


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path, folder: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("ours")

    workers_end_at(4, monkeypatch, fail)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*read_or_end.*ZeroDivisionError: ours"):
        pack_quietly(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.unfinished"))


def test_out_that_cannot_be_written(tmp_path: Path, folder: Source) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written: "):
        pack_quietly(folder, tmp_path / "file")


def test_refuses_when_the_disk_is_too_small(tmp_path: Path, folder: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pack_quietly(folder, tmp_path / "whole")
    needed = sum(shard.stat().st_size for shard in whole.shards)

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, size))

    free(needed - 1)
    with pytest.raises(UserError, match=r"out: \d.* are free there, but the shards need \d.* more"):
        pack_quietly(folder, tmp_path / "out")
    assert files_in(tmp_path / "out") == {}
    pack_quietly(folder, tmp_path / "resized", resize=16)  # how much this needs is not known
    free(needed)
    packed = pack_quietly(folder, tmp_path / "out")
    packed.shards[0].unlink()
    free(packed.shards[1].stat().st_size)
    assert pack_quietly(folder, tmp_path / "out").written == 1


@pytest.mark.parametrize("processes", [1, 3])
def test_disk_that_fills_up(tmp_path: Path, folder: Source, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    fsync, out = os.fsync, tmp_path / "out"

    def full(file: int) -> None:
        if len(list(out.glob("*.tar"))) >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        pack_quietly(folder, out, processes=processes)
    assert not list(out.glob("*.unfinished"))
    monkeypatch.undo()
    pack_quietly(folder, out)
    pack_quietly(folder, tmp_path / "whole")
    assert files_in(out) == files_in(tmp_path / "whole")


LIMITED = """
import resource, sys
from pathlib import Path
from ssl_global.data.pack import pack
from ssl_global.data.source import open_source
from ssl_global.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
try:
    pack(open_source(sys.argv[1]), Path(sys.argv[2]), shard_bytes=30_000, processes=2)
except UserError as error:
    sys.exit(f"one line: {error}")
"""


def test_writes_that_the_system_refuses(tmp_path: Path, folder: Source) -> None:
    process = warm.completed("-c", LIMITED, folder.path, tmp_path / "out")
    assert process.returncode == 1
    assert re.fullmatch(r"one line: .*my_photos-00000\d\.tar: cannot be written: File too large\n", process.stderr)
    assert list(files_in(tmp_path / "out")) == ["my_photos-pack.json"]


# ------------------------------------------------------------------------------------------------------------- progress


def test_progress_counts_images_over_all_processes(
    tmp_path: Path, folder: Source, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", 0.0)
    packed = pack_quietly(folder, tmp_path / "out", progress=True)
    assert capsys.readouterr().err.splitlines() == [f"packed {n} of 18 images" for n in range(19)]
    packed.shards[0].unlink()
    pack_quietly(folder, tmp_path / "out", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"packed {n} of 18 images" for n in range(19 - len(lines), 19)]
    assert 1 <= len(lines) < 18
