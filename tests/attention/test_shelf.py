"""Every module is walked: its shape, its identity at the start, its gradients, any size, no image sees another."""

import pytest
import torch

from ssl_global import attention

NAMES = attention.names()
CHANNELS = 32
SIZES = [(8, 8), (7, 5), (1, 1), (1, 9), (2, 3)]


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    return attention.build(name, CHANNELS, **options)


def moved(name, **options):
    """As it is after some training: every parameter away from where it began."""
    module = build(name, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def test_the_walk_finds_the_modules():
    print(f"{len(NAMES)} modules: {', '.join(NAMES)}")
    assert len(NAMES) >= 29
    assert "non_local" in NAMES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_it_begins_as_the_identity(name, training, dtype):
    module = build(name).to(dtype).train(training)
    for size in SIZES:
        x = torch.randn(2, CHANNELS, *size, dtype=dtype)
        assert torch.equal(module(x), x)


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_to_learn_at_the_first_step(name):
    """By its gates, which are all that keeps it an identity."""
    module = build(name)
    module(torch.randn(2, CHANNELS, 6, 6)).square().sum().backward()
    gates = module.gate_parameters()
    assert gates
    assert not any(gate.any() for gate in gates)
    assert any(gate.grad.any() for gate in gates)
    assert {id(gate) for gate in gates} <= {id(p) for p in module.parameters()}


@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_precision(name, start):
    for size in SIZES:
        module = moved(name, start=start).train()
        x = torch.randn(1, CHANNELS, *size, requires_grad=True)
        y = module(x)
        assert y.shape == x.shape
        assert y.isfinite().all()
        y.square().sum().backward()
        assert x.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(2, CHANNELS, 7, 5)).isfinite().all()


@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name, start):
    """But a key's bias, which moves all logits of a query alike: softmax does not see it."""
    module = moved(name, start=start).train()
    module(torch.randn(4, CHANNELS, 8, 8)).square().sum().backward()
    without = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in without if not n.endswith(("key.bias", "phi.bias", "conv_attn.bias"))] == []


@pytest.mark.parametrize("name", NAMES)
def test_images_do_not_see_each_other(name):
    module = moved(name).eval()
    x = torch.randn(2, CHANNELS, 7, 6)
    other = torch.stack([x[0], torch.randn_like(x[1])])
    assert torch.equal(module(x)[0], module(other)[0])
    assert not torch.equal(module(x), x)


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_says_the_same(name):
    module = moved(name).double().eval()
    x = torch.randn(2, CHANNELS, 6, 5).double()
    torch.testing.assert_close(module(x.to(memory_format=torch.channels_last)), module(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of what it compiles
def test_compiled_it_computes_the_same(name):
    """Whole, forward and backward, of one size."""
    module = moved(name).eval()
    x, twin = (torch.randn(2, CHANNELS, 7, 5, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)  # a break is an error
    y, expected = compiled(x.requires_grad_()), module(twin.requires_grad_())
    torch.testing.assert_close(y, expected)
    y.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_come_and_go(name):
    module, twin = moved(name).eval(), build(name, seed=3).eval()
    twin.load_state_dict(module.state_dict())
    x = torch.randn(1, CHANNELS, 4, 4)
    assert torch.equal(module(x), twin(x))


@pytest.mark.parametrize("name", NAMES)
def test_one_channel_is_enough(name):
    if name == "cross_shaped_window":  # half of them each way
        with pytest.raises(ValueError, match="1 channels: an even number"):
            attention.build(name, 1)
        return
    assert attention.build(name, 1)(torch.randn(2, 1, 3, 4)).shape == (2, 1, 3, 4)


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_is_refused(name):
    with pytest.raises(ValueError, match="channels = 0: at least 1"):
        attention.build(name, 0)
    with pytest.raises(ValueError, match="start = 'warm': identity or paper"):
        attention.build(name, 8, start="warm")
    with pytest.raises(ValueError, match=r"no option 'reductoin'; there are .*start"):
        attention.build(name, 8, reductoin=2)


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ValueError, match="attention 'non_locall': there is none; the nearest are non_local"):
        attention.build("non_locall", 8)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("se", {"ratio": 0}, "se: ratio = 0: above 0"),
        ("cbam", {"ratio": 2}, "cbam: ratio = 2: above 0, at most 1"),
        ("cbam", {"kernel_size": 4}, "cbam: kernel_size = 4: an odd number"),
        ("non_local", {"mode": "cosine"}, "non_local: mode = 'cosine': one of embedded_gaussian"),
        ("non_local", {"inner": 0}, "non_local: inner = 0: at least 1"),
        ("position", {"reduction": 0}, "position: reduction = 0"),
        ("channel", {"energy": "mine"}, "channel: energy = 'mine': official or paper"),
        ("criss_cross", {"recurrence": 0}, "criss_cross: recurrence = 0"),
        ("criss_cross", {"reduction": 0}, "criss_cross: reduction = 0"),
        ("lka", {"kernel": (4, 7)}, r"lka: kernel = \(4, 7\): two odd numbers"),
        ("lka", {"dilation": 0}, "lka: dilation = 0"),
        ("global_tokens", {"tokens": 0}, "global_tokens: tokens = 0"),
        ("gca", {"ratio": 0}, "gca: ratio = 0"),
        ("coord", {"ratio": 0}, "coord: ratio = 0"),
        ("gather_excite", {"extent": 1}, "gather_excite: extent = 1: at least 2"),
        ("gather_excite", {"ratio": 0}, "gather_excite: ratio = 0"),
        ("global_attention", {"heads": 3}, "global_attention: heads = 3: does not divide 8"),
        ("dilated", {"dilations": ()}, r"dilated: dilations = \(\): at least one"),
        ("neighbourhood", {"kernel": 4}, "neighbourhood: kernel = 4: an odd number"),
        ("neighbourhood", {"heads": 3}, "neighbourhood: heads = 3: does not divide 8"),
        ("local", {"window": 0}, "local: window = 0"),
        ("deformable", {"stride": 0}, "deformable: stride = 0"),
        ("deformable", {"groups": 3}, "deformable: groups = 3: does not divide 8"),
        ("deformable", {"reach": 0}, "deformable: reach = 0: above 0"),
        ("deformable", {"heads": 3}, "deformable: heads = 3: does not divide 8"),
        ("shifted_window", {"window": 0}, "shifted_window: window = 0"),
        ("shifted_window", {"heads": 3}, "shifted_window: heads = 3: does not divide 8"),
        ("multipole", {"weights": "mine"}, "multipole: weights = 'mine': code or uniform"),
        ("multipole", {"sampling": "max"}, "multipole: sampling = 'max': mean or conv"),
        ("multipole", {"window": 1}, "multipole: window = 1: at least 2"),
        ("ppm", {"bins": ()}, r"ppm: bins = \(\): at least one"),
        ("aspp", {"rates": (0,)}, r"aspp: rates = \(0,\): at least one"),
        ("acmix", {"kernel": 2}, "acmix: kernel = 2: an odd number"),
        ("acmix", {"heads": 3}, "acmix: heads = 3: does not divide 8"),
        ("emax", {"groups": (3,)}, r"emax: groups = \(3,\): each must divide 8"),
        ("cross_shaped_window", {"stripe": 0}, "cross_shaped_window: stripe = 0"),
        ("cross_shaped_window", {"heads": 3}, "cross_shaped_window: heads = 3: an even number"),
        ("ema_msa", {"groups": 3}, "ema_msa: groups = 3: does not divide 8"),
        ("large_kernel", {"kernel": 3}, "large_kernel: kernel = 3, small_kernel = 5: odd, the small one within"),
        ("spatial_reduction", {"reduction": 0}, "spatial_reduction: reduction = 0"),
        ("spatial_reduction", {"heads": 3}, "spatial_reduction: heads = 3: does not divide 8"),
        ("local", {"stride": 8}, "local: stride = 8: 1 to the window, 7"),
        ("local", {"heads": 3}, "local: heads = 3: does not divide 8"),
    ],
    ids=str,
)
def test_options_that_cannot_be(name, options, message):
    with pytest.raises(ValueError, match=message):
        attention.build(name, 8, **options)
