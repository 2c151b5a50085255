"""Pictures of a video or of a folder of frames, frame by frame, into an .mp4 or a .gif.

    frames = open_frames("walk.mp4")                     # or a folder of images, or a .gif
    picture = pca_over_time(model, frames, shorter=224, multiple=16, mean=mean, std=std)
    write(picture, frames, "walk-pca.mp4")

One frame is in memory at a time, and the picture made of it. Videos are read and written by PyAV (BSD-3, with FFmpeg
in it), an extra: pip install 'ssl_global[explain]'; folders and .gif need PIL alone. An .mp4 is H.264 with sides made
even, since its colours lie on every other pixel.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import GifImagePlugin, Image
from torch import nn

from ssl_global.data.decode import BadImage, decode, only_bad_images
from ssl_global.data.files import whole, writing
from ssl_global.data.progress import report
from ssl_global.data.source import FolderSource
from ssl_global.errors import UserError
from ssl_global.explain.features import colour_picture, fit_basis
from ssl_global.explain.maps import looking_at_patches
from ssl_global.explain.pictures import as_input, as_picture, most_of, overlay
from ssl_global.explain.places import patch_features

T = TypeVar("T")

FRAMES_A_SECOND = 12.0  # of a folder (ours)
GIF_COLOURS = 256
PALETTE_FROM = (128, 128)  # pixels at most, that a frame's colours are chosen from (ours)
QUALITY = "20"  # x264's constant rate factor: 0 loses nothing, 51 is the worst; its own default is 23


@dataclass(frozen=True)
class Frames:
    """Frames that can be gone through more than once.

    path    where they are from
    count   how many there are, as the file says; 0: it does not say
    rate    frames a second
    opened  goes through them from the first; raises UserError that names a frame that cannot be read
    """

    path: Path
    count: int
    rate: float
    opened: Callable[[], Generator[Image.Image, None, None]]

    def __iter__(self) -> Generator[Image.Image, None, None]:
        return self.opened()


def open_frames(path: str | Path) -> Frames:
    """A folder of images, by their names' order; a .gif; or a video.

    Raises UserError if there is nothing, for an empty folder, and for what is no video.
    """
    path = Path(path)
    if path.is_dir():
        return of_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file or folder")
    return of_gif(path) if path.suffix.lower() == ".gif" else of_video(path)


def of_folder(path: Path) -> Frames:
    source = FolderSource(str(path))

    def opened() -> Generator[Image.Image, None, None]:
        for index in range(len(source)):
            try:
                yield as_picture(decode(source.read(index), 3))
            except BadImage as error:
                raise UserError(f"{source.place(index)}: {error}") from error

    return Frames(path, len(source), FRAMES_A_SECOND, opened)


def of_gif(path: Path) -> Frames:
    try:
        with only_bad_images(), Image.open(path) as image:
            duration = image.info.get("duration") or 1000 / FRAMES_A_SECOND
            count = 0
            with contextlib.suppress(Exception):  # of a frame that is told by its number below
                count = getattr(image, "n_frames", 1)
    except BadImage as error:
        raise UserError(f"{path}: no image: {error}") from error

    def opened() -> Generator[Image.Image, None, None]:
        with Image.open(path) as image:
            for number in itertools.count():
                try:
                    with only_bad_images():
                        image.seek(number)
                        frame = image.convert("RGB")
                except BadImage as error:
                    if isinstance(error.__cause__, EOFError):
                        return
                    raise UserError(f"{path}: frame {number} cannot be read: {error}") from error
                yield frame

    return Frames(path, count, 1000 / duration, opened)


def of_video(path: Path) -> Frames:
    av = the_package()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: holds no video")
            stream = container.streams.video[0]
            count, rate = stream.frames, float(stream.average_rate or FRAMES_A_SECOND)
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path}: no video that can be read: {error.strerror}") from error

    def opened() -> Generator[Image.Image, None, None]:
        number = 0
        try:
            with av.open(str(path)) as container:
                for frame in container.decode(video=0):
                    if frame.is_corrupt:
                        raise UserError(f"{path}: frame {number} is corrupt")
                    yield frame.to_image()
                    number += 1
        except av.error.FFmpegError as error:
            raise UserError(f"{path}: frame {number} cannot be read: {error.strerror}") from error
        if number < count:
            raise UserError(f"{path}: frame {number} cannot be read: the file ends, and should have {count}")

    return Frames(path, count, rate, opened)


def the_package() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(
            "videos need the package av; pip install 'ssl_global[explain]', or use folders and .gif"
        ) from error
    return av


# -------------------------------------------------------------------------------------------------------------- writing


def write(
    picture: Callable[[Image.Image], Image.Image],
    frames: Frames,
    out: str | Path,
    *,
    rate: float | None = None,
    visible: bool = True,
) -> int:
    """Makes a picture of each frame and writes them to `out`, an .mp4 or a .gif; returns how many there are.

    rate     frames a second; None: those of the frames
    visible  whether a bar is shown

    The file is there when it is whole. Raises UserError for another suffix, a rate that is not above 0, a frame that
    cannot be read, and a picture that is not as large as the first.
    """
    out, rate = Path(out), frames.rate if rate is None else rate
    if out.suffix not in (".mp4", ".gif"):
        raise UserError(f"{out}: an .mp4 or a .gif would be right")
    if not (rate > 0 and math.isfinite(rate)):
        raise UserError(f"rate = {rate:g}: frames a second, above 0")
    begin = Mp4 if out.suffix == ".mp4" else Gif
    done = 0
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with (
        whole(out) as file,
        contextlib.closing(iter(frames)) as each,
        report("drawn", frames.count, what="frames", visible=visible) as tell,
    ):
        writer: Mp4 | Gif | None = None
        for done, frame in enumerate(each, 1):
            made = picture(frame).convert("RGB")
            writer = writer or begin(file, made.size, rate)
            if made.size != writer.size:
                sizes = f"{made.size} pixels, the first of {writer.size}"
                raise UserError(f"{frames.path}: the picture of frame {done - 1} is of {sizes}")
            writer.add(made)
            tell(done)
        if writer is None:
            raise UserError(f"{frames.path}: holds no frame")
        writer.end()
    return done


class Mp4:
    def __init__(self, file: Any, size: tuple[int, int], rate: float) -> None:
        self.size = size
        self.container = the_package().open(file, "w", format="mp4")
        self.stream = self.container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
        self.stream.width, self.stream.height = (side + side % 2 for side in size)
        self.stream.pix_fmt, self.stream.options = "yuv420p", {"crf": QUALITY}

    def add(self, picture: Image.Image) -> None:
        odd = ((0, picture.height % 2), (0, picture.width % 2), (0, 0))
        even = np.pad(np.asarray(picture), odd, mode="edge")
        self.container.mux(self.stream.encode(the_package().VideoFrame.from_ndarray(even, format="rgb24")))

    def end(self) -> None:
        self.container.mux(self.stream.encode(None))
        self.container.close()


class Gif:
    """PIL's own `save` would hold all frames until the last; its parts for a header and a frame do not."""

    def __init__(self, file: Any, size: tuple[int, int], rate: float) -> None:
        self.file, self.size = file, size
        self.duration = max(20, round(100 / rate) * 10)  # milliseconds, in hundredths; faster ones are shown slowly
        self.begun = False

    def add(self, picture: Image.Image) -> None:
        small = picture.copy()
        small.thumbnail(PALETTE_FROM)  # choosing colours takes ten times as long as all the rest
        frame = picture.quantize(palette=small.quantize(GIF_COLOURS), dither=Image.Dither.NONE)
        if not self.begun:
            head, _ = GifImagePlugin.getheader(frame.copy(), info={"loop": 0, "duration": self.duration})
            self.file.write(b"".join(head))
            self.begun = True
        # Each frame has a palette of its own.
        for part in GifImagePlugin.getdata(frame, duration=self.duration, include_color_table=True):
            self.file.write(part)

    def end(self) -> None:
        self.file.write(b";")


# ------------------------------------------------------------------------------------------------------------ over time


def pca_over_time(
    model: nn.Module,
    frames: Frames,
    *,
    shorter: int,
    multiple: int,
    mean: Sequence[float],
    std: Sequence[float],
    first: int = 16,
    place: str | None = None,
    split: bool = False,
) -> Callable[[Image.Image], Image.Image]:
    """Makes of a frame the colours of its features (features.py), beside the frame.

    The basis is of the first frames, and the same for all: so a thing keeps its colour, and nothing flickers.

    shorter, multiple, mean, std   as `pictures.as_input`
    first                          frames that the basis is of
    place                          as `patch_features`
    split                          whether the background is left dark

    Raises UserError as `patch_features` and `fit_basis` do, and if `first` is below 1.
    """
    if first < 1:
        raise UserError(f"first = {first}: at least 1 frame")

    def features(frame: Image.Image) -> torch.Tensor:
        images = as_input(frame, shorter=shorter, multiple=multiple, mean=mean, std=std)
        return looked_at(model, images, lambda x: patch_features(model, x, place))

    with contextlib.closing(iter(frames)) as each:
        seen = [features(frame) for frame in itertools.islice(each, first)]
    if not seen:
        raise UserError(f"{frames.path}: holds no frame")
    basis = fit_basis(seen, split=split)

    def picture(frame: Image.Image) -> Image.Image:
        found = features(frame)
        foreground = basis.foreground(found)[0] if split else None
        drawn = colour_picture(basis.colours(found)[0], (frame.height, frame.width), foreground=foreground)
        return beside(frame, drawn)

    return picture


def attention_over_time(
    model: nn.Module,
    frames: Frames,
    *,
    shorter: int,
    multiple: int,
    mean: Sequence[float],
    std: Sequence[float],
    first: int = 16,
) -> Callable[[Image.Image], Image.Image]:
    """Makes of a frame what the last layer looks at, all heads together, beside the frame.

    The scale is of the first frames, and the same for all. Arguments as `pca_over_time`. Raises UserError as
    `maps.looking_at_patches` does, and if `first` is below 1.
    """
    if first < 1:
        raise UserError(f"first = {first}: at least 1 frame")

    def weights(frame: Image.Image) -> torch.Tensor:
        images = as_input(frame, shorter=shorter, multiple=multiple, mean=mean, std=std)
        last = looked_at(model, images, lambda x: looking_at_patches(model, x))[-1]
        return last.picture()[0].mean(0).cpu()

    with contextlib.closing(iter(frames)) as each:
        most = max((most_of(weights(frame)) for frame in itertools.islice(each, first)), default=1.0)

    def picture(frame: Image.Image) -> Image.Image:
        return beside(frame, overlay(frame, (weights(frame) / most).clamp(0, 1)))

    return picture


def looked_at(model: nn.Module, images: torch.Tensor, look: Callable[[torch.Tensor], T]) -> T:
    try:
        return look(images.to(next(model.parameters()).device))
    except UserError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        height, width = images.shape[-2:]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"frames of {width} x {height} pixels: the backbone does not take them: {reason}") from error


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both
