"""Two processes' batch norms are one's, values, gradients, running figures; conversion for GPUs keeps activations."""

import json

import timm
import torch
from tiny_runs import finish, start

from ssl_global.attention.attach import attach
from ssl_global.training.batch_norm import synchronise


def test_two_processes_normalise_as_one():
    code, out, error = finish(start([], script="tests/training/batch_norm_in_processes.py"))
    assert code == 0, error[-3000:]
    different = json.loads(out.splitlines()[-1])
    assert len(different) == 6
    assert max(different.values()) < 1e-12, different


def test_for_gpus_timm_keeps_its_activations():
    """torch's own conversion drops them: the model would be another. In eval mode both are comparable on a CPU."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=0).eval()
    images = torch.randn(2, 3, 64, 64)
    parameters, before = list(model.parameters()), model(images)
    synchronise(model, torch.device("cuda"))
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    assert torch.equal(model(images), before)
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]


def test_for_gpus_what_stands_at_a_norm_is_still_called():
    """timm makes new norms, and hooks are what runs an attached module."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0, zero_init_last=False).eval()
    images = torch.randn(2, 3, 64, 64)
    plain = model(images)
    attached = attach(model, {"layer2.0.bn1": "se"})
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter += torch.randn_like(parameter)
    before = model(images)
    assert not torch.equal(before, plain)
    synchronise(model, torch.device("cuda"))
    assert torch.equal(model(images), before)
    attached.detach()
    assert torch.equal(model(images), plain)
