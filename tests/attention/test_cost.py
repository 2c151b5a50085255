"""What a model costs, against formulas and against a real step on the CPU."""

import pytest
import timm
import torch
from torch import nn

from ssl_global import attention
from ssl_global.attention import cost as cost_file
from ssl_global.attention.attach import attach
from ssl_global.attention.cost import ESTIMATE, Cost, cost, peak_of_a_step
from ssl_global.attention.places import four_stages, stages
from ssl_global.attention.recommend import MOST_ADDED, ROOM, STRATEGIES, TASKS, recommend


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    """What is asserted is the estimate, also where there is a GPU."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)


def kept_by_a_real_step(model, images):
    """Bytes of all that autograd keeps, each storage once, the model's own aside; asked of tensors with content."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(images)
    del output
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


def test_a_vit_costs_what_its_formula_says():
    found = cost("vit_tiny_patch16_224", batch=3)
    n, c, depth = 197, 192, 12
    multiply_adds = 196 * (3 * 16 * 16) * c + depth * (n * (3 + 1 + 4 + 4) * c * c + 2 * n * n * c)
    assert found.flops == 3 * 2 * multiply_adds  # fused attention counted
    assert found.parameters == sum(
        p.numel() for p in timm.create_model("vit_tiny_patch16_224", num_classes=0).parameters()
    )
    assert found.input_size == (3, 224, 224)
    assert found.training_bytes == 16 * found.parameters + found.activation_bytes


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "swin_tiny_patch4_window7_224"])
def test_the_dry_run_keeps_what_a_real_one_keeps(name):
    model = timm.create_model(name, num_classes=0)
    attach(model, {four_stages(model)[-1]: "non_local"})
    found = cost(model, batch=2)
    assert found.activation_bytes == kept_by_a_real_step(model, torch.randn(2, *found.input_size))
    assert found.source == ESTIMATE


@pytest.mark.parametrize("name", attention.names())
def test_every_module_has_its_cost(name):
    module = attention.build(name, 16)
    torch.manual_seed(0)
    found = cost(module, (16, 9, 6), batch=2)
    assert found.activation_bytes == kept_by_a_real_step(module, torch.randn(2, 16, 9, 6))
    assert found.parameters == sum(p.numel() for p in module.parameters())


def test_bf16_keeps_less():
    model = timm.create_model("test_vit")
    in_half, in_full = (cost(model, batch=16, precision=precision).activation_bytes for precision in ("bf16", "fp32"))
    assert 0.5 * in_full < in_half < 0.8 * in_full


def test_frozen_parameters_need_no_gradients_and_averages():
    model = timm.create_model("test_resnet")
    attached = attach(model, {"layer4": "non_local"})
    attached.freeze_backbone()
    found = cost(model)
    learning = sum(p.numel() for p in attached.parameters())
    assert found.learning == learning
    assert found.training_bytes == 16 * learning + 4 * (found.parameters - learning) + found.activation_bytes


def test_looking_changes_nothing():
    model = timm.create_model("test_resnet").eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    cost(model, batch=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet5",), "resnet5: no model of timm; the nearest are resnet"),
        (("test_vit", (3, 100, 100)), r"takes no images of \(3, 100, 100\): Input height"),
        (("test_vit", None, 0), "batch = 0: at least 1"),
        ((nn.Linear(3, 3),), "does not say which images it takes"),
    ],
)
def test_what_cannot_be_weighed(arguments, message):
    with pytest.raises(ValueError, match=message):
        cost(*arguments)


def test_where_there_is_an_accelerator_a_step_is_measured(monkeypatch):
    monkeypatch.setattr(cost_file, "peak_of_a_step", lambda model, images, precision: 12345)
    found = cost(timm.create_model("test_vit"), device=torch.device("meta"))
    assert (found.activation_bytes, found.source) == (12345, "measured on meta")

    def too_much(model, images, precision):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(cost_file, "peak_of_a_step", too_much)
    found = cost(timm.create_model("test_vit"), device=torch.device("meta"))
    assert found.activation_bytes > 12345
    assert found.source == f"{ESTIMATE}: more than meta has free"


def test_a_measured_step_is_forward_and_backward(monkeypatch):
    """On the CPU, whose allocator does not count: the figures are made up, the step is real."""
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 1700)
    model = timm.create_model("test_vit")
    assert peak_of_a_step(model, torch.randn(1, 3, 160, 160), "fp32") == 700
    assert all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------------------------------- attached


def test_a_report_is_of_the_model_without_with_each_and_with_all():
    model = timm.create_model("test_resnet").eval()
    bare = cost(model, batch=2)
    attached = attach(model, {"layer3": "non_local", "layer4": "se"})
    images = torch.randn(1, 3, 160, 160)
    expected = model(images)
    report = attached.report(batch=2)
    assert report.before == bare
    assert report.after == cost(model, batch=2)
    only = timm.create_model("test_resnet")
    attach(only, {"layer3": "non_local"})
    assert report.alone["layer3"] == cost(only, batch=2)
    rows = report.rows()
    assert [row["what"] for row in rows] == ["backbone", "+ non_local at layer3", "+ se at layer4", "with all of them"]
    assert sum(row["parameters"] for row in rows[:-1]) == rows[-1]["parameters"]
    assert sum(row["flops"] for row in rows[:-1]) == rows[-1]["flops"]
    assert torch.equal(model(images), expected)
    assert attached.gates() == {"layer3": 0.0, "layer4": 0.0}
    assert [row.split()[0] for row in str(report).splitlines()[1:]] == ["backbone", "+", "+", "with", "images"]


def test_a_report_that_fails_leaves_the_modules_where_they_were():
    model = timm.create_model("test_vit")
    attached = attach(model, {"blocks.1": "se", "blocks.3": "gca"})
    with pytest.raises(ValueError, match="takes no images"):
        attached.report((3, 100, 100))
    assert list(attached.places) == ["blocks.1", "blocks.3"]
    assert all(one.hooks for one in attached.places.values())


# ------------------------------------------------------------------------------------------------------ recommended


@pytest.mark.parametrize(
    ("memory_gb", "strategy"),
    [
        (80, "full_global_attention"),
        (24, "full_global_attention"),
        (23.9, "window_attention_with_global_tokens"),
        (12, "window_attention_with_global_tokens"),
        (11.9, "lightweight_global_modules"),
        (0.5, "lightweight_global_modules"),
    ],
)
def test_by_memory_alone_it_is_the_sources_rule(memory_gb, strategy):
    plan = recommend("classify", memory_gb)
    assert plan.chosen.strategy == strategy
    assert plan.chosen.modules == next(s for s in STRATEGIES if s.name == strategy).modules
    assert len(plan.alternatives) == 2
    assert strategy in plan.reasons[0]


@pytest.mark.parametrize("task", TASKS)
def test_the_tasks_modules_come_first(task):
    plan = recommend(task, 24)
    assert plan.chosen.modules.items() >= TASKS[task].modules.items()
    assert plan.advice
    model = timm.create_model("test_resnet")
    attached = plan.attach(model)
    names = stages(model)
    assert attached.modules == {names[stage]: (name, {}) for stage, name in sorted(plan.chosen.modules.items())}
    assert all(
        line[:9].strip() in ("", "strategy", "because", "modules", "besides", "instead")
        for line in str(plan).splitlines()
    )


def test_with_a_backbone_the_figures_decide():
    model = timm.create_model("test_resnet")
    plan = recommend("classify", 1000, batch=2, backbone=model)
    bare, needed = cost(model, batch=2), {option.strategy: option.cost for option in [plan.chosen, *plan.alternatives]}
    assert plan.report.before == bare
    assert plan.report.after == plan.chosen.cost
    for memory_gb in (1000, *((1 + 1e-6) * c.training_bytes / 1e9 / (1 - ROOM) for c in needed.values())):
        plan = recommend("classify", memory_gb, batch=2, backbone=model)
        possible = [
            s.name for s in STRATEGIES
            if needed[s.name].training_bytes <= (1 - ROOM) * memory_gb * 1e9
            and needed[s.name].flops <= (1 + MOST_ADDED) * bare.flops
        ]  # fmt: skip
        assert (plan.chosen.strategy if plan.chosen else None) == (possible[0] if possible else None)
        assert all(option.against or option.strategy in possible for option in plan.alternatives)
    assert not [key for key in model.state_dict() if "attached" in key]


def test_where_nothing_fits_it_says_what_would():
    bare = cost("test_resnet", batch=8)
    per_image = bare.activation_bytes / 8
    memory_gb = (bare.training_bytes - bare.activation_bytes + 3.5 * per_image) / (1 - ROOM) / 1e9
    plan = recommend("segment", memory_gb, batch=8, backbone="test_resnet")
    assert plan.chosen is None
    assert "batch 3 would fit" in plan.reasons[-1]
    with pytest.raises(ValueError, match="batch 3 would fit"):
        plan.attach(timm.create_model("test_resnet"))
    assert "not even one image would fit" in recommend("segment", 1e-6, backbone="test_resnet").reasons[-1]
    assert all(option.against for option in plan.alternatives)


def test_a_vits_stages_are_the_ends_of_its_quarters():
    """Of the last, the block before it: behind it a class token reads no patches."""
    assert four_stages(timm.create_model("vit_tiny_patch16_224")) == ["blocks.2", "blocks.5", "blocks.8", "blocks.10"]
    assert four_stages(timm.create_model("resnet18")) == ["layer1", "layer2", "layer3", "layer4"]
    plan = recommend("dense", 24)
    with pytest.raises(ValueError, match="names no stages"):
        plan.attach(nn.Sequential(nn.Conv2d(3, 3, 1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("detect", 12), "task = 'detect': one of small_objects, segment, classify, dense"),
        (("segment", 0), "memory_gb = 0: above 0"),
        (("segment", float("nan")), "memory_gb = nan: above 0"),
        (("segment", 12, None, 1, "resnet5"), "resnet5: no model of timm"),
    ],
)
def test_what_cannot_be_recommended(arguments, message):
    with pytest.raises(ValueError, match=message):
        recommend(*arguments)


def test_a_cost_reads_as_a_table():
    sizes = {"input_size": (3, 8, 9), "batch": 2, "parameters": 10**6, "learning": 10**6}
    shown = str(Cost(**sizes, flops=3 * 10**9, activation_bytes=4 * 10**6, source="counted"))
    assert shown.splitlines()[1].split() == ["backbone", "1.000", "3.000", "4.0", "20.0"]
    assert shown.splitlines()[-1] == "images 2 x 3 x 8 x 9; memory counted"
