"""Attention on the packed projection against fp64, and against the published layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rae.kernels import attention as op
from rae.kernels.attention import _attention, attention, attention_ref, launch, launch_rope
from rae.models.layers import Attention, RotaryEmbedding

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ROTATED = pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "plain"])
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
# The relative error that the order of fp32 sums makes; TF32 would make 3e-4.
EXACT = 1e-6
# Batch, tokens, heads, head_dim: the published heads, one token, blocks that end before they are
# full, and heads below and between the sizes of a product.
SHAPES = [
    (1, 256, 1, 64),
    (1, 255, 1, 64),
    (1, 256, 1, 72),
    (1, 257, 1, 72),
    (1, 257, 1, 128),
    (2, 1, 2, 72),
    (1, 1, 1, 64),
    (2, 16, 2, 12),
    (1, 16, 2, 24),
    (2, 20, 1, 8),
]


def draw(shape: tuple[int, int, int, int], dtype: torch.dtype, std: float = 1.0) -> Tensor:
    batch, tokens, heads, head_dim = shape
    return (std * torch.randn(batch, tokens, 3 * heads * head_dim)).to(dtype)


def tables(tokens: int, head_dim: int, *, rotated: bool = True) -> tuple[Tensor | None, ...]:
    """Of the smallest grid that has the tokens."""
    if not rotated:
        return None, None
    if head_dim % 4:
        angles = (6 * torch.rand(tokens, head_dim // 2)).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()
    rope = RotaryEmbedding(head_dim, grid=1 + int((tokens - 1) ** 0.5))
    return rope.freqs_cos[:tokens].contiguous(), rope.freqs_sin[:tokens].contiguous()


def heads_of(qkv: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None) -> list[Tensor]:
    """q, k, v (B, heads, N, d) as layers.py makes them: turned in fp32 or wider, then rounded."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if cos is None or sin is None:
        return [q, k, v]
    turned = []
    for x in (q, k):
        pairs = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
        turned.append((x * cos + pairs * sin).to(v.dtype))
    return [*turned, v]


def chain(qkv: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """The eager layer's, in the tensors' own dtype: RoPE, a cast, then PyTorch's attention."""
    q, k, v = heads_of(qkv, heads, cos, sin)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def exact(qkv: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """In fp64, nothing rounded."""
    q, k, v = heads_of(qkv.double(), heads, cos, sin)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def error(output: Tensor, truth: Tensor) -> float:
    assert output.shape == truth.shape
    return float((output.double() - truth).norm() / truth.norm())


@DTYPES
@ROTATED
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_the_eager_chain(
    shape: tuple[int, int, int, int], rotated: bool, dtype: torch.dtype
) -> None:
    qkv, heads = draw(shape, dtype), shape[2]
    cos, sin = tables(shape[1], shape[3], rotated=rotated)
    truth = exact(qkv, heads, cos, sin)
    eager = error(chain(qkv, heads, cos, sin), truth)
    for kernels in ("triton", "library", "reference"):
        out = attention(qkv, heads, cos, sin, kernels=kernels)
        assert out.dtype == dtype and out.is_contiguous()
        # In fp32 the order of a sum decides; it is far below bf16's error.
        assert error(out, truth) <= max(1.05 * eager, EXACT), kernels


@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (32, 32), (64, 16), (128, 32)], ids=str)
@pytest.mark.parametrize("tokens", [15, 70])
def test_every_tile_ends_where_the_tokens_do(tokens: int, blocks: tuple[int, int]) -> None:
    qkv, (cos, sin) = draw((1, tokens, 1, 24), torch.float32), tables(tokens, 24)
    block_m, block_n = blocks
    out = launch(
        qkv, 1, cos, sin, block_m=block_m, block_n=block_n, num_warps=4, num_stages=1, maxnreg=128
    )
    assert error(out, exact(qkv, 1, cos, sin)) < EXACT


@pytest.mark.parametrize("kernels", ["triton", "library", "reference"])
def test_the_projection_is_read_where_it_lies(kernels: str) -> None:
    qkv, (cos, sin) = draw((2, 20, 2, 24), torch.bfloat16), tables(20, 24)
    wide = torch.full((20, 3, 200), float("nan"), dtype=torch.bfloat16)
    view = wide.transpose(0, 1)[::2, :, 16:160]
    view.copy_(qkv)
    out = attention(view, 2, cos, sin, kernels=kernels)
    assert out.equal(attention(qkv, 2, cos, sin, kernels=kernels)) and out.is_contiguous()


@DTYPES
@pytest.mark.parametrize("tokens", [17, 70])
def test_large_logits(tokens: int, dtype: torch.dtype) -> None:
    qkv = draw((1, tokens, 1, 72), dtype, std=8**0.5)  # scores of std 8
    cos, sin = tables(tokens, 72)
    truth = exact(qkv, 1, cos, sin)
    eager = error(chain(qkv, 1, cos, sin), truth)
    out = attention(qkv, 1, cos, sin, kernels="triton")
    assert error(out, truth) <= max(1.05 * eager, 2e-6)
    # One key takes all the weight, at logits that exp alone would overflow.
    qkv = (100 * F.one_hot(torch.arange(tokens), 72).to(dtype)).repeat(1, 1, 3)
    out = attention(qkv, 1, None, None, kernels="triton")
    # A fused multiply-add on a GPU: the weight is 2 to the power of a product's rounding.
    torch.testing.assert_close(out, qkv[..., :72], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernels", ["auto", "triton", "library", "reference"])
@pytest.mark.parametrize("use_qknorm", [False, True], ids=["plain", "qk-norm"])
def test_is_the_layers_attention(use_qknorm: bool, kernels: str) -> None:
    layer = Attention(48, 2, use_qknorm, use_rmsnorm=True)
    rope, x = RotaryEmbedding(24, grid=4), torch.randn(2, 16, 48)
    qkv = layer.qkv(x)
    if use_qknorm:
        q, k, v = qkv.unflatten(-1, (3, 2, 24)).unbind(2)
        qkv = torch.stack([layer.q_norm(q), layer.k_norm(k), v], dim=2).flatten(2)
    out = layer.proj(attention(qkv, 2, rope.freqs_cos, rope.freqs_sin, kernels=kernels))
    torch.testing.assert_close(out, layer(x, rope), rtol=0, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 72, 128, 12])
def test_rope_kernel_is_the_embedding(head_dim: int, dtype: torch.dtype) -> None:
    rope = RotaryEmbedding(head_dim, grid=2)
    qkv = draw((2, 8, 3, head_dim), dtype)[:, ::2].unflatten(-1, (3, 3, head_dim))
    out = launch_rope(qkv, rope.freqs_cos, rope.freqs_sin)
    assert out.shape == (2, 4, 2, 3, head_dim) and out.dtype == dtype
    truth = rope(qkv[:, :, :2].permute(2, 0, 3, 1, 4).double())
    bound = 1e-7 if dtype == torch.float32 else 2e-3
    assert error(out.permute(2, 0, 3, 1, 4), truth) < bound


def test_reference_is_exact() -> None:
    qkv, (cos, sin) = draw((2, 20, 2, 24), torch.float64), tables(20, 24)
    assert error(attention_ref(qkv, 2, cos, sin), exact(qkv, 2, cos, sin)) < 1e-14


def test_flash_attn_takes_token_major_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()

    qkv, (cos, sin) = draw((2, 20, 2, 24), torch.float32), tables(20, 24)
    package = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    out = attention(qkv, 2, cos, sin, kernels="flash-attn")
    assert error(out, exact(qkv, 2, cos, sin)) < EXACT
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match=r"pip install 'rae-server\[flash-attn\]'"):
        attention(qkv, 2, cos, sin, kernels="flash-attn")


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_a_backend_that_refuses_is_named(name: str) -> None:
    """Neither takes fp32, on any device."""
    qkv = draw((1, 16, 1, 64), torch.float32)
    with pytest.raises(ValueError, match=f"'{name}' cannot run here: PyTorch refuses it for torch"):
        attention(qkv, 1, None, None, kernels=name)


@GPU
@pytest.mark.parametrize("name", ["library", "cudnn", "flash"])
@pytest.mark.parametrize("shape", [(2, 256, 4, 72), (2, 1024, 4, 64), (2, 257, 4, 128)], ids=str)
def test_backends_on_a_gpu(shape: tuple[int, int, int, int], name: str) -> None:
    qkv, (cos, sin) = draw(shape, torch.bfloat16), tables(shape[1], shape[3])
    truth = exact(qkv, shape[2], cos, sin)
    out = attention(qkv, shape[2], cos, sin, kernels=name)
    assert error(out, truth) <= 1.05 * error(chain(qkv, shape[2], cos, sin), truth)


@pytest.mark.parametrize("kernels", ["triton", "library", "reference"])
@ROTATED
def test_opcheck(rotated: bool, kernels: str) -> None:
    with torch.inference_mode(False):
        qkv, (cos, sin) = draw((2, 5, 2, 12), torch.bfloat16), tables(5, 12, rotated=rotated)
        torch.library.opcheck(_attention, (qkv, 2, cos, sin, kernels))


@pytest.mark.parametrize("kernels", ["triton", "library"])
def test_compiled_is_eager(kernels: str) -> None:
    qkv, (cos, sin) = draw((2, 5, 2, 12), torch.bfloat16), tables(5, 12)

    def layer(qkv: Tensor) -> Tensor:
        return 2 * attention(qkv, 2, cos, sin, kernels=kernels)

    assert torch.compile(layer, fullgraph=True)(qkv).equal(layer(qkv))


def test_wrong_operands_are_named() -> None:
    qkv, (cos, sin) = draw((2, 16, 2, 12), torch.float32), tables(16, 12)
    assert cos is not None
    call: Callable[..., Tensor] = attention  # the operands below are of any kind
    wrong: list[tuple[tuple[Tensor | int | None, ...], str]] = [
        ((qkv[0], 2, cos, sin), r"qkv \(16, 72\) is not \(B, N, 3·2·d\)"),
        ((qkv[:0], 2, cos, sin), r"qkv \(0, 16, 72\)"),
        ((qkv, 5, cos, sin), r"qkv \(2, 16, 72\) is not \(B, N, 3·5·d\)"),
        ((qkv, 0, cos, sin), "num_heads 0"),
        ((qkv, 8, None, None), "head_dim 3 is odd"),
        ((qkv.half(), 2, cos, sin), "qkv is torch.float16"),
        ((qkv.mT.contiguous().mT, 2, cos, sin), "last dimension of qkv"),
        ((qkv, 2, cos, None), "cos and sin come together"),
        ((qkv, 2, cos[:15], sin), r"cos \(15, 12\) torch.float32 is not \(16, 12\)"),
        ((qkv, 2, cos, cos.double()), r"sin \(16, 12\) torch.float64 is not \(16, 12\)"),
        ((qkv, 2, cos.mT.contiguous().mT, sin), r"cos \(16, 12\) is not contiguous"),
    ]
    for operands, message in wrong:
        with pytest.raises(ValueError, match=message):
            call(*operands)
    with pytest.raises(ValueError, match="kernels 'fast' is not one of auto, triton, library, cud"):
        attention(qkv, 2, cos, sin, kernels="fast")


@pytest.mark.parametrize(
    ("head_dim", "lanes"),
    [(2, (16, 0)), (16, (16, 0)), (24, (16, 16)), (64, (64, 0)), (72, (64, 16)), (112, (64, 64))],
)
def test_lanes_of_a_head(head_dim: int, lanes: tuple[int, int]) -> None:
    assert op.lanes(head_dim) == lanes
