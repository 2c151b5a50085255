"""Read and write are their docstring's loop; a gate at 0 leaves the patches bitwise as they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_global.attention.global_tokens import GlobalTokens


def build(**changes):
    torch.manual_seed(0)
    module = GlobalTokens(16, **({"bottleneck": 8, "heads": 2, "gate": 0.5} | changes))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def slow_attention(query, key, value, heads):
    """One image: for each head and each query the sum over keys, in float64."""
    out = torch.zeros_like(query)
    size = query.shape[-1] // heads
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for m in range(len(query)):
            weights = torch.stack([(query[m, part] * key[n, part]).sum() / size**0.5 for n in range(len(key))]).softmax(
                0
            )
            out[m, part] = sum(w * v for w, v in zip(weights, value[:, part], strict=True))
    return out


@given(num_patches=st.integers(1, 12), num_tokens=st.integers(1, 5), heads=st.sampled_from([1, 2, 4]))
def test_it_is_the_slow_loop(num_patches, num_tokens, heads):
    module = build(heads=heads).double()
    patches, tokens = torch.randn(2, num_patches, 16).double(), torch.randn(2, num_tokens, 16).double()
    got_patches, got_tokens = module(patches, tokens)
    k = 8
    for b in range(2):
        normal = module.norm_patches(patches[b])
        of_patches = normal @ module.of_patches.weight.T + module.of_patches.bias
        query = module.read_query(module.norm_tokens(tokens[b]))
        read = slow_attention(query, of_patches[:, :k], of_patches[:, k : 2 * k], heads)
        want_tokens = tokens[b] + module.read_out(read)
        of_tokens = module.of_tokens(module.norm_read(want_tokens))
        written = slow_attention(of_patches[:, 2 * k :], of_tokens[:, :k], of_tokens[:, k:], heads)
        want_patches = patches[b] + module.gate * module.write_out(written)
        torch.testing.assert_close(got_tokens[b], want_tokens)
        torch.testing.assert_close(got_patches[b], want_patches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_closed_gate_changes_no_patch(dtype):
    module = build().to(dtype)
    torch.nn.init.zeros_(module.gate)
    patches, tokens = torch.randn(2, 30, 16, dtype=dtype), torch.randn(2, 3, 16, dtype=dtype)
    same, changed = module(patches, tokens)
    assert torch.equal(same, patches)
    assert not torch.equal(changed, tokens)


def test_without_a_write_the_patches_pass_by():
    module = build(writes=False)
    patches, tokens = torch.randn(2, 30, 16), torch.randn(2, 3, 16)
    same, _ = module(patches, tokens)
    assert same is patches
    assert not any("write" in name or "gate" in name for name, _ in module.named_parameters())


def test_every_parameter_gets_a_gradient():
    module = build()
    patches, tokens = module(torch.randn(2, 9, 16), torch.randn(2, 3, 16))
    (patches.square().sum() + tokens.square().sum()).backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 heads do not divide a bottleneck of 8"):
        build(heads=3)
