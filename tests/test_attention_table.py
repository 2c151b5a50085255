"""The article's table: parameters are counted from layers, intervals are scipy's, what is done is not done again."""

import copy
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from recipes_under_test import load_recipe
from rich.console import Console
from scipy import stats
from torch import nn

from benchmarks import attention_table
from benchmarks.attention_table import BASELINE, VARIANTS, Trained, difference, figures, parameters, tables
from ssl_global.attention import build
from ssl_global.attention.attach import Attachment, attach, placed
from ssl_global.command_line import recipe_files

MADE_UP = {
    BASELINE: (90.0, 91.0, 92.0),
    "SE": (92.0, 93.1, 93.9),
    "CBAM": (88.0, 88.9, 90.1),
    "Dual": (90.5, 90.5, 92.5),
}


def trained(accuracies, images_per_second=100.0):
    return [Trained(accuracy, images_per_second) for accuracy in accuracies]


# ---------------------------------------------------------------------------------------------------------- parameters


def conv(channels, out, kernel=1, *, bias=True):
    return nn.Conv2d(channels, out, kernel, bias=bias)


def layers_of_the_article(name, c):
    """Those that its code makes, for c channels."""
    narrow = [conv(c, c // 8), conv(c, c // 8), conv(c, c)]
    return {
        "Baseline": [],
        "SE": [nn.Linear(c, c // 16), nn.Linear(c // 16, c)],
        "CBAM": [conv(c, c // 16, bias=False), conv(c // 16, c, bias=False), conv(2, 1, 7, bias=False)],
        "Non-Local": [*(conv(c, c // 2) for _ in range(3)), conv(c // 2, c)],
        "Dual": [*narrow, nn.ParameterList(torch.zeros(1) for _ in range(2))],
        "Criss-Cross": [*narrow, nn.ParameterList([torch.zeros(1)])],
    }[name]


def count(modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_articles_parameters_are_those_of_its_layers(name):
    places = [c for c in (64, 128, 256, 512) for _ in range(2)] if name in ("SE", "CBAM") else [64, 128, 256]
    backbone = timm.create_model("resnet18_small", num_classes=10)
    added = sum(count(layers_of_the_article(name, c)) for c in places)
    assert VARIANTS[name].parameters_of_its_code == count([backbone]) + added


def test_the_articles_parameters_are_as_they_were_counted_before():
    """By running its own code, in millions."""
    known = {"Baseline": 11.174, "SE": 11.263, "CBAM": 11.262, "Non-Local": 11.347}
    assert {name: round(VARIANTS[name].parameters_of_its_code / 1e6, 3) for name in known} == known
    behind_the_third_stage = attention_table.BASELINE_PARAMETERS + VARIANTS["Criss-Cross"].added(256)
    assert round(behind_the_third_stage / 1e6, 3) == 11.256


@pytest.mark.parametrize("name", VARIANTS)
def test_ours_have_what_the_benchmark_says_besides(name):
    blocks, stages = 2 * (64 + 128 + 256 + 512), 64 + 128 + 256
    besides = {
        "CBAM": blocks + blocks // 16 + 8 * 2,  # biases, a norm of one channel
        "Non-Local": 3 * stages,  # norm and gamma
        "Dual": 2 * stages - 3 * 2,  # gammas for single numbers
        "Criss-Cross": stages - 3,
    }
    assert parameters(name) == VARIANTS[name].parameters_of_its_code + besides.get(name, 0)


# -------------------------------------------------------------------------------------------------------------- places


def test_se_stands_in_each_block_before_the_addition():
    """As in a network whose blocks have the module where timm calls their `se`."""
    torch.manual_seed(0)
    plain = timm.create_model("resnet18_small", num_classes=10, channels=(16, 16, 32, 32)).eval()
    timms = copy.deepcopy(plain)
    attached = attach(plain, placed(plain, [VARIANTS["SE"].attention]))
    assert len(attached.places) == 8
    for path, one in attached.places.items():
        module = build("se", one.attention.channels)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))
        one.attention.load_state_dict(module.state_dict())
        timms.get_submodule(path.removesuffix(".bn2")).se = module
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain(images), timms(images))


def test_a_place_that_matches_nothing_is_refused():
    model = timm.create_model("resnet18_small", channels=(8, 8, 8, 8))
    with pytest.raises(ValueError, match=r"layer9\*: matches nothing in this SmallResNet; its stages are .*layer4"):
        placed(model, ["layer9*=se"])
    with pytest.raises(ValueError, match="non_local has layer2 already"):
        placed(model, ["layer2=non_local", "layer[23]=se"])
    assert list(placed(model, ["layer[14]=se", "non_local"])) == ["layer1", "layer4", "layer3"]


def test_the_recipe_offers_the_tables_rows():
    text = recipe_files()["small_resnet"].read_text().splitlines()
    offered = [line.split()[1] for line in text if line.startswith("    --attention")]
    assert offered == [variant.attention for variant in VARIANTS.values() if variant.attention]


def test_of_a_seed_all_begin_with_the_same_backbone():
    begun = {}
    for name, variant in VARIANTS.items():
        recipe = load_recipe("small_resnet", "demo", attention=(variant.attention,) if variant.attention else ())
        torch.manual_seed(3)
        network = replace(recipe.method, classes=("a", "b")).build(recipe).model.model
        new = ("attached", "fc.")
        begun[name] = {k: v for k, v in network.state_dict().items() if not any(word in k for word in new)}
    for state in begun.values():
        assert state.keys() == begun[BASELINE].keys()
        assert all(torch.equal(state[key], begun[BASELINE][key]) for key in state)


def test_pyramid_pooling_comes_before_se():
    """Recipe 1's order on the last stage."""
    recipe = load_recipe("global_cnn", "demo")
    torch.manual_seed(0)
    network = replace(recipe.method, classes=("a", "b")).build(recipe).model.model.eval()
    places = {one.name: one.attention for one in Attachment(network).places.values()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    seen = {}
    for name, module in places.items():
        module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    network(torch.randn(2, 3, 32, 32))
    assert list(seen) == ["non_local", "ppm", "se"]
    assert torch.equal(seen["se"][0], seen["ppm"][1])
    assert not torch.equal(*seen["ppm"])


# ------------------------------------------------------------------------------------------------------------- figures


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), min_size=2, max_size=6))
def test_the_interval_is_the_paired_t_tests(pairs):
    of, to = (np.array(side) / 9 for side in zip(*pairs, strict=True))
    found = difference(of.tolist(), to.tolist())
    if np.ptp(of - to) < 1e-9:
        assert found.interval == pytest.approx((found.mean,) * 2)
        return
    meant = stats.ttest_rel(of, to).confidence_interval(0.95)
    assert found.interval == pytest.approx((meant.low, meant.high))
    assert found.mean == pytest.approx((of - to).mean())


def test_the_interval_of_three_by_the_printed_table():
    """Student's t with 2 degrees of freedom is 4.303 at 97.5 %."""
    found = difference([11.0, 12.0, 13.0], [10.0, 10.0, 10.0])
    assert found.interval == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)


def test_verdicts_say_what_is_not_shown():
    to = MADE_UP[BASELINE]
    said = {name: difference(list(own), list(to)).verdict for name, own in MADE_UP.items() if name != BASELINE}
    assert said == {"SE": "better", "CBAM": "worse", "Dual": "no difference shown"}
    assert difference([90.0], [80.0]).verdict == "one seed: not known"


def test_the_tables_show_made_up_results():
    results = {name: trained(own, 50.0 if name == "SE" else 100.0) for name, own in MADE_UP.items()}
    console = Console(width=120, file=io.StringIO(), record=True)
    for table in tables(results):
        console.print(table)
    lines = {line.split()[0]: line for line in console.export_text().splitlines() if line.split()}
    for words in ("92.0, 93.1, 93.9", "+2.0", "better", "93.56"):
        assert words in lines["SE"]
    assert "no difference shown" in lines["Dual"]
    row = figures("SE", results)
    assert row["times_as_long"] == 2.0
    assert row["article"]["difference"] == 1.22
    assert row["difference"]["verdict"] == "better"


def test_a_slow_minute_is_in_both_of_a_pair():
    slow = [Trained(0, speed) for speed in (10.0, 80.0, 120.0)]
    assert attention_table.times_as_long(slow, trained((0, 0, 0))) == pytest.approx(1.25)


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def here(monkeypatch):
    """Trainings in this process."""

    def work_here(work, *arguments):
        try:
            return work(*arguments)
        finally:
            AcceleratorState._reset_state(True)
            PartialState._reset_state()
            GradientState._reset_state()

    monkeypatch.setattr(attention_table, "alone", work_here)


def test_what_is_done_is_not_done_again(here, tmp_path, capsys):
    random = np.random.default_rng(0)
    for number in range(6):
        file = tmp_path / "images" / str(number % 2) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(file)
    images = str(tmp_path / "images")
    for turn in range(2):
        attention_table.run(
            seeds=1, data=images, val=images, variants=(BASELINE, "SE"), runs=tmp_path / "runs", small=True,
            out=tmp_path / f"{turn}.json",
        )  # fmt: skip
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()
    for name in ("baseline-0", "se-0"):
        said = (tmp_path / "runs" / f"{name}.txt").read_text()
        assert said.count("done: 2 steps") == 1
        assert said.count("is finished") == 1
    assert "attention ('layer*.bn2=se',)" in (tmp_path / "runs" / "se-0.txt").read_text()


def test_seeds_take_turns_and_begin_with_another_row(monkeypatch, tmp_path, capsys):
    asked = []

    def train(name, words, folder):
        asked.append((name, words, folder.name))
        return Trained(50.0 + len(asked), 100.0)

    monkeypatch.setattr(attention_table, "train", train)
    out = tmp_path / "out.json"
    attention_table.run(seeds=2, epochs=7.0, variants=(BASELINE, "SE", "CBAM"), runs=tmp_path, out=out)
    order = ["baseline-0", "se-0", "cbam-0", "se-1", "cbam-1", "baseline-1"]
    assert [folder for _, _, folder in asked] == order
    for name, words, folder in asked:
        assert {"--recipe=small_resnet:demo", "--train.epochs=7.0", f"--seed={folder[-1]}"} <= set(words)
        assert folder.startswith(name.lower())
    rows = json.loads(out.read_text())["rows"]
    assert {name: row["accuracies"] for name, row in rows.items()} == {
        BASELINE: [51.0, 56.0], "SE": [52.0, 54.0], "CBAM": [53.0, 55.0]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variants": ("SE",)}, "begin with Baseline"),
        ({"data": "photos"}, "--data and --val go together"),
        ({"variants": (BASELINE, "sse")}, "sse: none of Baseline, SE"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(SystemExit, match=said):
        attention_table.run(**options)
