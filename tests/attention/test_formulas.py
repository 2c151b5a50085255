"""Each module is its paper's formula, in float64: benchmarks/reference/attention_forms.py, which runs none of its code.

What two libraries have in common is compared with the other library too.
"""

import ast
import inspect
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.pvt_v2 import Attention as PvtAttention
from timm.models.swin_transformer import SwinTransformerBlock

from benchmarks.attention import PlainForm, moved
from benchmarks.reference import attention_forms
from benchmarks.reference.attention_forms import as_map, by_heads, flat, form, masked_attention, together
from ssl_global import attention
from ssl_global.attention.aspp import pyramid
from ssl_global.attention.base import BatchNorm, fused_attention
from ssl_global.attention.cost import cost
from ssl_global.attention.dyt import DyT, replace_layer_norms
from ssl_global.attention.neighbourhood import by_gathering, by_natten
from ssl_global.attention.non_local import sum_of_rectified
from ssl_global.attention.ppm import PyramidPooling

NAMES = attention.names()
OPTIONS = {  # beside what each is by default
    "acmix": [{"kernel": 1}, {"kernel": 3, "heads": 2}],
    "aspp": [{"rates": (1, 2)}],
    "cbam": [{"kernel_size": 3, "ratio": 0.5}],
    "channel": [{"energy": "official"}, {"energy": "paper"}],
    "coord": [{"ratio": 1.0}],
    "criss_cross": [{"recurrence": 1}, {"recurrence": 2}, {"recurrence": 3, "reduction": 2}],
    "cross_shaped_window": [{"stripe": stripe, "heads": 4} for stripe in (1, 2, 4, 9)],
    "deformable": [{"stride": 2, "groups": 2, "heads": 2}, {"stride": 1, "reach": 5.0}, {"stride": 3, "groups": 4}],
    "dilated": [{"dilations": (1,)}, {"dilations": (3, 1)}],
    "dual": [{"reduction": 2, "energy": "paper"}],
    "ema_msa": [{"groups": 1}, {"groups": 2}, {"groups": 4}],
    "emax": [{"groups": (2,)}, {"groups": (1, 2, 4)}],
    "gather_excite": [{"extent": extent, "ratio": 0.5} for extent in (2, 3, 4)],
    "gca": [{"ratio": 1.0}],
    "global_attention": [{"heads": 2}],
    "global_tokens": [{"tokens": 1, "bottleneck": 1}, {"tokens": 5, "bottleneck": 8}],
    "large_kernel": [{"kernel": 13}, {"kernel": 3, "small_kernel": 3}],
    "lka": [{"kernel": (3, 5), "dilation": 2}],
    "local": [{"window": window, "stride": stride, "heads": 2}
              for window, stride in ((3, 3), (3, 1), (4, 3), (7, 5), (2, 2))],
    "multipole": [{"window": 2, "weights": "code"}, {"window": 2, "weights": "uniform", "sampling": "conv"},
                  {"window": 3, "stride": 2, "heads": 2}],
    "neighbourhood": [{"kernel": kernel, "heads": 2} for kernel in (1, 3, 5, 9)],
    "non_local": [{"mode": mode, "sub_sample": sub_sample} for sub_sample in (False, True)
                  for mode in ("embedded_gaussian", "gaussian", "dot", "concat")] + [{"inner": 11}],
    "position": [{"reduction": 1}, {"reduction": 2}],
    "ppm": [{"bins": (1, 3)}],
    "se": [{"ratio": 0.5}],
    "shifted_window": [{"window": 3, "heads": 2}, {"window": 3, "heads": 2, "shifted": True},
                       {"window": 4, "shifted": True}],
    "spatial_reduction": [{"reduction": reduction, "heads": 2} for reduction in (1, 2, 3)],
}  # fmt: skip
CASES = [(name, options) for name in NAMES for options in [{}, *OPTIONS.get(name, [])]]


def build(name, channels=8, **options):
    return moved(name, channels, **options)


def agree(module, name, x):
    """Values, and how they change with x."""
    x = x.detach().requires_grad_()
    said, meant = module(x), form(name)(module, x)
    torch.testing.assert_close(said, meant)
    towards = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad((y * towards).sum(), x)[0] for y in (said, meant)))


x = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(7)).double()
EVERYWHERE = torch.ones(30, 30, dtype=torch.bool)


def test_there_is_a_form_for_each():
    print(f"{len(NAMES)} modules, {len(CASES)} cases")
    assert len(CASES) >= 29 + 57
    assert OPTIONS.keys() <= set(NAMES)
    for name in NAMES:
        assert inspect.getmodule(form(name)) is attention_forms
        assert form(name).__doc__
    with pytest.raises(KeyError):
        form("non_locall")


@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_it_is_its_formula(name, options, start):
    module = build(name, start=start, **options)
    small = 0.3 * x if name == "channel" else x  # its softmax else takes one channel alone
    agree(module, name, small)


@settings(max_examples=200)
@given(
    name=st.sampled_from(NAMES), batch=st.integers(1, 3), height=st.integers(1, 15), width=st.integers(1, 15),
    channels=st.sampled_from([2, 6, 10, 64]),
)  # fmt: skip
def test_it_is_its_formula_at_any_size(name, batch, height, width, channels):
    agree(build(name, channels), name, torch.randn(batch, channels, height, width).double())


@pytest.mark.parametrize("name", NAMES)
def test_a_form_runs_none_of_the_modules_code(name, monkeypatch):
    module = build(name)
    said = module(x)
    for kind in {type(part) for part in module.modules()} - {BatchNorm}:
        if kind.__module__.startswith(("ssl_global", "timm", "torchvision")):
            monkeypatch.setattr(kind, "forward", None)
    torch.testing.assert_close(form(name)(module, x), said)
    with pytest.raises(TypeError):
        module(x)


def test_the_forms_import_none_of_it():
    tree = ast.parse(Path(attention_forms.__file__).read_text())
    froms = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imports = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.split(".")[0] for name in froms + imports} == {"collections", "itertools", "math", "typing", "torch"}


def test_sizes_are_the_papers_or_those_asked_for():
    """Forms take sizes off the modules."""
    sizes = lambda convs: [(conv.kernel_size[0], conv.dilation[0]) for conv in convs]  # noqa: E731
    convs = {name: [m for m in attention.build(name, 8).modules() if isinstance(m, torch.nn.Conv2d)] for name in NAMES}
    assert sizes(convs["lka"]) == [(5, 1), (7, 3), (1, 1)]
    assert sizes(convs["mlka"])[1:-4] == [(3, 1), (5, 2), (1, 1), (5, 1), (7, 3), (1, 1), (7, 1), (9, 4), (1, 1)]
    assert sizes(convs["mlka"])[-4:-1] == [(3, 1), (5, 1), (7, 1)]
    assert sizes(convs["dilated"]) == [(3, 1), (3, 2), (3, 4)]
    assert sizes(convs["aspp"]) == [(1, 1), (3, 12), (3, 24), (3, 36), (1, 1), (1, 1)]
    assert sizes(convs["large_kernel"]) == [(31, 1), (5, 1)]
    assert sizes(convs["ppm"]) == [(1, 1)] * 4 + [(3, 1)]
    assert attention.build("ppm", 8).pyramid.bins == (1, 2, 3, 6)
    assert attention.build("cbam", 8).cbam.spatial.conv.conv.kernel_size == (7, 7)
    assert attention.build("se", 64).se.fc1.out_channels == 4  # 64 / 16; timm would take 8
    assert attention.build("cbam", 64).cbam.channel.fc1.out_channels == 4
    assert attention.build("global_attention", 8, heads=4).attention.num_heads == 4
    assert attention.build("shifted_window", 8, heads=4).attention.num_heads == 4


@pytest.mark.parametrize(
    ("name", "options", "growth"),
    [
        *(("non_local", {"mode": mode}, 4) for mode in ("embedded_gaussian", "gaussian", "dot", "concat")),
        ("position", {}, 4), ("dual", {}, 4), ("global_attention", {}, 4), ("global_tokens", {}, 4),
        ("deformable", {}, 4), ("spatial_reduction", {}, 4), ("cross_shaped_window", {}, 4), ("criss_cross", {}, 8),
    ],
    ids=str,
)  # fmt: skip
def test_no_map_of_all_places_is_kept(name, options, growth):
    """Of four times the places, four times the memory; eight where each keeps a row and a column. Forms near 16."""
    module = attention.build(name, 32, **options)
    kept = lambda of, side: cost(of, (32, side, side), device=torch.device("cpu")).activation_bytes  # noqa: E731
    assert kept(module, 64) <= 1.02 * growth * kept(module, 32)
    if name in ("non_local", "position", "dual", "global_attention"):
        plain = PlainForm(name, module)
        assert kept(plain, 64) > 12 * kept(plain, 32)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("narrow", "wide"), [(3, 3), (2, 5), (5, 2)])
def test_fused_attention_is_the_whole_map(narrow, wide, masked):
    """However its inputs lie in memory, values and gradients."""
    query, key = (torch.randn(2, 2, narrow, n).double().requires_grad_() for n in (7, 9))
    value = torch.randn(2, 2, wide, 9).double().requires_grad_()
    mask = torch.randn(7, 9) < 0.5 if masked else None
    inputs = [part.transpose(2, 3) for part in (query, key, value)]
    fused = fused_attention(*inputs, mask=None if mask is None else mask[None, None], scale=0.7)
    plain = masked_attention(*inputs, mask=mask, scale=0.7)
    torch.testing.assert_close(fused, plain)
    for mine, theirs in zip(
        *(torch.autograd.grad(y.square().sum(), (query, key, value)) for y in (fused, plain)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_se_is_torchvisions():
    module = build("se", start="paper")
    other = torchvision.ops.SqueezeExcitation(8, 1).double()
    other.load_state_dict(module.se.state_dict())
    torch.testing.assert_close(module(x), other(x))


@given(n=st.integers(1, 9), m=st.integers(1, 9), ties=st.booleans())
def test_the_sum_of_rectified_is_the_loop(n, m, ties):
    generator = torch.Generator().manual_seed(n * 10 + m)
    a, b = (torch.randn(2, k, generator=generator).double() for k in (n, m))
    a, b = (t.mul(2).round() if ties else t for t in (a, b))
    value = torch.randn(2, m, 3, generator=generator).double()
    inputs = [t.requires_grad_() for t in (a, b, value)]
    fast = sum_of_rectified(a, b, value)
    slow = torch.einsum("bnm,bmk->bnk", F.relu(a[:, :, None] + b[:, None, :]), value)
    torch.testing.assert_close(fast, slow)
    if not ties:  # where a + b is 0 either derivative is right
        for mine, theirs in zip(*(torch.autograd.grad(t.square().sum(), inputs) for t in (fast, slow)), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("recurrence", "reached"), [(1, 10), (2, 30)])
def test_criss_cross_reaches_everything_the_second_time(recurrence, reached):
    module = build("criss_cross", recurrence=recurrence)
    changed = x.clone()
    changed[:, :, 2, 3] += 1
    assert ((module(x) - module(changed))[0].abs().amax(0) > 0).sum() == reached


def test_global_tokens_reach_everything():
    module = build("global_tokens")
    changed = x.clone()
    changed[:, 0, 0, 0] += 1  # of one channel: a shift of all would be normalised away
    assert ((module(x) - module(changed))[0].abs().amax(0) > 0).all()


def test_lka_sees_twenty_three_places():
    module = build("lka", start="paper")
    image = torch.zeros(1, 8, 31, 31).double().requires_grad_()
    module.point(module.far(module.near(image)))[0, :, 15, 15].sum().backward()
    assert (image.grad.abs().sum((0, 1)) > 0).any(0).sum() == 23


def test_dilated_sees_fifteen_places():
    module = build("dilated", start="paper")
    image = torch.randn(1, 8, 31, 31).double().requires_grad_()
    module(image)[0, :, 15, 15].sum().backward()
    assert (image.grad.abs().sum((0, 1)) > 0).any(0).sum() <= 15
    linear = module(x + 1) - module(x)
    assert not torch.allclose(module(x + 2) - module(x + 1), linear)  # the source's was linear


def test_large_kernel_merges_into_one():
    module = build("large_kernel", kernel=13, start="paper")
    want = form("large_kernel")(module, x)
    module.merge()
    torch.testing.assert_close(module(x), want)
    assert [name for name, _ in module.named_parameters()] == ["conv.reparam_conv.weight", "conv.reparam_conv.bias"]


@pytest.mark.parametrize("reduction", [1, 2, 3])
def test_spatial_reduction_is_timms(reduction):
    module = build("spatial_reduction", reduction=reduction, heads=2)
    timms = PvtAttention(8, num_heads=2, sr_ratio=reduction).double()
    own = module.state_dict()
    timms.load_state_dict({name: own[name] for name in timms.state_dict()})
    y = x[:, :, :3] if reduction == 3 else x[:, :, :4]  # timm's takes sizes that it divides
    mixed = timms(module.norm_places(flat(y)), y.shape[2:])
    torch.testing.assert_close(module(y), y + module.gamma[:, None, None] * as_map(mixed, y))


def test_emax_of_one_candidate_is_that():
    module = build("emax", groups=(2,), start="paper")
    assert torch.equal(module(x), module.candidates[0](x))


def test_dyt_is_the_formula_and_takes_the_place_of_every_layer_norm():
    norm = DyT(8).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter += torch.randn_like(parameter)
    tokens = flat(x)
    torch.testing.assert_close(norm(tokens), norm.weight * (norm.alpha * tokens).tanh() + norm.bias)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    assert replace_layer_norms(model) == 25
    assert not [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert model(torch.randn(1, 3, 224, 224)).isfinite().all()


@pytest.mark.parametrize("groups", [1, 2])
def test_deformable_without_offsets_attends_to_the_shrunken_map(groups):
    module = build("deformable", stride=2, groups=groups, heads=2)
    torch.nn.init.zeros_(module.offset.weight)
    normal = as_map(module.norm(flat(x)), x)
    shrunken = F.interpolate(normal, size=(3, 3), mode="bilinear", align_corners=False)
    key, value = (flat(part) for part in module.key_value(shrunken).chunk(2, dim=1))
    query = flat(module.query(normal))
    heads = [by_heads(part, 2)[0] for part in (query, key, value)]
    mixed = together(masked_attention(*heads, scale=0.5))
    torch.testing.assert_close(module(x), x + module.gamma[:, None, None] * module.out(as_map(mixed, x)))


def test_deformable_offsets_move_the_samples_by_cells():
    """Offsets of one cell down and none aside: what is read is the cell below, the last row's own edge."""
    module = build("deformable", stride=1, reach=2.0)
    module.look_norm = torch.nn.Identity()
    with torch.no_grad():
        for parameter in (module.look.weight, module.look.bias, module.offset.weight):
            parameter.zero_()
        module.look.bias[0] = 3.0
        module.offset.weight[0, 0] = torch.atanh(torch.tensor(0.5).double()) / F.gelu(module.look.bias[0])
    read = module.sampled(x, x)
    torch.testing.assert_close(read[:, :, :4], x[:, :, 1:])
    torch.testing.assert_close(read[:, :, 4], x[:, :, 4])


@pytest.mark.parametrize("shifted", [False, True])
def test_shifted_window_is_timms_block_where_that_needs_no_padding(shifted):
    """timm's masks are -100, ours is minus infinity: the same to rounding. Other sizes: test_windows.py."""
    module = build("shifted_window", window=3, shifted=shifted, heads=2)
    block = SwinTransformerBlock(8, (6, 6), num_heads=2, window_size=3, shift_size=1 if shifted else 0).double()
    block.attn.load_state_dict(module.attention.state_dict())
    y = torch.cat([x, x[:, :, :1]], dim=2)  # 6 x 6
    added = block._attn(module.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    torch.testing.assert_close(module(y), y + module.gamma[:, None, None] * added)


@pytest.mark.parametrize(("weights", "shares"), [("code", [1, 1 / 3, 1 / 6, 1 / 6]), ("uniform", [1, 1, 1, 1])])
def test_multipole_adds_up_the_levels(weights, shares):
    """Of a 16 x 13 map with windows of 2: 16, 8, 4, 2 rows."""
    module = build("multipole", window=2, weights=weights, heads=2)
    y = torch.randn(2, 8, 16, 13).double()
    level, total = y, 0
    for depth, share in enumerate(shares):
        added = module.local.branch(level)
        for _ in range(depth):
            added = added.repeat_interleave(2, 2).repeat_interleave(2, 3)
        total = total + share * added[:, :, :16, :13]
        if level.shape[3] % 2:
            level = torch.cat([level, level[..., -1:]], dim=-1)
        level = (level[:, :, ::2, ::2] + level[:, :, 1::2, ::2] + level[:, :, ::2, 1::2] + level[:, :, 1::2, 1::2]) / 4
    torch.testing.assert_close(module(y), y + module.gamma[:, None, None] * total)


def test_multipole_reaches_everything_with_either_sampling():
    for sampling in ("mean", "conv"):
        module = build("multipole", window=3, sampling=sampling)
        y = torch.randn(1, 8, 13, 11).double()
        changed = y.clone()
        changed[:, 0, 0, 0] += 1
        assert ((module(y) - module(changed)).abs().amax((0, 1)) > 0).all()


def test_aspp_is_torchvisions():
    module = build("aspp", rates=(1, 2), start="paper")
    other = torchvision.models.segmentation.deeplabv3.ASPP(8, [1, 2], 8).double().eval()
    other.load_state_dict(module.pyramid.state_dict())
    torch.testing.assert_close(module(x), other(x))


def test_heads_may_change_the_channels():
    assert PyramidPooling(8, 5)(x.float()).shape == (2, 5, 5, 6)
    assert pyramid(8, 5)(x.float()).shape == (2, 5, 5, 6)


@pytest.mark.filterwarnings("ignore")  # NATTEN's own, of the slow path that it has for CPUs
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_natten_is_the_same_attention(kernel):
    pytest.importorskip("natten")
    query, key, value = torch.randn(3, 2, 9, 7, 2, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(by_natten(query, key, value, kernel), by_gathering(query, key, value, kernel))
