"""Videos: as many frames, as large, as were drawn; one at a time; what cannot be read is named."""

import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ssl_global.errors import UserError
from ssl_global.explain import video as v
from ssl_global.explain.features import fit_basis
from ssl_global.explain.pictures import as_input
from ssl_global.explain.places import patch_features

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def frame(number, width=33, height=21):
    """A square that moves over a slope."""
    rows, cols = np.mgrid[:height, :width]
    pixels = np.stack([rows * 6, cols * 5, np.full_like(rows, 60)], -1).astype(np.uint8)
    pixels[5:13, 2 + number : 10 + number] = (250, 240, 20)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "frames"
    place.mkdir()
    for number in range(12):
        frame(number).save(place / f"{number:03}.png")
    return place


def itself(picture):
    return picture


def error(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean()


@pytest.mark.parametrize(("suffix", "size", "most"), [("mp4", (34, 22), 8.0), ("gif", (33, 21), 3.0)])
def test_what_is_written_is_read_again(folder, tmp_path, suffix, size, most):
    out = tmp_path / "there" / f"made.{suffix}"
    assert v.write(itself, v.open_frames(folder), out, rate=10, visible=False) == 12
    found = v.open_frames(out)
    assert found.count == 12
    assert found.rate == pytest.approx(10)
    frames = list(found)
    assert [one.size for one in frames] == [size] * 12
    for number, one in enumerate(frames):
        assert error(one.crop((0, 0, 33, 21)), frame(number)) < most
    assert list(out.parent.iterdir()) == [out]
    assert len(list(found)) == 12  # once more from the first


def test_a_grey_backbone_sees_grey_frames(folder):
    model = timm.create_model("test_vit", in_chans=1, img_size=(32, 48), num_classes=0).eval()
    frames = v.open_frames(folder)
    picture = v.pca_over_time(model, frames, shorter=32, multiple=16, mean=MEAN[:1], std=STD[:1])
    assert picture(frame(0)).size == (66, 21)
    image = as_input(frame(0), shorter=21, multiple=1, mean=(0.0,), std=(1.0,))
    assert np.array_equal((image[0, 0] * 255).round(), np.asarray(frame(0).convert("L")))


def test_frames_that_the_backbone_cannot_take_are_one_line(folder):
    model, frames = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=1).eval(), v.open_frames(folder)
    for over_time in (v.pca_over_time, v.attention_over_time):
        with pytest.raises(UserError, match=r"^frames of 48 x 32 pixels: the backbone does not take them: "):
            over_time(model, frames, shorter=32, multiple=16, mean=MEAN, std=STD)
        with pytest.raises(UserError, match="images of 13 channels: a picture has 3, or 1"):
            over_time(model, frames, shorter=32, multiple=16, mean=(0.5,) * 13, std=(0.5,) * 13)


def test_a_video_without_a_frame_is_one_line(tmp_path):
    model = timm.create_model("test_vit", num_classes=0)
    none = v.Frames(tmp_path / "none.mkv", 0, 10, lambda: (one for one in ()))
    with pytest.raises(UserError, match=r"none\.mkv: holds no frame"):
        v.pca_over_time(model, none, shorter=32, multiple=16, mean=MEAN, std=STD)


def test_a_gif_is_one_for_pil(folder, tmp_path):
    v.write(itself, v.open_frames(folder), tmp_path / "a.gif", rate=20, visible=False)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["loop"], image.info["duration"]) == (12, (33, 21), 0, 50)


def test_a_gif_becomes_a_video(folder, tmp_path):
    v.write(itself, v.open_frames(folder), tmp_path / "a.gif", visible=False)
    v.write(itself, v.open_frames(tmp_path / "a.gif"), tmp_path / "a.mp4", visible=False)
    assert len(list(v.open_frames(tmp_path / "a.mp4"))) == 12


def test_one_frame_is_in_memory_at_a_time(folder, tmp_path):
    """Each is drawn before the next one is read."""
    plain, happened = v.open_frames(folder), []

    def opened():
        for number, one in enumerate(plain):
            happened.append(("read", number))
            yield one

    def picture(one):
        happened.append(("drawn", sum(word == "drawn" for word, _ in happened)))
        return one

    frames = v.Frames(plain.path, plain.count, plain.rate, opened)
    v.write(picture, frames, tmp_path / "a.gif", visible=False)
    assert happened == [(word, number) for number in range(12) for word in ("read", "drawn")]


# ---------------------------------------------------------------------------------------------------------- what is bad


def test_a_corrupt_frame_of_a_folder_is_named_and_nothing_is_left(folder, tmp_path):
    bad = folder / "007.png"
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    for suffix in ("mp4", "gif"):
        out = tmp_path / f"made.{suffix}"
        with pytest.raises(UserError, match=r"007\.png: ") as told:
            v.write(itself, v.open_frames(folder), out, visible=False)
        assert len(str(told.value).splitlines()) == 1
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]


def test_a_corrupt_gif_names_its_frame(folder, tmp_path):
    path = tmp_path / "a.gif"
    v.write(itself, v.open_frames(folder), path, visible=False)
    data = bytearray(path.read_bytes())
    places = [i for i in range(len(data)) if data[i : i + 3] == b"!\xf9\x04"]
    path.write_bytes(data[: places[8] + 30])
    frames = v.open_frames(path)
    with pytest.raises(UserError, match=r"a\.gif: frame 8 cannot be read"):
        list(frames)


def test_a_video_that_breaks_off_names_its_frame(folder, tmp_path):
    path = tmp_path / "a.mp4"
    v.write(itself, v.open_frames(folder), path, visible=False)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    # The index stays, and the pictures behind the first are gone.
    size = int.from_bytes(data[start - 8 : start - 4], "big") - 8
    data[start + size // 2 : start + size] = bytes(size - size // 2)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.mp4: frame \d+ (cannot be read|is corrupt)") as told:
        list(v.open_frames(path))
    assert len(str(told.value).splitlines()) == 1
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.mp4: no video that can be read"):
        v.open_frames(path)


def test_what_is_no_video(tmp_path):
    with pytest.raises(UserError, match="there is no such file or folder"):
        v.open_frames(tmp_path / "nothing.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no image in this folder"):
        v.open_frames(tmp_path / "empty")
    (tmp_path / "a.gif").write_bytes(b"GIF89a and no more")
    with pytest.raises(UserError, match=r"a\.gif: no image"):
        v.open_frames(tmp_path / "a.gif")


def test_what_cannot_be_written(folder, tmp_path):
    frames = v.open_frames(folder)
    with pytest.raises(UserError, match=r"a\.avi: an \.mp4 or a \.gif would be right"):
        v.write(itself, frames, tmp_path / "a.avi")
    with pytest.raises(UserError, match="rate = 0: frames a second, above 0"):
        v.write(itself, frames, tmp_path / "a.gif", rate=0)
    sizes = iter([(33, 21), (9, 9)])
    with pytest.raises(UserError, match=r"picture of frame 1 is of \(9, 9\) pixels, the first of \(33, 21\)"):
        v.write(lambda one: one.resize(next(sizes)), frames, tmp_path / "a.mp4", visible=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        v.write(itself, frames, tmp_path / "file" / "a.gif", visible=False)
    nothing = v.Frames(folder, 0, 12, lambda: (one for one in ()))
    with pytest.raises(UserError, match="holds no frame"):
        v.write(itself, nothing, tmp_path / "a.gif", visible=False)


def test_without_the_package_folders_and_gifs_work(folder, tmp_path, monkeypatch):
    v.write(itself, v.open_frames(folder), tmp_path / "a.mp4", visible=False)
    monkeypatch.setitem(sys.modules, "av", None)
    v.write(itself, v.open_frames(folder), tmp_path / "a.gif", visible=False)
    for failing in (
        lambda: v.open_frames(tmp_path / "a.mp4"),
        lambda: v.write(itself, v.open_frames(folder), tmp_path / "b.mp4", visible=False),
    ):
        with pytest.raises(UserError, match=r"videos need the package av; pip install 'ssl_global\[explain\]'"):
            failing()


# ------------------------------------------------------------------------------------------------------------ over time


def test_all_frames_have_the_basis_of_the_first_ones(folder):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, dynamic_img_size=True
    )
    ways = {"shorter": 32, "multiple": 8, "mean": MEAN, "std": STD}
    frames = v.open_frames(folder)
    picture = v.pca_over_time(model, frames, first=3, **ways)
    several = [patch_features(model, as_input(frame(number), **ways)) for number in range(12)]
    basis = fit_basis(several[:3], split=False)
    for number in (0, 11):
        drawn = picture(frame(number))
        assert drawn.size == (66, 21)
        assert error(drawn.crop((0, 0, 33, 21)), frame(number)) == 0
        expected = (basis.colours(several[number])[0] * 255).round()
        rows, cols = expected.shape[:2]
        for row in range(rows):
            for col in range(cols):
                at = (33 + int((col + 0.5) * 33 / cols), int((row + 0.5) * 21 / rows))
                assert drawn.getpixel(at) == tuple(int(value) for value in expected[row, col])
    with pytest.raises(UserError, match="first = 0: at least 1 frame"):
        v.pca_over_time(model, frames, first=0, **ways)
