"""Attention: every kernel against equation 1 in double precision, and the choice between kernels."""

import sys
from types import SimpleNamespace

import pytest
import torch

from ldm3d.errors import InputError
from ldm3d.models import attention as module
from ldm3d.models.attention import Attention, attention, choose_backend, xformers_works

CPU = torch.device("cpu")
SHAPES = {  # N, H, Q, K, D
    "self": (2, 3, 12, 12, 8),
    "few keys": (2, 2, 50, 3, 16),
    "one key": (1, 2, 7, 1, 8),
    "more keys than queries": (2, 1, 3, 41, 4),
    "one query, odd head": (3, 2, 1, 9, 5),
    "many keys": (1, 1, 4, 300, 8),
}


def reference(q, k, v):
    """softmax(q k^T / sqrt(D)) v in float64, a query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for i in range(q.shape[2]):
        scores = (q[:, :, i, None] * k).sum(dim=-1) / q.shape[-1] ** 0.5  # (N, H, K)
        weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        out[:, :, i] = (weights[..., None] * v).sum(dim=2)
    return out


def example(shape, dtype=torch.float32, requires_grad=True):
    n, h, queries, keys, d = shape
    g = torch.Generator().manual_seed(queries + keys)
    sizes = [(n, h, queries, d), (n, h, keys, d), (n, h, keys, d)]
    return [torch.randn(size, generator=g).to(dtype).requires_grad_(requires_grad) for size in sizes]


def skip_without_kernel(backend, dtype):
    if backend == "xformers" and not xformers_works(CPU, dtype, 8):
        pytest.skip("xformers has no such kernel here")


@pytest.mark.parametrize("backend", module.BACKENDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-14), (torch.bfloat16, 0.03)])
def test_backends_agree_with_the_equation(backend, dtype, tolerance):
    skip_without_kernel(backend, dtype)
    for name, shape in SHAPES.items():
        q, k, v = example(shape, dtype)
        out = attention(q, k, v, backend)
        expected = reference(q.detach(), k.detach(), v.detach())
        assert out.dtype == dtype
        torch.testing.assert_close(
            out.double(), expected, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("backend", module.BACKENDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_gradients_agree_with_the_equation(backend, dtype, tolerance):
    skip_without_kernel(backend, dtype)
    for shape in SHAPES.values():
        q, k, v = example(shape, dtype)
        weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        got = torch.autograd.grad((attention(q, k, v, backend) * weight).sum(), (q, k, v))
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        expected = torch.autograd.grad((reference(*exact) * weight).sum(), exact)
        for mine, theirs in zip(got, expected):
            scale = max(1, theirs.abs().max().item())
            torch.testing.assert_close(mine.double(), theirs, atol=tolerance * scale, rtol=tolerance)


def test_one_key_is_its_value():
    """Weights sum to 1: with one key every query gets that value, whatever it asks."""
    q, k, v = example((2, 2, 5, 1, 4), requires_grad=False)
    for backend in ("sdpa", "math"):
        torch.testing.assert_close(attention(q, k, v, backend), v.expand_as(q))


# Which backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_auto_never_fails_on_a_cpu(dtype, requires_grad):
    for shape in SHAPES.values():
        out = attention(*example(shape, dtype, requires_grad))
        assert out.isfinite().all()
        assert out.requires_grad == requires_grad


def test_xformers_where_it_has_no_kernel():
    """Asked for by name it must not be replaced in silence."""
    if xformers_works(CPU, torch.float32, 8):
        pytest.skip("this build of xformers has a kernel for CPUs")
    with pytest.raises(InputError, match=r"xformers .*use .*auto or sdpa"):
        attention(*example((1, 2, 4, 4, 8)), backend="xformers")


def test_xformers_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)  # what an import then finds
    xformers_works.cache_clear()
    try:
        with pytest.raises(InputError, match="cannot be imported"):
            attention(*example((1, 2, 4, 4, 8)), backend="xformers")
        assert not xformers_works(CPU, torch.float32, 8)
    finally:
        xformers_works.cache_clear()


def test_unknown_backend():
    with pytest.raises(InputError, match="'flash' is not one of auto, sdpa, xformers, math"):
        attention(*example((1, 1, 2, 2, 4)), backend="flash")


def tensor_like(device, dtype, tokens, head_channels, requires_grad=False):
    """What the choice looks at, for a device that need not be there."""
    shape = (2, 4, tokens, head_channels)
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=shape, requires_grad=requires_grad)


@pytest.mark.parametrize(
    "dtype, keys, requires_grad, chosen",
    [
        (torch.bfloat16, 4, True, "math"),
        (torch.float16, 640, True, "math"),
        (torch.bfloat16, 641, True, "sdpa"),  # Q x K weights in memory no longer pay
        (torch.bfloat16, 4, False, "sdpa"),  # only the backward pass is slow
        (torch.float32, 4, True, "sdpa"),
    ],
)
def test_choice_on_a_cpu(monkeypatch, dtype, keys, requires_grad, chosen):
    monkeypatch.setattr(module, "xformers_works", lambda *_: True)
    q, k = tensor_like("cpu", dtype, 100, 32, requires_grad), tensor_like("cpu", dtype, keys, 32)
    assert choose_backend(q, k) == chosen


@pytest.mark.parametrize(
    "dtype, head_channels, works, chosen",
    [
        (torch.bfloat16, 64, True, "sdpa"),  # FlashAttention
        (torch.float16, 256, True, "sdpa"),
        (torch.bfloat16, 264, True, "xformers"),  # too wide for it
        (torch.bfloat16, 264, False, "sdpa"),
        (torch.float32, 64, True, "xformers"),
        (torch.float32, 64, False, "sdpa"),
    ],
)
def test_choice_on_cuda(monkeypatch, dtype, head_channels, works, chosen):
    asked = []
    monkeypatch.setattr(module, "xformers_works", lambda *about: asked.append(about) or works)
    q, k = (tensor_like("cuda", dtype, tokens, head_channels, True) for tokens in (100, 4))
    assert choose_backend(q, k) == chosen
    assert asked in ([], [(torch.device("cuda"), dtype, head_channels)])
    assert bool(asked) == (dtype == torch.float32 or head_channels > 256)


def test_probe_finds_a_kernel_without_a_backward_pass(monkeypatch):
    """A kernel that only runs forward must not be chosen: training would stop at the first step."""

    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(_, q):
            return q.clone()

        @staticmethod
        def backward(_, __):
            raise NotImplementedError("no operator for the backward pass")

    xformers_works.cache_clear()
    monkeypatch.setattr(module, "_xformers", lambda q, k, v: ForwardOnly.apply(q))
    try:
        assert not xformers_works(CPU, torch.float32, 8)
        with torch.no_grad():  # generation probes as training does
            xformers_works.cache_clear()
            assert not xformers_works(CPU, torch.float32, 8)
    finally:
        xformers_works.cache_clear()


def test_probe_finds_a_kernel_that_works(monkeypatch):
    monkeypatch.setattr(module, "_xformers", lambda q, k, v: q + k + v)
    try:
        for grad in (True, False):
            xformers_works.cache_clear()
            with torch.set_grad_enabled(grad):
                assert xformers_works(CPU, torch.float32, 8)
    finally:
        xformers_works.cache_clear()


# The layer


def randomised(layer):
    g = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=g)
    return layer.double()


def test_layer_splits_channels_into_heads():
    """Against torch's own multi-head attention with the same weights."""
    layer = randomised(Attention(12, head_channels=4, context_channels=10))
    theirs = torch.nn.MultiheadAttention(12, 3, kdim=10, vdim=10, bias=True, batch_first=True).double()
    key, value = layer.key_value.weight.chunk(2)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(layer.query.weight)
        theirs.k_proj_weight.copy_(key)
        theirs.v_proj_weight.copy_(value)
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(layer.out.weight)
        theirs.out_proj.bias.copy_(layer.out.bias)
    x, context = torch.randn(2, 7, 12, dtype=torch.float64), torch.randn(2, 4, 10, dtype=torch.float64)
    torch.testing.assert_close(layer(x, context), theirs(x, context, context, need_weights=False)[0])


def test_self_attention_is_attention_to_oneself():
    layer = randomised(Attention(8, head_channels=4))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer(x, x))


def test_layer_starts_as_nothing():
    assert (Attention(8, head_channels=4)(torch.randn(2, 5, 8)) == 0).all()


def test_heads_must_divide_channels():
    with pytest.raises(InputError, match="48 channels cannot have heads of 32; use a divisor of 48"):
        Attention(48, head_channels=32)
