"""The largest micro-batch is found, and the run does not know how."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from recipes_under_test import load_recipe
from tiny_runs import arguments as arguments_of
from tiny_runs import assert_bit_equal, finish, losses, metrics, start, tensors
from torch import nn

from ssl_global.command_line import Command, parse
from ssl_global.errors import UserError
from ssl_global.methods.method import Method
from ssl_global.planning.dry_run import dry_run
from ssl_global.training import fit
from ssl_global.training.checkpoint import load_encoder

MORE = ["--encoder.drop-path=0.2"]  # what draws numbers in a step


@given(
    sizes=st.sets(st.integers(1, 600), min_size=4),
    lines=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 40)), min_size=1, max_size=3),
    last=st.integers(-1, 30),
    full=st.integers(1, 30_000),
)
def test_the_largest_that_fits_is_found(sizes, lines, last, full):
    """A step's peak is the highest of several moments, each of so much for good and so much for each image."""

    def taken(size):
        return max(fixed + each * size for fixed, each in lines)

    rising = sorted(sizes)
    allowed = taken(rising[last % len(rising)]) if last >= 0 else 0  # none fits, or up to one of them
    tried = fit.search(rising, allowed, lambda size: taken(size) if taken(size) < full else None)
    fitting = [size for size in rising if taken(size) <= allowed and taken(size) < full]
    found = [size for size, peak in tried.items() if peak is not None and peak <= allowed]
    assert max(found, default=None) == max(fitting, default=None)


def test_few_are_tried_where_memory_rises_evenly():
    tried = fit.search(list(range(1, 1000)), 70_500, lambda size: 500 + 100 * size)
    assert list(tried) == [1, 2, 700]


def limited_to(monkeypatch, number):
    monkeypatch.setattr(fit, "free_bytes", lambda device, processes_here: number)


def room_for(monkeypatch, run, method, out, images, *more):
    """Limits memory to what so many images take, seen in a run with all there is; returns what was free."""
    seen = {}

    class Noting(fit.Trial):
        def peak(self, size):
            seen[size] = super().peak(size)
            return seen[size]

    monkeypatch.setattr(fit, "Trial", Noting)
    run(method, out, "--train.micro-batch=auto", *more)
    assert sorted(seen) == [1, 2, 12]
    each = (seen[12] - seen[2]) / 10
    limit = int((seen[2] + each * (images - 2 + 0.5)) / fit.USABLE)
    limited_to(monkeypatch, limit)
    return limit


@pytest.mark.parametrize(("method", "more"), [("dino", []), ("mae", MORE)])
def test_a_run_that_finds_its_micro_batch_is_the_run_that_was_told_it(method, more, run, tmp_path, monkeypatch, capsys):
    """And up to rounding the run that has room for all at once, where nothing is drawn in a step."""
    room_for(monkeypatch, run, method, tmp_path / "all", 4, *more)
    capsys.readouterr()
    found = run(method, tmp_path / "found", "--train.micro-batch=auto", *more)
    said = capsys.readouterr().out
    assert "fit    4 images at once take 0.0" in said
    assert "1 process x 3 x 4 images = 12 a step" in said
    assert_bit_equal(tensors(found), tensors(run(method, tmp_path / "told", "--train.micro-batch=4", *more)))
    if not more:
        torch.testing.assert_close(losses(tmp_path / "all"), losses(found), rtol=1e-4, atol=1e-5)
    recipe, _, _ = load_encoder(found, None)
    assert recipe.train.micro_batch == "auto"


def test_no_trace():
    """Buffers, modes, gradients and torch's random numbers, whatever a trial does to them."""
    norm = nn.BatchNorm1d(3).eval()
    method = Method()
    method.parts = nn.ModuleList([nn.Linear(3, 3), norm])
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    torch.manual_seed(5)
    with fit.leaving_no_trace(method, torch.device("cpu")):
        assert norm.training
        norm(method.parts[0](torch.randn(4, 3))).square().sum().backward()
        assert not torch.equal(norm.running_mean, before["parts.1.running_mean"])
    assert (method.training, norm.training) == (True, False)
    assert [parameter.grad for parameter in method.parameters()] == [None] * 4
    assert_bit_equal(method.state_dict(), before)
    drawn = torch.randn(4)
    assert torch.equal(drawn, torch.randn(4, generator=torch.Generator().manual_seed(5)))


def test_memory_that_is_full_is_a_size_too_large(monkeypatch):
    class Full(fit.Trial):
        def __init__(self):
            self.accelerator, self.method, self.speaks = SimpleNamespace(device=torch.device("cpu")), Method(), False

        def step(self, images):
            if images > 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            torch.zeros(images * 25).add_(1)

    trial = Full()
    assert [trial.peak(images) for images in (4, 8, 16)] == [400, 800, None]
    assert fit.search([4, 8, 16, 32], 2000, trial.peak) == {4: 400, 8: 800, 16: None}


def test_a_trial_takes_what_a_plan_says():
    """Gradients, AdamW's averages and the step, as the dry run without content has them."""
    recipe = load_recipe("mae", "demo", depth=2)
    parts, step = dry_run(recipe)
    method = recipe.method.build(recipe)
    trial = fit.Trial(method, method, Accelerator(cpu=True), recipe, masks=False)
    for images in (8, 32):
        expected = step.bytes(images) + (4 + 8) * parts.learning
        assert trial.peak(images) == pytest.approx(expected, rel=0.03)


def test_a_trial_keeps_what_was_looked_at_ahead():
    """Of all parts of a step: their views and the teacher's answers. And each image has hidden patches of its own."""
    recipe = load_recipe("dinov2", "demo", depth=1)
    method = replace(recipe.method, centring="sinkhorn", koleo_weight=0.0, hidden_share=1.0)
    peaks, kept, seen = [], [], []

    class Noting(fit.Trial):
        def look_ahead(self, images, num_parts):
            parts = super().look_ahead(images, num_parts)
            kept.append(sum(answer.nbytes for answers in self.method.answers for answer in answers))
            seen.append(sum(view.nbytes for part in parts for view in part["views"]))
            return parts

    for global_batch in (8, 32):
        of_batch = replace(recipe, method=method, train=replace(recipe.train, global_batch=global_batch))
        module = method.build(of_batch)
        peaks.append(Noting(module, module, Accelerator(cpu=True), of_batch, masks=False).peak(4))
        assert not module.answers
    assert (kept[1] > 3 * kept[0], seen[1]) == (True, 4 * seen[0])
    assert peaks[1] - peaks[0] == pytest.approx(kept[1] - kept[0] + seen[1] - seen[0], rel=0.05)


def test_what_a_trial_has_kept_is_dropped_with_it():
    recipe = load_recipe("dino", "demo", depth=1)
    method = replace(recipe, train=replace(recipe.train, split_views=True)).method.build(recipe)

    class Full(fit.Trial):
        def step(self, images):
            self.method.targets = torch.zeros(images)
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert Full(method, method, Accelerator(cpu=True), recipe, masks=False).peak(2) is None
    assert method.targets is None


@pytest.mark.parametrize(
    ("name", "changes", "speaks"),
    [
        ("dino", {}, False), ("dino", {"consistency_weight": 1.0}, True), ("consistency", {}, True), ("mae", {}, False),
        ("dinov2", {}, False), ("dinov2", {"centring": "sinkhorn"}, True),
    ],
)  # fmt: skip
def test_trials_know_where_processes_wait_for_each_other(name, changes, speaks):
    recipe = load_recipe(name, "demo", depth=1)
    method = replace(recipe.method, **changes).build(recipe)
    assert fit.Trial(method, method, Accelerator(cpu=True), recipe, masks=False).speaks == speaks


@pytest.mark.parametrize(("name", "changed"), [("consistency", {}), ("dino", {"consistency_weight": 1.0})])
def test_memory_does_not_choose_negatives(name, changed):
    recipe = load_recipe(name, "demo")
    recipe = replace(recipe, method=replace(recipe.method, **changed))
    recipe.check()
    with pytest.raises(UserError, match=r"train\.micro_batch = auto: a number, or None: the images at once"):
        replace(recipe, train=replace(recipe.train, micro_batch="auto")).check()


def test_no_room_at_all_is_one_line(run, tmp_path, monkeypatch):
    limited_to(monkeypatch, 1000)
    with pytest.raises(SystemExit, match="2"):
        run("mae", tmp_path / "run", "--train.micro-batch=auto")


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_processes_agree_on_the_least_and_learn_what_they_would_have(sharded, tmp_path, photographs):
    """The second process has room for two images, the first for five."""
    how, script = (["--sharded"], "fsdp_on_cpu.py") if sharded else ([], "pretrain.py")
    words = arguments_of("dino", photographs, tmp_path / "found", "--train.micro-batch=auto", *MORE)
    found = start([*how, *words], script="tests/fit_in_processes.py")
    told = start(
        arguments_of("dino", photographs, tmp_path / "told", "--train.micro-batch=2", *MORE),
        script=f"tests/{script}" if sharded else script,
    )
    (code, out, error), (told_code, _, told_error) = finish(found), finish(told)
    assert (code, told_code) == (0, 0), error[-2000:] + told_error[-2000:]
    assert "fit    2 images at once" in out
    assert "2 processes x 3 x 2 images = 12 a step" in out
    assert_bit_equal(tensors(tmp_path / "found"), tensors(tmp_path / "told"))


def test_it_says_what_a_step_took(run, tmp_path):
    lines = [line for line in metrics(run("mae", tmp_path / "run")) if "loss" in line]
    assert all(0.1 < line["peak_memory_gb"] < 50 for line in lines)


def test_auto_is_a_word_of_the_command_line():
    command, overridden = parse(["--recipe", "mae", "--train.micro-batch", "auto"], Command)
    assert command.settings.train.micro_batch == "auto"
    assert overridden == {"train.micro_batch": 64 if command.settings.train.precision == "bf16" else None}
    for word, message in (("0", "at least 1 image, auto for what fits"), ("most", "micro-batch")):
        with pytest.raises(UserError, match=message):
            parse(["--recipe", "mae", "--train.micro-batch", word], Command)
