"""The page of a backbone: what it looks at, what it takes for alike, what it rebuilds, how it learnt, what it costs.

    report(subject, open_source("photos/"), Path("report"))      # writes report/index.html

Each picture that there cannot be of a backbone (attention of a ResNet) leaves a line that says why.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ssl_global.attention.attach import Attachment
from ssl_global.data.progress import report as report_progress
from ssl_global.data.source import Source
from ssl_global.errors import UserError
from ssl_global.explain import gates, sections
from ssl_global.explain.features import in_the_plane, neighbours_sheet, plane_picture
from ssl_global.explain.page import Listing, Part, Picture, Section, write
from ssl_global.explain.pictures import sheet, unnormalised
from ssl_global.explain.places import network
from ssl_global.explain.reconstruction import HEAD, reconstruct
from ssl_global.explain.sheets import (
    Shown,
    attention_sheet,
    colours_sheet,
    evenly,
    grad_cam_sheet,
    layers_sheet,
    likeness_sheet,
    squares,
    wholes,
)
from ssl_global.explain.subject import Subject
from ssl_global.methods.mae import Mae

COMPARED = 400  # images whose summaries are compared, evenly spread over those given (ours)
AT_ONCE = 32  # images (ours)
NEIGHBOURS = 6  # of each image (ours)
REBUILT_SIDE = 160  # pixels that a picture of an MAE is high (ours)
RATIOS = (None, 0.5, 0.9)  # of patches that an MAE is hidden: its own, fewer, more; what its masking cannot do is left


def report(subject: Subject, source: Source, out: Path, *, images: int, pixels: int | None) -> Path:
    """Writes OUT/index.html and returns its path.

    images  so many are shown, evenly spread over the source
    pixels  of their shorter side; None: what the backbone is made for

    Raises UserError if no image can be read, or if OUT cannot be written to.
    """
    device = next(network(subject.model).parameters()).device
    shown = looked_at(subject, source, images, pixels, device)
    if not shown:
        raise UserError(f"{source.path}: none of {min(images, len(source))} images could be read")
    steps = parts_of(subject, source, shown, device)
    found: list[Section] = []
    with report_progress("sections", len(steps), what="sections", visible=True) as done:
        for number, step in enumerate(steps, 1):
            found += step()
            done(number)
    page = out / "index.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(
            page,
            title=title(subject),
            subtitle=subtitle(subject, source, shown),
            sections=found,
        )
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from error
    return page


def title(subject: Subject) -> str:
    """A run's name; else the backbone's."""
    return subject.run.resolve().name if subject.run else Path(subject.name).name or subject.name


def subtitle(subject: Subject, source: Source, shown: Sequence[Shown]) -> str:
    return f"{subject.name} on {len(shown)} of {len(source)} images of {source.path}"


def looked_at(subject: Subject, source: Source, count: int, pixels: int | None, device: torch.device) -> list[Shown]:
    """Whole images where the backbone takes them, else their middle squares of its own size."""
    numbers, side = evenly(len(source), count), pixels or subject.pixels
    whole = wholes(source, numbers, data=subject.data, pixels=side, multiple=subject.multiple, device=device)
    try:
        with torch.no_grad():
            for one in whole:
                network(subject.model)(one.x)
    except (AssertionError, RuntimeError, ValueError) as error:
        if pixels is not None and pixels != subject.pixels:
            raise UserError(
                f"--pixels {pixels}: the backbone does not take it: {str(error).splitlines()[0]}"
            ) from error
        return squares(source, numbers, data=subject.data, pixels=subject.pixels, device=device)
    return whole


def parts_of(
    subject: Subject, source: Source, shown: Sequence[Shown], device: torch.device
) -> list[Callable[[], list[Section]]]:
    plain = network(subject.model)

    def looks() -> list[Section]:
        text = (
            "Rollout is what reached the answer through all layers. The others are the last layer's weights, of all "
            "heads and of each: yellow is where most of the weight goes."
        )
        drawn = tried(
            ("What the last layer looks at, image by image", lambda: attention_sheet(plain, shown)),
            ("What each layer looks at, from the first to the last", lambda: layers_sheet(plain, shown[:3])),
        )
        return [section("Where it looks", text, drawn)]

    def alike() -> list[Section]:
        text = (
            "Patches of one colour are alike to the backbone: the three main components of their features are red, "
            "green and blue, the same for all images. Below, how alike each patch is to the one in the ring."
        )
        drawn = tried(
            ("Patch features as colours", lambda: colours_sheet(plain, shown)),
            ("Likeness to the patch in the ring", lambda: likeness_sheet(plain, shown)),
        )
        return [section("What it sees alike", text, drawn)]

    def images_alike() -> list[Section]:
        drawn: list[Part | str]
        try:
            drawn = tried(*of_summaries(subject, source, len(shown), device))
        except UserError as error:  # of a segmenter
            drawn = [f"None: {error}."]
        text = "Images whose summaries are most alike, by cosine; and all in the plane of their two main components."
        return [section("Which images it takes for alike", text, drawn)]

    def speaks() -> list[Section]:
        if not subject.classes and getattr(plain, "num_classes", 0) == 0:
            return []
        drawn = tried(("Grad-CAM of the likeliest class", lambda: grad_cam_sheet(plain, shown, subject.classes)))
        return [section("What speaks for its answer", "Yellow speaks for the class below the picture.", drawn)]

    def rebuilds() -> list[Section]:
        if not isinstance(subject.method, Mae):
            return []
        text = "What the decoder makes of hidden patches. Their brightness and contrast are the original's."
        return [section("What it rebuilds", text, tried(*rebuilt(subject, shown)))]

    def modules() -> list[Section]:
        if not Attachment(plain).places:
            return []
        found = gates.gates(plain, shown[0].x)
        text = "How far each module has opened, how much it changes its map, and how it weighs channels and places."
        return [Section("What its attention modules do", text, [Listing(gates.table(found))])]

    def run() -> list[Section]:
        return sections.of_run(subject.run, subject.recipe) if subject.run is not None else []

    def costs() -> list[Section]:
        return [sections.of_backbone(plain)]

    return [looks, alike, images_alike, speaks, rebuilds, modules, run, costs]


# ------------------------------------------------------------------------------------------------------------- pictures

Draw = tuple[str, Callable[[], Image.Image]]


def tried(*wanted: Draw) -> list[Part | str]:
    """The pictures, or why there is none, in the order in which they are wanted."""
    made: list[Part | str] = []
    for caption, draw in wanted:
        try:
            made.append(Picture(image=draw(), caption=caption, alt=caption))
        except UserError as error:
            made.append(f"{caption}: {error}.")
    return made


def section(title: str, text: str, drawn: Sequence[Part | str]) -> Section:
    missing = [one for one in drawn if isinstance(one, str)]
    return Section(title, " ".join([text, *missing]), [one for one in drawn if not isinstance(one, str)])


def of_summaries(subject: Subject, source: Source, count: int, device: torch.device) -> list[Draw]:
    numbers = evenly(len(source), COMPARED)
    features: list[Tensor] = []
    kept: list[int] = []
    pictures: dict[int, Image.Image] = {}
    for some in batches(numbers):
        found = squares(source, some, data=subject.data, pixels=subject.pixels, device=device)
        by_name = {one.name: one for one in found}
        here = [number for number in some if source.key(number) in by_name]
        pictures |= {len(kept) + i: by_name[source.key(number)].picture for i, number in enumerate(here)}
        kept += here
        if found:
            features.append(subject.summaries(torch.cat([by_name[source.key(n)].x for n in here])).cpu())
    features_ND = torch.cat(features)
    queries = evenly(len(kept), count)
    labels = None if source.labels is None else [int(source.labels[number]) for number in kept]
    names = [source.key(number) for number in kept]
    k = min(NEIGHBOURS, len(kept) - 1)
    return [
        (
            "Each image and its nearest among the others",
            lambda: neighbours_sheet(features_ND, pictures.__getitem__, names, queries, k),
        ),
        (
            "All of them, by their classes" if labels else "All of them",
            lambda: plane(features_ND, labels, source.classes or []),
        ),
    ]


def plane(features_ND: Tensor, labels: list[int] | None, classes: Sequence[str]) -> Image.Image:
    return plane_picture(in_the_plane(features_ND), labels, classes)


def rebuilt(subject: Subject, shown: Sequence[Shown]) -> Iterator[Draw]:
    mean, std = subject.data.normalisation
    method: Any = subject.method
    for ratio in RATIOS:

        def draw(ratio: float | None = ratio) -> Image.Image:
            rows = []
            for seed, one in enumerate(shown):  # one by one: they are of several sizes
                image = unnormalised(one.x, mean, std).clamp(0, 1)
                rows += reconstruct(method, image, mean=mean, std=std, ratio=ratio, seed=seed).rows()
            return sheet(rows, side=REBUILT_SIDE, head=HEAD)

        yield ("As it was trained" if ratio is None else f"With {ratio:.0%} of the patches hidden", draw)


def batches(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(numbers), AT_ONCE):
        yield numbers[first : first + AT_ONCE]
