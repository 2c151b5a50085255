"""Each module is its paper's formula, in float64, written down here as a loop or as attention behind a mask."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from timm.models.pvt_v2 import Attention as PvtAttention
from timm.models.swin_transformer import SwinTransformerBlock

from ssl_global import attention
from ssl_global.attention.aspp import pyramid
from ssl_global.attention.dyt import DyT, replace_layer_norms
from ssl_global.attention.neighbourhood import by_gathering, by_natten
from ssl_global.attention.non_local import sum_of_rectified
from ssl_global.attention.ppm import PyramidPooling


def build(name, channels=8, **options):
    """With all parameters away from where they begin, in evaluation."""
    torch.manual_seed(0)
    module = attention.build(name, channels, **options).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def reference_attention(query, key, value, mask, scale):
    """(B, N, K), (B, M, K), (B, M, C), bool (N, M): the whole map, masked."""
    logits = (query @ key.transpose(1, 2) * scale).masked_fill(~mask, float("-inf"))
    return logits.softmax(-1) @ value


def flat(x):
    return x.flatten(2).transpose(1, 2)


def as_map(tokens, like):
    return tokens.transpose(1, 2).reshape(like.shape[0], -1, *like.shape[2:])


x = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(7)).double()
EVERYWHERE = torch.ones(30, 30, dtype=torch.bool)


def test_se_is_torchvisions():
    module = build("se", start="paper")
    other = torchvision.ops.SqueezeExcitation(8, 1).double()
    other.load_state_dict(module.se.state_dict())
    torch.testing.assert_close(module(x), other(x))
    assert attention.build("se", 64).se.fc1.out_channels == 4  # 64 / 16, as the paper; timm would take 8


def test_cbam_is_the_paper():
    module = build("cbam", start="paper")
    mlp = lambda pooled: module.cbam.channel.fc2(F.relu(module.cbam.channel.fc1(pooled)))  # noqa: E731
    by_channel = x * torch.sigmoid(mlp(x.mean((2, 3), keepdim=True)) + mlp(x.amax((2, 3), keepdim=True)))
    both = torch.stack([by_channel.mean(1), by_channel.amax(1)], dim=1)
    conv = module.cbam.spatial.conv
    gate = conv.bn(F.conv2d(both, conv.conv.weight, padding=3))
    torch.testing.assert_close(module(x), by_channel * torch.sigmoid(gate))


@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("mode", ["embedded_gaussian", "gaussian", "dot", "concat"])
def test_non_local_is_the_paper(mode, sub_sample):
    module = build("non_local", mode=mode, sub_sample=sub_sample, start="paper")
    asked = F.max_pool2d(x, 2, ceil_mode=True) if sub_sample else x
    value = flat(module.value(asked))
    query, key = (x, asked) if mode == "gaussian" else (module.theta(x), module.phi(asked))
    query, key = flat(query), flat(key)
    logits = query @ key.transpose(1, 2)
    if mode == "concat":
        pairs = torch.cat([query[:, :, None].expand(-1, -1, key.shape[1], -1),
                           key[:, None].expand(-1, query.shape[1], -1, -1)], dim=-1)  # fmt: skip
        weights = F.relu(module.weigh(pairs))[..., 0] / key.shape[1]
    elif mode == "dot":
        weights = logits / key.shape[1]
    else:
        weights = (logits / query.shape[-1] ** 0.5).softmax(-1)
    torch.testing.assert_close(module(x), x + module.norm(module.out(as_map(weights @ value, x))))


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


def test_position_is_masked_attention_without_a_scale():
    module = build("position", reduction=2)
    gathered = reference_attention(
        flat(module.query(x)), flat(module.key(x)), flat(module.value(x)), EVERYWHERE, scale=1.0
    )
    torch.testing.assert_close(module(x), x + module.gamma[:, None, None] * as_map(gathered, x))


@pytest.mark.parametrize("energy", ["official", "paper"])
def test_channel_is_the_formula(energy):
    module = build("channel", energy=energy)
    small = 0.3 * x
    for b in range(2):
        rows = small[b].flatten(1)
        for i in range(8):
            likeness = torch.stack([(rows[i] * rows[j]).sum() for j in range(8)])
            weights = (likeness if energy == "paper" else likeness.max() - likeness).softmax(0)
            gathered = sum(w * row for w, row in zip(weights, rows, strict=True)).view(5, 6)
            torch.testing.assert_close(module(small)[b, i], small[b, i] + module.gamma[i] * gathered)


def test_dual_adds_both_to_x_once():
    module = build("dual")
    of_position, of_channel = (part(x) - x for part in (module.position, module.by_channel))
    torch.testing.assert_close(module(x), x + of_position + of_channel)


@pytest.mark.parametrize("recurrence", [1, 2, 3])
def test_criss_cross_is_masked_attention(recurrence):
    module = build("criss_cross", recurrence=recurrence)
    places = torch.cartesian_prod(torch.arange(5), torch.arange(6))
    mask = (places[:, None] == places[None]).any(-1)  # of a row, or of a column
    y = x
    for _ in range(recurrence):
        gathered = reference_attention(flat(module.query(y)), flat(module.key(y)), flat(module.value(y)), mask, 1.0)
        y = y + module.gamma[:, None, None] * as_map(gathered, y)
    torch.testing.assert_close(module(x), y)


@pytest.mark.parametrize(("recurrence", "reached"), [(1, 10), (2, 30)])
def test_criss_cross_reaches_everything_the_second_time(recurrence, reached):
    module = build("criss_cross", recurrence=recurrence)
    changed = x.clone()
    changed[:, :, 2, 3] += 1
    assert ((module(x) - module(changed))[0].abs().amax(0) > 0).sum() == reached


def test_lka_is_three_convolutions_and_a_product():
    module = build("lka", start="paper")
    seen = F.conv2d(F.pad(x, (2, 2, 2, 2)), module.near.weight, module.near.bias, groups=8)
    seen = F.conv2d(F.pad(seen, (9, 9, 9, 9)), module.far.weight, module.far.bias, dilation=3, groups=8)
    torch.testing.assert_close(module(x), x * F.conv2d(seen, module.point.weight, module.point.bias))
    image = torch.zeros(1, 8, 31, 31).double().requires_grad_()
    module.point(module.far(module.near(image)))[0, :, 15, 15].sum().backward()
    assert (image.grad.abs().sum((0, 1)) > 0).any(0).sum() == 23


def test_global_tokens_write_what_they_read():
    module = build("global_tokens")
    patches, _ = module.mixer(flat(x), module.tokens.expand(2, -1, -1))
    torch.testing.assert_close(module(x), as_map(patches, x))
    changed = x.clone()
    changed[:, 0, 0, 0] += 1  # of one channel: a shift of all would be normalised away
    assert ((module(x) - module(changed))[0].abs().amax(0) > 0).all()


def test_eca_is_a_convolution_over_the_channels():
    module = build("eca", start="paper")
    gates = torch.sigmoid(F.conv1d(x.mean((2, 3))[:, None], module.eca.conv.weight, padding=1))[:, 0]
    torch.testing.assert_close(module(x), x * gates[:, :, None, None])


def test_gca_multiplies_by_what_attention_gathers():
    module = build("gca", start="paper")
    weights = module.context.conv_attn(x).flatten(2).softmax(-1)
    gathered = (x.flatten(2) * weights).sum(-1)[:, :, None, None]
    torch.testing.assert_close(module(x), x * torch.sigmoid(module.context.mlp_scale(gathered)))


def test_coord_gates_rows_and_columns():
    module = build("coord", start="paper").coord
    hidden = lambda pooled: F.hardswish(module.bn1(module.conv1(pooled)))  # noqa: E731
    by_row = torch.sigmoid(module.conv_h(hidden(x.mean(3, keepdim=True))))
    by_col = torch.sigmoid(module.conv_w(hidden(x.mean(2, keepdim=True))))
    torch.testing.assert_close(module(x), x * by_row * by_col)


@pytest.mark.parametrize("extent", [2, 3, None])
def test_gather_excite_is_gates_of_the_regions(extent):
    module = build("gather_excite", extent=extent, ratio=0.5, start="paper")
    rows, cols = (1, 1) if extent is None else (-(-5 // extent), -(-6 // extent))
    gathered = torch.zeros(2, 8, rows, cols).double()
    for r in range(rows):
        for c in range(cols):
            near = (
                [slice(max(0, i * extent - extent + 1), i * extent + extent) for i in (r, c)]
                if extent
                else [slice(None)] * 2
            )
            gathered[:, :, r, c] = x[:, :, near[0], near[1]].mean((2, 3))
    excited = torch.sigmoid(module.excite(gathered))
    for i in range(5):
        for j in range(6):
            region = excited[:, :, i * rows // 5, j * cols // 6]
            torch.testing.assert_close(module(x)[:, :, i, j], x[:, :, i, j] * region)


def heads_apart(module, tokens, heads):
    """Query, key and value of all heads as images of their own: (B * heads, N, C / heads) each."""
    qkv = module.qkv(tokens).unflatten(-1, (3, heads, -1))
    return [part.transpose(1, 2).flatten(0, 1) for part in qkv.unbind(2)]


def heads_together(mixed, heads):
    return mixed.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def test_global_attention_is_the_reference_without_a_mask():
    module = build("global_attention", heads=2)
    query, key, value = heads_apart(module.attention, module.norm(flat(x)), 2)
    mixed = heads_together(reference_attention(query, key, value, EVERYWHERE, 0.5), 2)
    added = as_map(module.attention.proj(mixed), x)
    torch.testing.assert_close(module(x), x + module.gamma[:, None, None] * added)


def test_dilated_sees_fifteen_places():
    module = build("dilated", start="paper")
    image = torch.randn(1, 8, 31, 31).double().requires_grad_()
    module(image)[0, :, 15, 15].sum().backward()
    assert (image.grad.abs().sum((0, 1)) > 0).any(0).sum() <= 15
    linear = module(x + 1) - module(x)
    assert not torch.allclose(module(x + 2) - module(x + 1), linear)  # the source's was linear


@pytest.mark.parametrize("kernel", [1, 3, 5, 9])
def test_neighbourhood_is_attention_behind_a_mask(kernel):
    """The window of a place slides inwards at the edges."""
    module = build("neighbourhood", kernel=kernel, heads=2)

    def near(i, j, length):
        size = min(kernel, length)
        first = min(max(i - size // 2, 0), length - size)
        return first <= j < first + size

    places = [(r, c) for r in range(5) for c in range(6)]
    mask = torch.tensor([[near(a[0], b[0], 5) and near(a[1], b[1], 6) for b in places] for a in places])
    assert (mask.sum(1) == min(kernel, 5) * min(kernel, 6)).all()
    query, key, value = heads_apart(module, module.norm(flat(x)), 2)
    mixed = heads_together(reference_attention(query, key, value, mask, 0.5), 2)
    torch.testing.assert_close(module(x), x + module.gamma[:, None, None] * as_map(module.out(mixed), x))


@pytest.mark.filterwarnings("ignore")  # NATTEN's own, of the slow path that it has for CPUs
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_natten_is_the_same_attention(kernel):
    pytest.importorskip("natten")
    query, key, value = torch.randn(3, 2, 9, 7, 2, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(by_natten(query, key, value, kernel), by_gathering(query, key, value, kernel))


@pytest.mark.parametrize(("window", "stride"), [(3, 3), (3, 1), (4, 3), (7, 5), (2, 2)])
def test_local_is_the_mean_of_masked_attentions(window, stride):
    module = build("local", window=window, stride=stride, heads=2)
    query, key, value = heads_apart(module, module.norm(flat(x)), 2)
    places = torch.cartesian_prod(torch.arange(5), torch.arange(6))
    total, count = torch.zeros(2, 30, 8).double(), torch.zeros(30)
    for top in range(0, 5, stride):
        for left in range(0, 6, stride):
            inside = ((places >= torch.tensor([top, left])) & (places < torch.tensor([top, left]) + window)).all(1)
            if (top and top + window - stride >= 5) or (left and left + window - stride >= 6):
                continue  # the window before reaches the edge already
            mixed = reference_attention(query, key, value, inside[None].expand(30, -1), 0.5)
            total += torch.where(inside[:, None], module.out(heads_together(mixed, 2)), 0)
            count += inside
    assert (count > 0).all()
    want = x + module.gamma[:, None, None] * as_map(total / count[:, None], x)
    torch.testing.assert_close(module(x), want)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ema_msa_is_the_paper(groups):
    module = build("ema_msa", groups=groups, start="paper")
    width = 8 // groups
    for b in range(2):
        for g in range(groups):
            part = x[b, g * width : (g + 1) * width]  # (c, H, W)
            rows, cols = (module.along(part.mean(axis)[None, :, :, None])[0, :, :, 0].sigmoid() for axis in (2, 1))
            gated = part * rows[:, :, None] * cols[:, None, :]
            mean, var = gated.mean((1, 2), keepdim=True), gated.var((1, 2), keepdim=True, correction=0)
            first = (gated - mean) / (var + 1e-5).sqrt() * module.norm.weight[:, None, None] + module.norm.bias[
                :, None, None
            ]
            second = module.around(part[None])[0]
            gates = torch.zeros(5, 6).double()
            for one, other in ((first, second), (second, first)):
                for weight, channel in zip(one.mean((1, 2)).softmax(0), other, strict=True):
                    gates += weight * channel
            torch.testing.assert_close(module(x)[b, g * width : (g + 1) * width], part * gates.sigmoid())


def test_mlka_is_three_kernels_each_with_its_gate():
    module = build("mlka", channels=6)
    y = x[:, :6]
    normal = F.layer_norm(y.permute(0, 2, 3, 1), (6,), module.norm.weight, module.norm.bias).permute(0, 3, 1, 2)
    attended, passed = module.first(normal)[:, :6], module.first(normal)[:, 6:]
    parts = []
    for i, (near, far, steps) in enumerate([(3, 5, 2), (5, 7, 3), (7, 9, 4)]):
        part, (one, two, three) = attended[:, 2 * i : 2 * i + 2], module.large[i]
        large = F.conv2d(part, one.weight, one.bias, padding=near // 2, groups=2)
        large = F.conv2d(large, two.weight, two.bias, padding=steps * (far // 2), dilation=steps, groups=2)
        gate = F.conv2d(part, module.gates[i].weight, module.gates[i].bias, padding=near // 2, groups=2)
        parts.append(F.conv2d(large, three.weight, three.bias) * gate)
    want = y + module.gamma[:, None, None] * module.last(passed * torch.cat(parts, 1))
    torch.testing.assert_close(module(y), want)


def test_large_kernel_is_the_sum_of_two_and_merges_into_one():
    module = build("large_kernel", kernel=13, start="paper")
    sides = {"large": module.conv.large_conv, "small": module.conv.small_conv}
    want = sum(
        part.bn(F.conv2d(x, part.conv.weight, padding=part.conv.kernel_size[0] // 2, groups=8))
        for part in sides.values()
    )
    torch.testing.assert_close(module(x), want)
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


@pytest.mark.parametrize("groups", [(2,), (1, 2, 4)])
def test_emax_is_each_images_own_mixture(groups):
    module = build("emax", groups=groups, start="paper")
    shares = module.choose(x.mean((2, 3))).softmax(-1)
    for b in range(2):
        want = sum(share * one(x[b : b + 1]) for share, one in zip(shares[b], module.candidates, strict=True))
        torch.testing.assert_close(module(x)[b : b + 1], want)
    if len(groups) == 1:
        assert torch.equal(module(x), module.candidates[0](x))


@pytest.mark.parametrize("stripe", [1, 2, 4, 9])
def test_cross_shaped_windows_are_attention_behind_masks(stripe):
    module = build("cross_shaped_window", stripe=stripe, heads=4)
    qkv = module.qkv(module.norm(x.permute(0, 2, 3, 1)))  # (B, H, W, 3 C)
    query, key, value = qkv.chunk(3, dim=-1)
    halves = []
    places = torch.cartesian_prod(torch.arange(5), torch.arange(6))
    for axis, part in ((0, slice(0, 4)), (1, slice(4, 8))):
        band = places[:, axis] // stripe
        heads = [t[..., part].flatten(1, 2).unflatten(-1, (2, -1)).transpose(1, 2).flatten(0, 1)
                 for t in (query, key, value)]  # fmt: skip
        mixed = heads_together(reference_attention(*heads, band[:, None] == band[None], 2**-0.5), 2)
        of_positions = torch.zeros(2, 4, 5, 6).double()
        values = value[..., part].permute(0, 3, 1, 2)
        for first in range(0, (5, 6)[axis], stripe):  # the convolution does not look over a band's edge
            cut = [slice(None)] * 4
            cut[2 + axis] = slice(first, first + stripe)
            of_positions[tuple(cut)] = module.positions[axis](values[tuple(cut)])
        halves.append(mixed + flat(of_positions))
    want = x + module.gamma[:, None, None] * as_map(module.out(torch.cat(halves, -1)), x)
    torch.testing.assert_close(module(x), want)


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
    heads = [part.unflatten(-1, (2, -1)).transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
    mixed = heads_together(reference_attention(*heads, torch.ones(30, 9, dtype=torch.bool), 0.5), 2)
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


def test_ppm_is_the_paper():
    module = build("ppm", bins=(1, 3), start="paper").pyramid
    parts = [x]
    for bins, layer in zip((1, 3), module.pooled, strict=True):
        pooled = torch.zeros(2, 8, bins, bins).double()
        for r in range(bins):
            for c in range(bins):
                rows = slice(r * 5 // bins, -(-(r + 1) * 5 // bins))
                cols = slice(c * 6 // bins, -(-(c + 1) * 6 // bins))
                pooled[:, :, r, c] = x[:, :, rows, cols].mean((2, 3))
        small = F.relu(layer[1](F.conv2d(pooled, layer[0].weight)))
        parts.append(F.interpolate(small, size=(5, 6), mode="bilinear", align_corners=True))
    want = F.relu(module.join[1](F.conv2d(torch.cat(parts, 1), module.join[0].weight, padding=1)))
    torch.testing.assert_close(module(x), want)


def test_aspp_is_torchvisions():
    module = build("aspp", rates=(1, 2), start="paper")
    other = torchvision.models.segmentation.deeplabv3.ASPP(8, [1, 2], 8).double().eval()
    other.load_state_dict(module.pyramid.state_dict())
    torch.testing.assert_close(module(x), other(x))


def test_heads_may_change_the_channels():
    assert PyramidPooling(8, 5)(x.float()).shape == (2, 5, 5, 6)
    assert pyramid(8, 5)(x.float()).shape == (2, 5, 5, 6)


def test_acmix_is_the_paper_place_by_place():
    module = build("acmix", kernel=3, heads=2, start="paper")
    with torch.no_grad():  # as it begins: each map read at its own place around
        module.move.weight.copy_(torch.eye(9).view(9, 3, 3).expand(8, -1, -1, -1))
        module.move.bias.zero_()
    query, key, value = (part.unflatten(1, (2, 4)) for part in module.qkv(x).chunk(3, dim=1))  # (B, 2, 4, H, W)
    rows, cols = torch.linspace(-1, 1, 5).double(), torch.linspace(-1, 1, 6).double()
    at = lambda i, j: module.position(torch.stack([cols[j], rows[i]])[None, :, None, None])[0, :, 0, 0]  # noqa: E731
    maps = torch.einsum("nh,bhcyx->bncyx", module.maps.weight[:, :, 0, 0], torch.cat([query, key, value], 1))
    around = [(u, v) for u in (-1, 0, 1) for v in (-1, 0, 1)]
    want = torch.zeros(2, 8, 5, 6).double()
    for b in range(2):
        for i in range(5):
            for j in range(6):
                inside = [(min(max(i + u, 0), 4), min(max(j + v, 0), 5)) for u, v in around]
                for h in range(2):
                    logits = torch.stack(
                        [
                            (query[b, h, :, i, j] * (key[b, h, :, r, c] + at(i, j) - at(r, c))).sum() / 2
                            for r, c in inside
                        ]
                    )
                    parts = zip(logits.softmax(0), inside, strict=True)
                    want[b, 4 * h : 4 * h + 4, i, j] += module.rates[0] * sum(
                        w * value[b, h, :, r, c] for w, (r, c) in parts
                    )
                moved = sum(
                    maps[b, n, :, i + u, j + v]
                    for n, (u, v) in enumerate(around) if 0 <= i + u < 5 and 0 <= j + v < 6
                )  # fmt: skip
                want[b, :, i, j] += module.rates[1] * moved.repeat_interleave(2)  # C / 4 outputs of each of 4 groups
    torch.testing.assert_close(module(x), want)
