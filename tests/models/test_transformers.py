"""The own vision transformers compute what their papers say: against loops and other libraries."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_forward import Read

from ekd_ray.models import build_model
from ekd_ray.models.t2t import TokenPerformer, sinusoid_table


def norm(state, name, x, eps=1e-5):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def mlp(state, x, first, second):
    x = linear(state, first, x)
    return linear(state, second, x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))


def attention(query, key, value, heads):
    """One head after the other, softmax of scaled products."""
    parts = []
    for q, k, v in zip(*(x.chunk(heads, -1) for x in (query, key, value)), strict=True):
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, -1)


def tokens_of(grid):
    return torch.stack([grid[:, :, y, x] for y in range(grid.shape[2]) for x in
                        range(grid.shape[3])], 1)  # fmt: skip


def grid_of(tokens):
    side = math.isqrt(tokens.shape[1])
    rows = [torch.stack([tokens[:, y * side + x] for x in range(side)], -1) for y in range(side)]
    return torch.stack(rows, -2)


def patches(state, name, grid, size):
    """A convolution whose stride is its kernel, as one product per patch."""
    tokens = [
        grid[:, :, y : y + size, x : x + size].flatten(1)
        for y in range(0, grid.shape[2], size)
        for x in range(0, grid.shape[3], size)
    ]
    weight = state[f"{name}.weight"].flatten(1)
    return torch.stack(tokens, 1) @ weight.T + state[f"{name}.bias"]


def reference_pvt(state, x):
    for stage, (patch, heads, reduction) in enumerate(
        zip((4, 2, 2, 2), (1, 2, 5, 8), (8, 4, 2, 1), strict=True), 1
    ):
        x = patches(state, f"patch_embed{stage}.proj", x, patch)
        x = norm(state, f"patch_embed{stage}.norm", x)
        if stage == 4:
            x = torch.cat([state["cls_token"].expand(len(x), 1, 512), x], 1)
        x = x + state[f"pos_embed{stage}"]
        for block in (0, 1):
            name = f"block{stage}.{block}"
            inner = norm(state, f"{name}.norm1", x, 1e-6)
            reduced = inner
            if reduction > 1:
                reduced = patches(state, f"{name}.attn.sr", grid_of(inner), reduction)
                reduced = norm(state, f"{name}.attn.norm", reduced)
            both = linear(state, f"{name}.attn.kv", reduced)
            width = x.shape[-1]
            key, value = both[..., :width], both[..., width:]
            out = attention(linear(state, f"{name}.attn.q", inner), key, value, heads)
            x = x + linear(state, f"{name}.attn.proj", out)
            inner = norm(state, f"{name}.norm2", x, 1e-6)
            x = x + mlp(state, inner, f"{name}.mlp.fc1", f"{name}.mlp.fc2")
        x = grid_of(x) if stage < 4 else x
    return linear(state, "head", norm(state, "norm", x[:, 0], 1e-6))


def soft_split(grid, kernel, stride, padding):
    grid = F.pad(grid, (padding,) * 4)
    rows = range(0, grid.shape[2] - kernel + 1, stride)
    columns = range(0, grid.shape[3] - kernel + 1, stride)
    parts = [grid[:, :, y : y + kernel, x : x + kernel].flatten(1) for y in rows for x in columns]
    return torch.stack(parts, 1)


def performer(state, name, x):
    def features(x):
        w = state[f"{name}.w"]
        return (x @ w.T - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(w))

    key, query, value = linear(state, f"{name}.kqv", norm(state, f"{name}.norm1", x)).chunk(3, -1)
    # Quadratic, as attention is defined: the code under test never has the N x N weights.
    weights = features(query) @ features(key).transpose(1, 2)
    out = weights @ value / (weights.sum(-1, keepdim=True) + 1e-8)
    x = value + linear(state, f"{name}.proj", out)
    return x + mlp(state, norm(state, f"{name}.norm2", x), f"{name}.mlp.0", f"{name}.mlp.2")


def reference_t2t(state, x):
    x = performer(state, "tokens_to_token.attention1", soft_split(x, 7, 4, 2))
    x = performer(state, "tokens_to_token.attention2", soft_split(grid_of(x), 3, 2, 1))
    x = linear(state, "tokens_to_token.project", soft_split(grid_of(x), 3, 2, 1))
    x = torch.cat([state["cls_token"].expand(len(x), 1, 256), x], 1) + state["pos_embed"]
    for block in range(7):
        name = f"blocks.{block}"
        qkv = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", x))
        x = x + linear(state, f"{name}.attn.proj", attention(*qkv.chunk(3, -1), 4))
        inner = norm(state, f"{name}.norm2", x)
        x = x + mlp(state, inner, f"{name}.mlp.fc1", f"{name}.mlp.fc2")
    return linear(state, "head", norm(state, "norm", x[:, 0]))


def livelier(model):
    """Wider weights and biases: fresh ones are so small that attention is a plain mean."""
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.double().eval()


@pytest.mark.parametrize(
    ("name", "reference"), [("PVT_Ti", reference_pvt), ("T2T_ViT_7", reference_t2t)]
)
def test_forward_is_the_paper_arithmetic(name, reference):
    torch.manual_seed(1)
    model = livelier(build_model(name, 10))
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        state = Read(model.state_dict())
        expected = reference(state, images)
        torch.testing.assert_close(model(images), expected, rtol=1e-7, atol=1e-7)
    assert state.unread() == set(), "names are the published ones, all of them"


def test_performer_features_approximate_softmax_attention():
    """Many Gaussian features: E[phi(q) phi(k)] = exp(q k) (Choromanski et al. 2021, lemma 1)."""
    torch.manual_seed(3)
    layer = TokenPerformer(6, 4).double()
    layer.features = 200_000
    layer.w = torch.randn(layer.features, 4, dtype=torch.float64)
    query, key = torch.randn(2, 1, 5, 4, dtype=torch.float64) / 2
    query_features, key_features = layer._phi(query), layer._phi(key)
    weights = query_features @ key_features.transpose(1, 2)
    expected = (query @ key.transpose(1, 2)).softmax(-1)
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), expected, rtol=0, atol=0.02)


def test_performer_rows_are_orthogonal_buffers():
    torch.manual_seed(4)
    layer = TokenPerformer(6, 64)
    torch.testing.assert_close(layer.w @ layer.w.T, 32 * torch.eye(32), rtol=0, atol=1e-3)
    assert "w" in layer.state_dict()
    assert all(key != "w" for key, _ in layer.named_parameters())


def test_performer_stays_precise_under_autocast():
    """Products and exponentials of the features are float32: bfloat16 would be percents off."""
    torch.manual_seed(5)
    layer, calls = TokenPerformer(6, 64), []
    original = layer._phi

    def recorded(part):
        calls.append((part, original(part)))
        return calls[-1][1]

    layer._phi = recorded
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(2, 50, 6))
    assert len(calls) == 2
    for part, features in calls:
        assert features.dtype == torch.float32
        torch.testing.assert_close(features, original(part.double()).float(), rtol=1e-4, atol=0)


def test_performer_survives_extreme_inputs():
    layer = TokenPerformer(6, 64)
    x = (1e4 * torch.randn(1, 9, 6)).requires_grad_()
    with torch.no_grad():
        layer.kqv.weight.mul_(1e3)  # all features underflow to zero
    out = layer(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


def test_sinusoid_table_is_the_formula():
    table = sinusoid_table(197, 256)
    assert (table.shape, table.dtype) == ((1, 197, 256), torch.float32)
    for position in (0, 1, 7, 196):
        for column in range(256):
            angle = position / 10000 ** (2 * (column // 2) / 256)
            wanted = math.cos(angle) if column % 2 else math.sin(angle)
            assert table[0, position, column].item() == pytest.approx(wanted, abs=1e-6)


def test_initial_weights_are_truncated_normal():
    for name in ("PVT_Ti", "T2T_ViT_7"):
        torch.manual_seed(6)
        model = build_model(name, 10)
        for key, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                assert module.weight.abs().max() <= 2
                if module.weight.numel() > 10_000:
                    assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), key
                assert module.bias is None or not module.bias.any(), key
        assert 0.01 < model.cls_token.std().item() < 0.03
