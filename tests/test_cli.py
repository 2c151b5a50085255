import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ssl_global import cli
from ssl_global.encoders.vit import Vit, VitConfig
from ssl_global.export import export
from ssl_global.methods.dino import DinoConfig
from ssl_global.recipe import Checkpoint, Crops, Data, Eval, Optim, Recipe, Train, Views
from ssl_global.training import checkpoint

ENCODER = VitConfig(patch=8, width=48, depth=2, heads=3)
RECIPE = Recipe(
    data=Data(),
    views=Views(globals=Crops(count=2, pixels=32)),
    encoder=ENCODER,
    method=DinoConfig(prototypes=8, head_hidden=16, head_bottleneck=8),
    optim=Optim(lr_per_256_images=1e-3, warmup_epochs=0, weight_decay=(0.05, 0.05)),
    train=Train(steps=10, global_batch=8),
    eval=Eval(every=10),
    checkpoint=Checkpoint(every=10),
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    encoder = Vit(ENCODER, pixels=32, channels=3)
    return str(export(encoder, tmp_path_factory.mktemp("run") / "export", recipe=RECIPE, summary={}, what="encoder"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """train and val of two classes that anyone can tell apart: dark and bright noise."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 6)):
        for label, low in (("dark", 0), ("bright", 155)):
            (folder / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(low, low + 100, (40, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{number}.png")
    return folder


def run(*arguments):
    cli.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """The line on stderr of a command that ends with code 2."""
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("judge", ["knn", "linear"])
def test_evaluate_an_export(judge, backbone, pictures, tmp_path, capsys):
    figures_file = tmp_path / "figures.json"
    run(
        *("evaluate", judge, backbone, "--train", pictures / "train", "--val", pictures / "val"),
        *("--confusion", "--json", figures_file, "--device", "cpu", "--workers", "0"),
    )
    figures = json.loads(figures_file.read_text())
    assert figures[judge] == 1.0
    assert figures["confusion"] == [[6, 0], [0, 6]]
    assert figures["classes"] == ["bright", "dark"]
    assert figures["width"] == 48
    said = capsys.readouterr().out
    assert "24 training images, judged on 12 of val" in said
    assert "dark" in said
    assert ("knn_pixels" if judge == "knn" else "best_lr") in said


def test_without_training_images_half_of_val_is_learnt_from(backbone, pictures, capsys):
    run("evaluate", "knn", backbone, "--val", pictures / "val", "--device", "cpu", "--workers", "0")
    assert "no training labels: 6 images of val" in capsys.readouterr().out


def test_evaluate_an_untrained_timm_model(pictures, tmp_path):
    figures = []
    for number in range(2):
        file = tmp_path / f"{number}.json"
        data = ("--train", pictures / "train", "--val", pictures / "val")
        run("evaluate", "knn", "test_vit", *data, "--json", file, "--device", "cpu", "--workers", "0")
        figures.append(json.loads(file.read_text()))
    assert figures[0] == figures[1]
    assert figures[0]["pixels"] == 160
    assert "confusion" not in figures[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate", "knn", "vit_smal_patch16_224"), "nearest are vit_small_patch16_224"),
        (("evaluate", "knn", "test_vit.no_such_tag"), "test_vit.no_such_tag: cannot be loaded"),
        (("evaluate", "knn", "test_vit", "--train", "somewhere"), "--train needs --val"),
        (("evaluate", "knn", "test_vit", "--what", "teacher"), "is no run folder"),
        (("evaluate", "knn", "test_vit", "--device", "abacus"), "--device abacus"),
        (("pack", "no/such/folder", "shards"), "no/such/folder"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, words, capsys):
    line = refused(capsys, *arguments)
    assert words in line
    assert line.startswith("ssl-global: ")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "pack"),
        (("evalute", "knn", "test_vit"), "evaluate"),
        (("evaluate", "guess", "test_vit"), "guess"),
        (("evaluate", "knn", "test_vit", "--batch", "many"), "many"),
        (("evaluate", "knn", "test_vit", "--trian", "x"), "--train"),
    ],
)
def test_what_cannot_be_parsed_ends_with_code_2(arguments, words, capsys):
    assert words in refused(capsys, *arguments)


@pytest.fixture
def dino_run(tmp_path):
    """A run with one checkpoint, whose teacher and student differ."""
    method = RECIPE.method.build(RECIPE)
    with torch.no_grad():
        for parameter in method.backbones()["student"].parameters():
            parameter += 0.1
    optimizer = torch.optim.AdamW(method.parameters())
    layout = checkpoint.Layout(processes=1, engine="one process", micro_batch=8, accumulate=1, workers=0)
    writer = checkpoint.Writer(tmp_path / "run", RECIPE, layout)
    writer.save(method, optimizer, checkpoint.RunState(step=1), wait=True)
    return tmp_path / "run", method.backbones()


def test_export_a_run(dino_run, capsys):
    folder, backbones = dino_run
    (folder / "summary.json").write_text(json.dumps({"knn": 0.75}))
    run("export", folder)
    run("export", folder, "--what", "student")
    said = capsys.readouterr().out
    assert "the teacher, proven" in said
    assert "the student, proven" in said
    assert "| knn | 0.75 |" in (folder / "export" / "README.md").read_text()
    for name, exported in (("teacher", "export"), ("student", "export-student")):
        tensors = load_file(folder / exported / "model.safetensors")
        assert torch.equal(tensors["norm.bias"], backbones[name].model.norm.bias)


def test_merge_a_run(dino_run, tmp_path, capsys):
    folder, backbones = dino_run
    run("merge", folder, "--out", tmp_path / "new" / "whole.safetensors")
    assert "tensors of" in capsys.readouterr().out
    merged = load_file(tmp_path / "new" / "whole.safetensors")
    assert merged["centre.value"].shape == (8,)
    for name, encoder in backbones.items():
        own = encoder.state_dict()
        assert [key for key in own if not torch.equal(own[key], merged[f"{name}.encoder.{key}"])] == []
    run("merge", folder, "--out", tmp_path / "more.safetensors", "--optimizer")
    assert merged.keys() <= load_file(tmp_path / "more.safetensors").keys()
    assert "a .safetensors file would be right" in refused(capsys, "merge", folder, "--out", tmp_path / "x.pth")
    assert "no checkpoint there" in refused(capsys, "merge", tmp_path, "--out", tmp_path / "x.safetensors")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["whole.safetensors"]


MERGE = """
import sys, threading
from pathlib import Path
from ssl_global.training.sharded import Sharded, merge
def own_memory():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
before, most, over = own_memory(), 0, threading.Event()
def watch():
    global most
    while not over.wait(0.001):
        most = max(most, own_memory())
threading.Thread(target=watch, daemon=True).start()
with Sharded(Path(sys.argv[1])) as kept:
    count = len(list(merge(kept, kept.names(), Path(sys.argv[2]))))
over.set()
print(count, most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_merging_holds_one_tensor_at_a_time(tmp_path):
    """Eight tensors of 32 MB, each cut in two; the process takes twice one of them and a little at most."""
    rows, columns, count = 4096, 2048, 8
    for part in range(2):
        tensors = {f"method/t{n}": torch.full((rows // 2, columns), float(10 * n + part)) for n in range(count)}
        places = {name: {"saved_offsets": [part * rows // 2, 0]} for name in tensors}
        save_file(tensors, tmp_path / f"shard-{part}.safetensors", metadata={"DCP_SHARDING_INFO": json.dumps(places)})
    del tensors
    done = warm.completed("-c", MERGE, tmp_path, tmp_path / "one.safetensors")
    assert done.returncode == 0, done.stderr[-1000:]
    merged_tensors, most_bytes = map(int, done.stdout.split())
    assert merged_tensors == count
    assert 2**24 < most_bytes < 2 * 2**25 + 2**24
    with safe_open(tmp_path / "one.safetensors", "pt") as merged:
        for n in range(count):
            whole = merged.get_slice(f"t{n}")
            assert whole.get_shape() == [rows, columns]
            assert whole[0, :2].tolist() == [10 * n] * 2
            assert whole[rows - 1, :2].tolist() == [10 * n + 1] * 2


def test_list_runs(dino_run, tmp_path, capsys):
    folder, _ = dino_run
    (folder / "run.json").write_text("{}")
    lines = [json.dumps({"step": n, "knn": n / 10}) for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "kn']))  # cut short by a kill
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("{}")
    run("runs", tmp_path)
    table = capsys.readouterr().out
    assert re.search(r"other +- +- +- +- +no checkpoint yet", table)
    assert re.search(r"run +dino on vit_\S+ +1 +0.200 +step-00000001 +yes", table)
    (shard,) = folder.glob("checkpoints/*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-4])
    run("runs", folder)
    assert re.search(rf"NO: {shard.name} is damaged", capsys.readouterr().out)
    assert "no run there" in refused(capsys, "runs", tmp_path / "nowhere")


def test_evaluate_a_run(dino_run, pictures, capsys):
    folder, _ = dino_run
    where = ("--val", pictures / "val", "--device", "cpu", "--workers", "0")
    run("evaluate", "knn", folder, *where)
    run("evaluate", "knn", folder, "--what", "student", *where)
    said = capsys.readouterr().out
    assert "run (teacher)" in said
    assert "run (student)" in said
    assert "teacher and student" in refused(capsys, "evaluate", "knn", folder, "--what", "tutor", *where)


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert "no checkpoint" in refused(capsys, "export", tmp_path)
    assert "no checkpoint" in refused(capsys, "evaluate", "knn", tmp_path, "--device", "cpu")


def test_pack_then_evaluate_shards(backbone, pictures, tmp_path, capsys):
    run("pack", pictures / "val", tmp_path / "shards", "--shard-mb", "1")
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    assert shards
    said = capsys.readouterr().out
    assert "1 of 1 shards written now" in said
    assert "12 images in 1 shard" in said
    assert "2 classes of 6 to 6 images" in said
    run("evaluate", "knn", backbone, "--val", tmp_path / "shards" / "*.tar", "--device", "cpu", "--workers", "0")
    assert "no training labels: 6 images of val" in capsys.readouterr().out


def test_judging_and_exporting_import_nothing_that_trains():
    program = "import sys, ssl_global.cli, ssl_global.evaluation.backbone, ssl_global.export;"
    program += "print([m for m in sys.modules if m == 'accelerate' or m.startswith('ssl_global.training')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_by_default_there_is_a_device_that_works():
    assert torch.ones(2, device=cli.device_named(None)).sum().item() == 2


def test_cost_says_what_attention_would_add(tmp_path, capsys):
    out = tmp_path / "cost.json"
    wanted = ["layer4=criss_cross(recurrence=3)", "se"]
    cli.main(["cost", "test_resnet", "--attention", *wanted, "--pixels", "96", "--batch", "4", "--json", str(out)])
    shown = capsys.readouterr().out
    assert "+ criss_cross at layer4" in shown
    assert "images 4 x 3 x 96 x 96; memory estimated by a dry run" in shown
    rows = json.loads(out.read_text())["costs"]
    assert [row["what"] for row in rows] == [
        "backbone",
        "+ se at layer3",
        "+ criss_cross at layer4",
        "with all of them",
    ]


def test_cost_of_a_backbone_alone_and_an_export(backbone, capsys):
    cli.main(["cost", backbone])
    assert "images 1 x 3 x 32 x 32" in capsys.readouterr().out


def test_cost_recommends(tmp_path, capsys):
    out = tmp_path / "cost.json"
    cli.main(["cost", "test_resnet", "--task", "segment", "--memory-gb", "12", "--json", str(out)])
    shown = capsys.readouterr().out
    assert shown.startswith(
        "strategy  full_global_attention\nbecause   with 12 GB the rule by memory alone says window"
    )
    assert json.loads(out.read_text())["chosen"]["strategy"] == "full_global_attention"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet5"], "ssl-global: resnet5: no model of timm; the nearest are resnet"),
        (["test_resnet", "--attention", "layer7=se"], "ssl-global: layer7: not in this ResNet; its stages are"),
        (["test_resnet", "--attention", "se(3)"], "ssl-global: attention 'se(3)': MODULE, PLACE=MODULE or"),
        (["test_resnet", "--attention", "se", "gca"], "ssl-global: gca: se has layer3 already"),
        (["test_resnet", "--task", "dense"], "ssl-global: --task and --memory-gb go together"),
        (["test_resnet", "--task", "dense", "--memory-gb", "9", "--attention", "se"], "one of them"),
        (["test_vit", "--pixels", "100"], "ssl-global: VisionTransformer: takes no images of (3, 100, 100)"),
    ],
)
def test_what_has_no_cost(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["cost", *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
