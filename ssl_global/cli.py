"""The command `ssl-global`: all that is done beside training.

ssl-global pack IMAGES SHARDS           images into webdataset .tar shards, checked, smaller if you like
ssl-global doctor DATA                  what is bad in the data, and how fast it can be served
ssl-global runs DIR                     the runs in a folder: how far, how good, and whether their checkpoints are whole
ssl-global export RUN                   a run's backbone into a folder that timm loads; an export as .onnx or .pt2
ssl-global convert FILE --out DIR       a published checkpoint (MAE, DINO, DINOv2, Swin, ...) as such a folder
ssl-global merge RUN --out FILE         a run's checkpoint, however sharded, as one safetensors file
ssl-global evaluate knn BACKBONE        judge an export, a run, or any model of timm
ssl-global evaluate linear BACKBONE
ssl-global predict MODEL IMAGES --out DIR   what a fine-tuned model says of many images
ssl-global explain BACKBONE IMAGES --out DIR   one page of pictures, curves and figures
ssl-global film BACKBONE VIDEO OUT.mp4       what it sees in each frame
ssl-global cost BACKBONE                what a backbone costs, what attention would add, which would fit
ssl-global plan --recipe R --images N   what a run needs: memory, batch, time, and what few images ask for
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional, arg

from ssl_global.attention.attach import attach, placed
from ssl_global.attention.cost import Precision, named
from ssl_global.attention.cost import cost as cost_of
from ssl_global.attention.places import input_size_of
from ssl_global.attention.recommend import recommend
from ssl_global.command_line import find, show_any_name
from ssl_global.data.doctor import advice, diagnose
from ssl_global.data.files import read_json
from ssl_global.data.pack import pack as pack_shards
from ssl_global.data.progress import report as report_progress
from ssl_global.data.sample import built_in_sample
from ssl_global.data.source import open_source
from ssl_global.data.summary import describe as describe_packed
from ssl_global.errors import UserError
from ssl_global.evaluation import features as f
from ssl_global.evaluation.backbone import Backbone, load_backbone, of_encoder, timm_model
from ssl_global.evaluation.knn import knn, knn_confusion
from ssl_global.evaluation.linear import linear
from ssl_global.export import export as export_encoder
from ssl_global.export import is_export
from ssl_global.recipe import Data, as_json

if TYPE_CHECKING:
    from ssl_global.explain.subject import Subject

app = tyro.extras.SubcommandApp()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. What the user got wrong is one line on stderr and exit code 2."""
    show_any_name()
    try:
        app.cli(
            prog="ssl-global",
            description="What is done beside training.",
            args=arguments,
            config=(FlagCreatePairsOff,),
        )
    except UserError as error:
        print(f"ssl-global: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ssl-global: stopped", file=sys.stderr)
        sys.exit(130)


@app.command
def pack(
    images: Annotated[Positional[str], arg(metavar="IMAGES")],
    shards: Annotated[Positional[Path], arg(metavar="SHARDS")],
    *,
    shard_mb: int = 256,
    resize: int | None = None,
    quality: int | None = None,
    processes: int | None = None,
) -> None:
    """Write images as webdataset .tar shards; started again, it goes on where it stopped.

    Every image is decoded once: broken ones are named and left out, and those that are there twice are named. What was
    packed is summed up in SHARDS/NAME-summary.json, with the mean and deviation for recipes that say `auto`.

    Args:
        images: A folder, whose folders are the classes, if all images are in one of several; or shards, or a dataset.
        shards: Folder to write to.
        shard_mb: Size of a shard, about, in millions of bytes.
        resize: Shrink images to this shorter side, in pixels, as JPEG; smaller ones stay as they are.
        quality: Of those JPEG, 1 to 100; without --resize, every image becomes a JPEG of its own size.
        processes: That read, decode and write at once; by default one for each core, 16 at most.
    """
    if shard_mb < 1:
        raise UserError(f"--shard-mb {shard_mb}: at least 1")
    packed = pack_shards(
        open_source(images), shards, shard_bytes=shard_mb * 1_000_000, resize=resize, quality=quality,
        processes=processes,
    )  # fmt: skip
    print(f"{shards}: {packed.written} of {len(packed.shards)} shards written now")
    print(describe_packed(packed.summary))


@app.command
def doctor(
    data: Annotated[Positional[str], arg(metavar="DATA")],
    *,
    recipe: str = "dino",
    workers: int | None = None,
    gpu_images_per_second: float = 500,
    json_file: Annotated[Path | None, arg(name="json")] = None,
) -> None:
    """Read all data once, name what is bad, and time how fast it can be served. Ends with 1 if something is bad.

    Args:
        data: A folder of images, shards, or a dataset, as for pretrain.py.
        recipe: Whose views are timed, by name or path, with or without :FUNCTION; a .py file is a program: it is run.
        workers: Decoding threads to time, besides one; by default one for each core.
        gpu_images_per_second: What one GPU is taken to need, for the count of workers.
        json_file: Also write all that was found to this file.
    """
    _, _, build = find(recipe)
    made = build()
    found = diagnose(data, replace(made, data=replace(made.data, workers=workers)))
    print(f"{data}: {found.described}")
    for word, findings in (("damaged shard", found.damaged_shards), ("bad image", found.bad_images)):
        for finding in findings:
            print(f"{word}: {finding.place}: {finding.reason}")
    num_bad = len(found.bad_images)
    print(f"read     {found.num_images} images, {num_bad} of them bad ({num_bad / max(found.num_images, 1):.3%})")
    for line in advice(found, gpu_images_per_second):
        print(line)
    if json_file:
        json_file.write_text(json.dumps(asdict(found), indent=2) + "\n")
    if found.damaged_shards or found.bad_images:
        sys.exit(1)


@app.command
def export(
    run: Annotated[Positional[Path], arg(metavar="EXPORT_OR_RUN")],
    *,
    format: Literal["folder", "onnx", "pt2"] = "folder",
    what: str | None = None,
    out: Path | None = None,
    sizes: Literal["any", "one"] | None = None,
) -> None:
    """Write a run's backbone as a folder that timm and the Hugging Face hub load, and prove that they do.

    Or write a model as one file that needs neither timm nor this project: ONNX (pip install 'ssl_global[onnx]') or
    torch.export's .pt2, compared with the model before it gets its name.

    Args:
        run: A run's --out folder; for onnx and pt2 an export's folder too, of a backbone, a classifier or a segmenter.
        format: folder, onnx or pt2.
        what: Of a run: student, teacher or encoder; by default the method's own choice.
        out: Folder to write to, by default RUN/export, or RUN/export-WHAT for a given --what; or the file, by default
            model.onnx or model.pt2 in the export.
        sizes: Of images that an .onnx or .pt2 takes: any or one; by default any where the model allows.
    """
    if format == "folder":
        if sizes is not None:
            raise UserError(f"--sizes {sizes}: of an .onnx or .pt2; give --format too")
        if is_export(run):
            raise UserError(f"{run}: an export already; --format onnx or pt2 makes a file of it")
        export_run(run, what, out)
        return
    # Imported here: the other commands need nothing of torch.export.
    from ssl_global.portable import write

    if out is not None and out.suffix != f".{format}":
        raise UserError(f"--out {out}: the name of a .{format} file would be right")
    if is_export(run) and what is not None:
        raise UserError(f"--what {what} chooses one of a run's encoders, and {run} is an export")
    folder = run if is_export(run) else export_run(run, what, None)
    print(write(folder, out or folder / f"model.{format}", form=format, sizes=sizes))


def export_run(run: Path, what: str | None, out: Path | None) -> Path:
    from ssl_global.training.checkpoint import load_encoder

    recipe, chosen, encoder = load_encoder(run, what)
    summary = read_json(run / "summary.json")
    folder = out or run / ("export" if what is None else f"export-{what}")
    export_encoder(encoder, folder, recipe=recipe, summary=summary if isinstance(summary, dict) else {}, what=chosen)
    num_tensors = len(encoder.model.state_dict())
    print(f"{folder}: the {chosen}, proven: {num_tensors} of {num_tensors} tensors, the same features bit for bit")
    print(f'load it: timm.create_model("local-dir:{folder}", pretrained=True)')
    return folder


@app.command
def convert(
    file: Annotated[Positional[Path], arg(metavar="FILE")],
    *,
    out: Path,
    what: str | None = None,
    name: str | None = None,
    heads: int | None = None,
    pixels: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    allow_unknown: bool = False,
) -> None:
    """Make an export of a published checkpoint: of MAE, DINO, DINOv2, DINOv3, iBOT, EsViT, SimMIM, Swin, BEiT or timm.

    What it is is known by its keys, and each key is accounted for: taken, left out by a rule (heads, decoders), or
    unknown, which ends it. The account is in OUT/conversion.json. Pickles that need code are not read.

    Args:
        file: A .pth, .pt, .bin or .safetensors.
        out: Folder to write the export to.
        what: The entry to take, of a file with several: teacher (the usual one), student, model.
        name: timm's architecture, where the layout is timm's own and no ViT or Swin.
        heads: Of attention, where no shape says it; by default 64 wide ones, or as published for that width.
        pixels: Side of the images that it was trained on, where no shape says it.
        mean: Of each channel, in 0..1, that its images were normalised with; by default the layout's own.
        std: The same for the deviation.
        allow_unknown: Leave out keys that are in no rule.
    """
    from ssl_global.converting.convert import convert as convert_file
    from ssl_global.converting.shapes import Asked

    if (mean is None) != (std is None):
        raise UserError("--mean and --std go together")
    if pixels is not None and pixels < 1:
        raise UserError(f"--pixels {pixels}: at least 1")
    converted = convert_file(
        file, out, what=what, name=name, asked=Asked(heads=heads, pixels=pixels),
        normalisation=None if mean is None or std is None else (mean, std), allow_unknown=allow_unknown,
    )  # fmt: skip
    print("\n".join(converted.lines(file)))
    print(f'load it: timm.create_model("local-dir:{out}", pretrained=True)')


@app.command
def merge(run: Annotated[Positional[Path], arg(metavar="RUN")], *, out: Path, optimizer: bool = False) -> None:
    """Make one safetensors file of a run's newest checkpoint, on the CPU, whatever processes wrote it.

    It holds all that the method has: student, teacher, heads, centre, by the names of its state_dict(). One tensor at a
    time is in memory.

    Args:
        run: A run's --out folder.
        out: File to write, a .safetensors.
        optimizer: The optimizer's averages too, as NAME/exp_avg and the like.
    """
    from ssl_global.training.checkpoint import newest_of
    from ssl_global.training.sharded import METHOD, OPTIMIZER, Sharded
    from ssl_global.training.sharded import merge as merge_tensors

    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the name of a .safetensors file would be right")
    folder, record = newest_of(run)
    with Sharded(folder) as kept:
        names = kept.names(METHOD) + (kept.names(OPTIMIZER) if optimizer else [])
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with report_progress("merged", len(names), what="tensors", visible=True) as done:
                for count, _ in enumerate(merge_tensors(kept, names, out), 1):
                    done(count)
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror or error}") from error
    shards = len(record["files"])
    size = out.stat().st_size / 1e6
    print(f"{out}: {len(names)} tensors of {folder}, from {shards} shards, {size:.1f} MB")


@app.command
def predict(
    model: Annotated[Positional[Path], arg(metavar="MODEL")],
    images: Annotated[Positional[str], arg(metavar="IMAGES")],
    *,
    out: Path,
    batch: int = 64,
    tta: bool = False,
    device: str | None = None,
) -> None:
    """Say the class of many images, or of each of their pixels; started again, it goes on where it stopped.

    Args:
        model: An export folder of finetune.py.
        images: A folder of images, shards, or a dataset, as for pretrain.py.
        out: Folder for predictions.csv, or for masks/ and overlays/.
        batch: Images at once.
        tta: Look at each image mirrored too, and at pixels at three scales: the mean of the probabilities.
        device: As torch names it; by default the accelerator that there is, else the CPU.
    """
    # Imported here: the other commands need nothing of what fine-tunes.
    from ssl_global.predict import open_model
    from ssl_global.predict import predict as predict_all

    if batch < 1:
        raise UserError(f"--batch {batch}: at least 1")
    on = device_named(device)
    done = predict_all(open_model(model, on, tta=tta), open_source(images), out, batch=batch, device=on)
    print(f"{out}: {done.written} written now, {done.there} were there")
    for key, reason in done.bad:
        print(f"cannot be read: {key}: {reason}")


@app.command
def explain(
    backbone: Annotated[Positional[str], arg(metavar="BACKBONE")],
    images: Annotated[Positional[str | None], arg(metavar="IMAGES")] = None,
    *,
    out: Path,
    show: int = 6,
    pixels: int | None = None,
    what: str | None = None,
    device: str | None = None,
) -> None:
    """One page about a backbone: what it looks at, what it takes for alike, what it rebuilds, how it learnt, its cost.

    Args:
        backbone: An export folder, a run folder, or a timm name: with its .tag pretrained, without one untrained.
        images: A folder of images, shards, or a dataset, as for pretrain.py; without it, the built-in sample.
        out: Folder for index.html, which needs nothing else.
        show: Images to show, evenly spread over those given.
        pixels: Of their shorter side; by default what the backbone is made for. More pixels make finer maps.
        what: Which of a run's encoders: student, teacher or encoder.
        device: As torch names it; by default the accelerator that there is, else the CPU.
    """
    # Imported here: it brings what draws.
    from ssl_global.explain.report import report
    from ssl_global.explain.subject import subject

    for name, value in (("show", show), ("pixels", pixels)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: at least 1")
    on = device_named(device)
    chosen = subject(backbone, what, run_subject=partial(explained_run, device=on), device=on)
    source = open_source(built_in_sample()[1] if images is None else images)
    print(f"open it: {report(chosen, source, out, images=show, pixels=pixels)}")


@app.command
def film(
    backbone: Annotated[Positional[str], arg(metavar="BACKBONE")],
    frames: Annotated[Positional[Path], arg(metavar="FRAMES")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    *,
    show: Literal["attention", "colours"] = "colours",
    pixels: int | None = None,
    rate: float | None = None,
    what: str | None = None,
    device: str | None = None,
) -> None:
    """What a backbone sees in a video, frame by frame, beside it.

    Args:
        backbone: As for `explain`.
        frames: A video, a .gif, or a folder of images.
        out: An .mp4 or a .gif.
        show: What the last layer looks at, or the main components of the features as colours.
        pixels: Of the frames' shorter side, for the backbone; by default what it is made for. More make finer maps.
        rate: Frames a second; by default those of the video.
        what: Which of a run's encoders: student, teacher or encoder.
        device: As torch names it; by default the accelerator that there is, else the CPU.
    """
    # Imported here: it brings what draws.
    from ssl_global.explain import video
    from ssl_global.explain.subject import subject

    if pixels is not None and pixels < 1:
        raise UserError(f"--pixels {pixels}: at least 1")
    on = device_named(device)
    chosen = subject(backbone, what, run_subject=partial(explained_run, device=on), device=on)
    opened = video.open_frames(frames)
    mean, std = chosen.data.normalisation
    over_time = {"attention": video.attention_over_time, "colours": video.pca_over_time}[show]
    picture = over_time(
        chosen.model, opened, shorter=pixels or chosen.pixels, multiple=chosen.multiple, mean=mean, std=std
    )
    print(f"{out}: {video.write(picture, opened, out, rate=rate)} frames")


@app.command
def cost(
    backbone: Annotated[Positional[str], arg(metavar="BACKBONE")],
    *,
    attention: tuple[str, ...] = (),
    task: Literal["small_objects", "segment", "classify", "dense"] | None = None,
    memory_gb: float | None = None,
    pixels: int | None = None,
    batch: int = 1,
    precision: Precision = "fp32",
    json_file: Annotated[Path | None, arg(name="json")] = None,
) -> None:
    """What a backbone costs to train: parameters, arithmetic, memory; and what attention modules would add.

    Args:
        backbone: A timm name, or an export folder.
        attention: Modules to put in: non_local, layer3=non_local, or 'layer3=criss_cross(recurrence=3)'; without a
            place, after the last stage but one.
        task: Have modules recommended for this; needs --memory-gb.
        memory_gb: Of the GPU.
        pixels: Side of the images; by default what the backbone is made for.
        batch: Images at once.
        precision: Of the forward pass.
        json_file: Also write the figures to this file.
    """
    if (task is None) != (memory_gb is None):
        raise UserError("--task and --memory-gb go together: a recommendation is for both")
    if task is not None and attention:
        raise UserError("--attention chooses the modules, --task has them chosen: one of them")
    try:
        model = costed_model(backbone)
        channels, *_ = input_size_of(model)
        size = (channels, pixels, pixels) if pixels else None
        found: dict[str, Any]
        if task is not None and memory_gb is not None:
            recommended = recommend(task, memory_gb, size, batch, model, precision=precision)
            shown, found = str(recommended), recommended.as_dict()
        elif attention:
            report = attach(model, placed(model, attention)).report(size, batch, precision=precision)
            shown, found = str(report), {"costs": report.rows(), "memory": report.after.source}
        else:
            alone = cost_of(model, size, batch, precision=precision)
            shown, found = str(alone), alone.as_dict()
    except ValueError as error:
        raise UserError(str(error)) from error
    print(shown)
    if json_file:
        json_file.write_text(json.dumps({"backbone": backbone, **found}, indent=2) + "\n")


def costed_model(name: str) -> torch.nn.Module:
    return timm_model(f"local-dir:{name}", pretrained=False) if Path(name).is_dir() else named(name)


@app.command
def plan(
    *,
    recipe: str,
    images: int,
    gpus: int = 1,
    vram: float = 24.0,
    gpu: Literal["v100", "t4", "a100", "rtx3090", "l4", "rtx4090", "h100"] = "a100",
    tflops: float | None = None,
    utilisation: float = 0.3,
    images_per_second: float | None = None,
    classes: int | None = None,
    as_it_is: bool = False,
    write: Path | None = None,
    overwrite: bool = False,
    json_file: Annotated[Path | None, arg(name="json")] = None,
) -> None:
    """What a run needs: memory of each GPU, batch, steps and time; and what few images ask for, with its sources.

    Nothing is computed: the recipe's step is run without content. Figures are of the recipe with the choices for so
    many images.

    Args:
        recipe: By name or path, with or without :FUNCTION; a .py file is a program: it is run.
        images: To learn from.
        gpus: On which it will run.
        vram: Memory of each, in GB.
        gpu: Whose peak the time is reckoned with.
        tflops: That peak, if it is another's.
        utilisation: Share of the peak that a step comes to; published ones came to 0.1 to 0.45.
        images_per_second: Measured, of all GPUs together: time by this, and nothing reckoned.
        classes: That a fine-tuned model will tell apart; by default as in the recipe's paper.
        as_it_is: The recipe itself, without choices for few images.
        write: Also write the plan as a recipe file, a .py that --recipe takes.
        overwrite: Even where that file is already.
        json_file: Also write the figures to this file.
    """
    # Imported here: it brings all that trains.
    from ssl_global.planning.planner import Machine
    from ssl_global.planning.planner import plan as plan_of
    from ssl_global.planning.show import tables
    from ssl_global.planning.written import write as write_recipe

    machine = Machine(
        gpus=gpus, vram_gb=vram, gpu=gpu, tflops=tflops, utilisation=utilisation, images_per_second=images_per_second
    )
    planned = plan_of(recipe, machine, images=images, classes=classes, as_it_is=as_it_is)
    out = console()
    for part in tables(planned):
        out.print(part, highlight=False)
    if write:
        write_recipe(planned, write, overwrite=overwrite)
        out.print(f"written: {write}", highlight=False)
    if json_file:
        json_file.write_text(json.dumps(planned.as_dict(), indent=2) + "\n")


@app.command
def runs(directory: Annotated[Positional[Path], arg(metavar="DIR")]) -> None:
    """List the runs in a folder: recipe, how far, last k-NN, last checkpoint, and whether it is whole.

    Args:
        directory: Runs are looked for in it and below it.
    """
    from ssl_global.training.runs import find_runs

    found = find_runs(directory)
    if not found:
        raise UserError(f"{directory}: no run there; a run's folder has a run.json")
    table = Table("run", "recipe", "step", "k-NN", "checkpoint", "whole", box=box.SIMPLE_HEAD)
    for line in found:
        table.add_row(line.name, line.recipe, line.step, line.knn, line.checkpoint, line.verdict)
    console().print(table)


@app.command
def evaluate(
    judge: Positional[Literal["knn", "linear"]],
    backbone: Annotated[Positional[str], arg(metavar="BACKBONE")],
    *,
    train: str | None = None,
    val: str | None = None,
    what: str | None = None,
    confusion: bool = False,
    json_file: Annotated[Path | None, arg(name="json")] = None,
    device: str | None = None,
    batch: int = 256,
    workers: int | None = None,
) -> None:
    """Judge a backbone by the k-NN or by a linear probe of its features.

    Args:
        judge: knn (20 neighbours, temperature 0.07, as DINO) or linear (the best of several learning rates, on val).
        backbone: An export folder, a run folder, or a timm name: with its .tag pretrained, without one untrained.
        train: Labelled images to learn from: a folder with class folders, or shards; else half of val is.
        val: Labelled images to judge on; without both, the built-in sample.
        what: Which of a run's encoders: student, teacher or encoder.
        confusion: Also show what each class is taken for.
        json_file: Also write the figures to this file, with the whole confusion matrix if --confusion.
        device: As torch names it; by default the accelerator that there is, else the CPU.
        batch: Images at once.
        workers: Decoding processes; by default as many as there are cores, 8 at most.
    """
    if train is not None and val is None:
        raise UserError("--train needs --val: the images to judge on")
    on = device_named(device)
    chosen = load_backbone(backbone, what, run_backbone=partial(run_backbone, device=on), device=on)
    data = Data(channels=chosen.channels, mean=chosen.mean, std=chosen.std, workers=workers)
    train_source, val_source = (open_source(path) if path else None for path in (train, val))
    if val_source is None:
        train_source, val_source = (open_source(path) for path in built_in_sample())
    extract = partial(f.extract, chosen.embed, data=data, pixels=chosen.pixels, batch=batch, device=on)
    split = f.split(extract, train_source, val_source)
    figures: dict[str, Any] = {"backbone": chosen.name, "pixels": chosen.pixels, "width": chosen.width}
    figures["images"] = split.said
    if judge == "knn":
        # With the default mean, whatever the backbone's own: the same images have the same baseline.
        pixels_of = partial(f.pixel_features, data=Data(workers=workers), batch=batch, device=on)
        of_pixels = f.split(pixels_of, train_source, val_source)
        figures |= {"knn": knn(split, device=on), "knn_pixels": knn(of_pixels, device=on)}
        matrix = knn_confusion(split, device=on) if confusion else None
    else:
        result = linear(split, device=on)
        figures |= {"linear": result.top1, "best_lr": result.best_lr, "table": result.table}
        matrix = result.confusion if confusion else None
    show(figures)
    if matrix is not None:
        show_confusion(matrix, split.classes)
        figures |= {"confusion": matrix.tolist(), "classes": split.classes}
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def explained_run(run: Path, what: str | None, *, device: torch.device) -> "Subject":
    from ssl_global.explain.subject import Subject
    from ssl_global.training.checkpoint import load_method

    recipe, method = load_method(run)
    encoders = method.to(device).backbones()
    if what is not None and what not in encoders:
        raise UserError(f"--what {what}: this run has {', '.join(encoders)}")
    encoder = encoders[what] if what else next(iter(encoders.values()))
    return Subject(
        name=str(run), model=encoder, data=recipe.data, pixels=encoder.pixels, classes=list(encoder.classes),
        method=method, run=run, recipe=as_json(recipe),
    )  # fmt: skip


def device_named(name: str | None) -> torch.device:
    """The one that is asked for, or the accelerator that there is, or the CPU."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error


def run_backbone(run: Path, what: str | None, *, device: torch.device) -> Backbone:
    # Imported here: judging an export or a timm model needs nothing of what trains.
    from ssl_global.training.checkpoint import load_encoder

    recipe, name, encoder = load_encoder(run, what)
    return of_encoder(f"{run} ({name})", encoder, recipe.data, device)


# ------------------------------------------------------------------------------------------------------------ showing


def console() -> Console:
    """As wide as it needs to be where it is no terminal: a pipe should not get broken lines.

    What it is given is shown as it is: a class or a folder may be called "[/red]".
    """
    return Console(markup=False) if sys.stdout.isatty() else Console(markup=False, width=1000)


def show(figures: dict[str, Any]) -> None:
    out = console()
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    for name, value in figures.items():
        if name != "table":
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    out.print(table)
    if "table" in figures:
        probes = Table("lr", "top1", box=box.SIMPLE_HEAD)
        for row in figures["table"]:
            probes.add_row(f"{row['lr']:g}", f"{row['top1']:.4f}")
        out.print(probes)


def show_confusion(matrix: torch.Tensor, classes: list[str] | None) -> None:
    """A line for each class: how many, how many right, and what it is most often taken for."""
    names = classes or list(map(str, range(len(matrix))))
    table = Table("class", "images", "right", "most often taken for", box=box.SIMPLE_HEAD)
    for own, counts in enumerate(matrix.tolist()):
        if sum(counts) == 0:
            continue
        wrong = sorted(((count, names[i]) for i, count in enumerate(counts) if count and i != own), reverse=True)
        taken_for = ", ".join(f"{name} {count}" for count, name in wrong[:3])
        table.add_row(names[own], str(sum(counts)), f"{counts[own] / sum(counts):.3f}", taken_for)
    console().print(table)
