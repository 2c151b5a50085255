"""What attached modules do, against their formulas; recorded only inside, and gone after an error."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ssl_global.attention.attach import attach
from ssl_global.explain.gates import gates, record, table


def with_modules(modules, name="resnet18", **options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options).eval()
    attached = attach(model, modules, input_size=(3, 64, 64))
    for one in attached.places.values():
        for parameter in one.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model, attached


def images(size=64):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def at(model, attached, place):
    """What the module there is given, and what it makes of it."""
    kept = []
    attention = attached.places[place].attention
    hook = attention.register_forward_hook(lambda _m, inputs, y: kept.append((inputs[0], y)))
    with torch.no_grad():
        model(images())
    hook.remove()
    return attention, *kept[0]


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_weights_of_se_are_its_formula():
    model, attached = with_modules({"layer2": "se"})
    attention, x, y = at(model, attached, "layer2")
    (found,) = gates(model, images())
    se, means = attention.se, x.mean((2, 3))
    hidden = (means @ se.fc1.weight[:, :, 0, 0].T + se.fc1.bias).relu()
    expected = 2 * torch.sigmoid(hidden @ se.fc2.weight[:, :, 0, 0].T + se.fc2.bias)
    torch.testing.assert_close(found.channels, expected)
    torch.testing.assert_close(x * found.channels[:, :, None, None], y)
    assert found.spatial is None
    assert found.looks is None
    assert (found.place, found.name, found.path) == ("layer2", "se", "layer2.1.attached_1")


def test_weights_of_eca_are_its_formula():
    model, attached = with_modules({"layer1": ("eca", {"start": "paper"})})
    attention, x, _ = at(model, attached, "layer1")
    (found,) = gates(model, images())
    weight = attention.eca.conv.weight
    expected = torch.sigmoid(F.conv1d(x.mean((2, 3))[:, None], weight, padding=weight.shape[2] // 2))[:, 0]
    torch.testing.assert_close(found.channels, expected)
    assert found.opened is None
    assert found.gamma is None


def test_weights_of_cbam_are_of_channels_and_of_places():
    model, attached = with_modules({"layer3": "cbam"})
    _, x, y = at(model, attached, "layer3")
    (found,) = gates(model, images())
    assert found.channels.shape == (3, 256)
    assert found.spatial.shape == (3, 4, 4)
    torch.testing.assert_close(x * found.channels[:, :, None, None] * found.spatial[:, None], y)


@pytest.mark.parametrize(
    ("name", "options"), [("coord", {}), ("gather_excite", {"extent": 2}), ("gather_excite", {}), ("gca", {})]
)
def test_weights_of_both_are_means_over_the_other(name, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)).eval()
    attached = attach(model, {"0": (name, options)}, input_size=(3, 12, 10))
    for parameter in attached.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = images()[:, :, :12, :10]
    (found,) = gates(model, x)
    with torch.no_grad():
        features = model[0](x)
        attached.detach()
        ratio = features.double() / model[0](x).double()  # the gates themselves
    torch.testing.assert_close(found.channels.double(), ratio.mean((2, 3)), atol=1e-4, rtol=0)
    if found.spatial is None:
        assert (ratio.std((2, 3)) < 1e-4).all()
    else:
        torch.testing.assert_close(found.spatial.double(), ratio.mean(1), atol=1e-4, rtol=0)
    assert (found.spatial is None) == (name == "gca")


def test_position_looks_where_its_softmax_says():
    model, attached = with_modules({"layer4": "position", "layer3": ("dual", {})})
    attention, x, y = at(model, attached, "layer4")
    of_dual, found = gates(model, images())
    query, key, value = (part(x).flatten(2) for part in (attention.query, attention.key, attention.value))
    looks = torch.einsum("bkn,bkm->bnm", query, key).softmax(-1)
    torch.testing.assert_close(found.looks, looks)
    branch = torch.einsum("bnm,bcm->bcn", found.looks, value).view_as(x)
    torch.testing.assert_close(x + attention.gamma[:, None, None] * branch, y)
    torch.testing.assert_close(found.spatial, looks.mean(1).view(3, 2, 2) * 4)
    torch.testing.assert_close(found.gamma, attention.gamma.detach())
    assert of_dual.looks.shape == (3, 16, 16)


@pytest.mark.parametrize("options", [{}, {"mode": "gaussian"}, {"sub_sample": True}])
def test_non_local_gathers_by_what_it_looks_at(options):
    model, attached = with_modules({"layer3": ("non_local", options)})
    attention, x, y = at(model, attached, "layer3")
    (found,) = gates(model, images())
    asked = F.max_pool2d(x, 2) if options.get("sub_sample") else x
    gathered = torch.einsum("bnm,bkm->bkn", found.looks, attention.value(asked).flatten(2)).unflatten(2, (4, 4))
    torch.testing.assert_close(x + attention.gamma[:, None, None] * attention.norm(attention.out(gathered)), y)
    assert (found.spatial is None) == bool(options.get("sub_sample"))


def test_modes_without_a_softmax_and_large_maps_have_no_looks():
    model, _ = with_modules({"layer4": ("non_local", {"mode": "dot"})})
    assert gates(model, images())[0].looks is None
    model, _ = with_modules({"layer1": "position"})
    (found,) = gates(model, images(160))  # 40 x 40 places
    assert found.looks is None
    assert found.change.shape == (3,)


def test_the_change_is_relative_to_what_came_in():
    model, attached = with_modules({"layer2": "se", "layer4": "criss_cross"})
    for one in gates(model, images()):
        _, x, y = at(model, attached, one.place)
        for b in range(3):
            expected = ((y[b] - x[b]).square().sum().sqrt() / x[b].square().sum().sqrt()).item()
            assert one.change[b].item() == pytest.approx(expected, rel=1e-5)
        assert one.opened == attached.gates()[one.place]


def test_closed_modules_change_nothing_and_weigh_all_alike():
    model = timm.create_model("resnet18", num_classes=0).eval()
    attach(model, {"layer2": "cbam", "layer4": "non_local"})
    cbam, non_local = gates(model, images())
    assert cbam.change.max() == non_local.change.max() == 0
    assert (cbam.channels == 1).all()
    assert (cbam.spatial == 1).all()
    assert cbam.opened == non_local.opened == 0


def test_a_vits_modules_are_seen_as_maps():
    model, _ = with_modules(
        {"blocks.0": "cbam"}, "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2, reg_tokens=2
    )
    (found,) = gates(model, images())
    assert found.spatial.shape == (3, 4, 4)
    assert found.channels.shape == (3, 32)


# ------------------------------------------------------------------------------------------------------------ recording


def test_it_records_only_inside_and_changes_nothing():
    model, _ = with_modules({"layer2": "cbam", "layer3": "non_local"})
    before, said = hooks_of(model), model(images())
    with record(model) as found:
        assert torch.equal(model(images()), said)
        assert found == []
    assert [one.name for one in found] == ["cbam", "non_local"]
    assert hooks_of(model) == before
    model(images())
    assert len(found) == 2
    assert len(found[0].change) == 3


def test_two_batches_are_put_together():
    model, _ = with_modules({"layer2": "se"})
    whole = gates(model, images())[0]
    with torch.no_grad(), record(model) as found:
        model(images()[:1])
        model(images()[1:])
    torch.testing.assert_close(found[0].channels, whole.channels)
    torch.testing.assert_close(found[0].change, whole.change)


def test_hooks_are_gone_after_an_error():
    model, _ = with_modules({"layer2": "cbam", "layer3": "non_local"})
    before = hooks_of(model)
    with pytest.raises(RuntimeError, match="stop"), record(model):
        raise RuntimeError("stop" if model(images()).isfinite().all() else "nan")
    assert hooks_of(model) == before
    model.train()
    with pytest.raises(RuntimeError):
        gates(model, torch.zeros(1, 5, 64, 64))
    assert hooks_of(model) == before
    assert model.training


def test_one_that_was_not_called_is_left_out_and_copies_are_their_own():
    model, _ = with_modules({"layer2": "se", "layer4": "se"})
    copied = copy.deepcopy(model)
    with record(model) as found, torch.no_grad():
        copied(images())
        model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(images()))))))
    assert [one.place for one in found] == ["layer2"]
    assert found[0].change.shape == (3,)


def test_a_model_without_modules_is_refused():
    with pytest.raises(ValueError, match=r"ResNet: nothing is attached to it; attention.attach.attach does that"):
        gates(timm.create_model("resnet18"), images())


def test_a_table_has_a_line_for_each():
    model, attached = with_modules({"layer2": "se", "layer4": ("criss_cross", {})})
    head, *rows = table(gates(model, images())).splitlines()
    assert head.split() == ["place", "module", "opened", "change", "channels", "places"]
    assert [row.split()[:2] for row in rows] == [["layer2", "se"], ["layer4", "criss_cross"]]
    assert rows[0].split()[2] == f"{attached.gates()['layer2']:.3g}"
    assert rows[1].split()[-2:] == ["-", "-"]
