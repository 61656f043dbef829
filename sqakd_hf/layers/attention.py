"""The quantized form of `nn.MultiheadAttention`: its in-projection. Its out-projection is a layer of its own."""

import torch
from torch import nn
from torch.nn import functional as F

from .quantized_layer import QuantizedLayer, register_quantized_layer


@register_quantized_layer(nn.MultiheadAttention)
class QuantizedMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with a fake-quantized in-projection `(3 * embed_dim, embed_dim)`.

    Query, key and value share one input range, as they share one weight. `out_proj` is called as the layer it is,
    where the float module hands its weight to a function.
    """

    weight_name = "in_proj_weight"

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        if not layer._qkv_same_embed_dim:
            return "its keys or values have another width, which makes three in-projections"
        if layer.bias_k is not None or layer.add_zero_attn:
            return "it appends a key to the sequence (add_bias_kv or add_zero_attn)"
        return None

    @staticmethod
    def count_macs(weight: torch.Tensor, inputs: list[torch.Tensor], output: torch.Tensor) -> int:
        return sum(tensor.numel() for tensor in inputs[:3]) * weight.shape[1]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention as `nn.MultiheadAttention` does; same arguments, same shapes."""
        is_batched, is_self_attention = query.dim() == 3, query is key and key is value
        if is_batched and not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        elif not is_batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        query, key, value = (self._heads(x) for x in self._project(query, key, value, is_self_attention))
        mask = self._mask(query, key, attn_mask, key_padding_mask, is_causal)
        weights = None
        if need_weights:
            scores = (query * self.head_dim**-0.5) @ key.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, self.dropout, self.training)
            output = weights @ value
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            dropout = self.dropout if self.training else 0.0
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if is_batched:
            return output if self.batch_first else output.transpose(0, 1), weights
        return output.squeeze(0), None if weights is None else weights.squeeze(0)

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_self_attention: bool
    ) -> list[torch.Tensor]:
        weight, bias = self.quantized_weight(), self.in_proj_bias
        if is_self_attention:
            return list(F.linear(self.quantized_input(query), weight, bias).chunk(3, dim=-1))
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [
            F.linear(self.quantized_input(x), part, b)
            for x, part, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
        ]

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        attn_mask: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> torch.Tensor | None:
        """Return one additive mask that broadcasts to `(B, heads, L, S)`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as nn.MultiheadAttention does
        masks = []
        if attn_mask is not None:  # (L, S), or (B * heads, L, S)
            attn_mask = _additive(attn_mask, query.dtype)
            masks.append(attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask)
        if key_padding_mask is not None:  # (B, S)
            masks.append(_additive(key_padding_mask, query.dtype)[:, None, None, :])
        return sum(masks) if masks else None


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
