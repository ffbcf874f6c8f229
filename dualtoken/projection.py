"""Attention projections from the width of the backbone to that of the codes, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """The feed-forward half of a projection: ``w2(gelu(w0(n)) * w1(n))`` with ``n = norm(x)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.w0 = nn.Linear(width, 2 * width)
        self.w1 = nn.Linear(width, 2 * width)
        self.w2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to ``[..., width]``."""
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x), approximate="tanh") * self.w1(x))


@dataclass
class KeyValueCache:
    """Keys and values ``[B, heads, N, head_dim]`` of the positions that a causal attention has seen."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of new positions and return all of them."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


class ProjectionAttention(nn.Module):
    """Self-attention that changes the width of its input.

    Narrowing: as many heads as ``in_features // out_features``, each ``out_features`` wide, *averaged* (this
    is how the released checkpoints were trained). Widening: heads as wide as the input, concatenated.
    """

    zero_k_bias: Tensor

    def __init__(self, in_features: int, out_features: int, causal: bool) -> None:
        super().__init__()
        wide, narrow = max(in_features, out_features), min(in_features, out_features)
        if wide % narrow:
            raise ValueError(
                f"a projection from {in_features} to {out_features} features needs the larger to be a "
                "multiple of the smaller: the ratio is its number of heads; choose another codebook_dim"
            )
        self.num_heads = wide // narrow
        self.average_heads = in_features > out_features
        self.causal = causal
        self.qkv = nn.Linear(in_features, 3 * wide, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(wide))
        self.v_bias = nn.Parameter(torch.zeros(wide))
        self.register_buffer("zero_k_bias", torch.zeros(wide))
        self.proj = nn.Linear(out_features, out_features)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Map ``[B, N, in_features]`` to ``[B, N, out_features]``; N is 1 once there is something cached."""
        batch, length, _ = x.shape
        # DeepSpeed casts parameters to the training precision and leaves buffers as they are.
        bias = torch.cat([self.q_bias, self.zero_k_bias.to(self.q_bias.dtype), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(batch, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, head_dim]
        if cache is not None:
            assert self.causal and (cache.keys is None or length == 1)
            k, v = cache.extend(k, v)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and length > 1)
        if self.average_heads:
            attended = attended.mean(dim=1)
        else:
            attended = attended.transpose(1, 2).reshape(batch, length, -1)
        return self.proj(attended)


class AttentionProjection(nn.Module):
    """One attention block from ``in_features`` to ``out_features``, as in the released checkpoints.

    ``y = proj(norm3(x)) + attn(norm1(x)); out = y + mlp(norm2(y))``. Full attention in front of the
    quantizer; causal attention behind it lets the features be computed while the codes are still being
    generated. With ``attend=False`` every position is projected alone: ``y = proj(norm3(x))``.
    """

    def __init__(
        self, in_features: int, out_features: int, causal: bool = False, attend: bool = True
    ) -> None:
        super().__init__()
        self.attend = attend
        if attend:
            self.norm1 = nn.LayerNorm(in_features)
            self.attn = ProjectionAttention(in_features, out_features, causal)
        self.proj = nn.Linear(in_features, out_features)
        self.norm3 = nn.LayerNorm(in_features)
        self.norm2 = nn.LayerNorm(out_features)
        self.mlp = GatedMLP(out_features)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Map ``[B, N, in_features]`` to ``[B, N, out_features]``, of the type of the weights.

        With a cache, causal projections take the positions of a sequence one after the other.
        """
        x = x.to(self.proj.weight.dtype)
        projected = self.proj(self.norm3(x))
        x = projected + self.attn(self.norm1(x), cache) if self.attend else projected
        return x + self.mlp(self.norm2(x))
