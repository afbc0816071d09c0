"""Transformer blocks, shared by both towers and the decoder, and the attention that pools an image.

Letters: B samples, S tokens, D width, A heads.
"""

# No `from __future__ import annotations` here, as in the other published files.
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack  # pyright: ignore[reportAttributeAccessIssue]
from transformers.utils.generic import TransformersKwargs

from .configuration_flip import BlockConfig, FlipVisionConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes plain attention on (B, A, T, D / A); returns (B, T, A, D / A) and the weights (B, A, T, T)."""
    scores = query @ key.transpose(-1, -2) * scaling  # (B, A, T, T)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class FlipQueryKeyValue(nn.Linear):
    """One of attention's three input projections; initialised as a third of one fused matrix."""


class FlipAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        # Some attention functions read it from the module; the text tower passes its own value in every call.
        self.is_causal = False
        # Set where it pays, by the training code; neither parameters nor configuration know of it.
        self.fuses_projections = False
        self.q_proj = FlipQueryKeyValue(config.hidden_size, config.hidden_size)
        self.k_proj = FlipQueryKeyValue(config.hidden_size, config.hidden_size)
        self.v_proj = FlipQueryKeyValue(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Maps (B, T, D) to queries, keys and values, (B, T, D) each, by three products, or by one if fused."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if not self.fuses_projections:
            return tuple(layer(hidden_states) for layer in layers)
        weight = torch.cat([layer.weight for layer in layers])  # (3 * D, D)
        bias = torch.cat([layer.bias for layer in layers])  # (3 * D)
        return nn.functional.linear(hidden_states, weight, bias).chunk(3, dim=-1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps (B, T, D) to (B, T, D); also returns the weights where the implementation has them."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)  # (B, T, A, D / A)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        query, key, value = (each.view(heads).transpose(1, 2) for each in self._project(hidden_states))
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.out_proj(output.reshape(hidden_states.shape).contiguous()), weights


class FlipMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class FlipEncoderLayer(GradientCheckpointingLayer):
    """A pre-LayerNorm Transformer block."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = FlipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FlipMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        residual = hidden_states
        hidden_states, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class FlipEncoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.layers = nn.ModuleList([FlipEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        for layer in self.layers:
            # Positional: the recorder of hidden states and reentrant checkpointing both read the first argument.
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states


class FlipAttentionPooling(nn.Module):
    """Pools tokens by attention of a learned query, then an MLP: SigLIP's head, with its parameters' names."""

    def __init__(self, config: FlipVisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FlipMLP(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Pools tokens (B, S, D) to (B, D)."""
        probe = self.probe.expand(hidden_states.shape[0], -1, -1)
        pooled = self.attention(probe, hidden_states, hidden_states, need_weights=False)[0]  # (B, 1, D)
        pooled = pooled + self.mlp(self.layernorm(pooled))
        return pooled[:, 0]


__all__ = ["FlipAttention", "FlipAttentionPooling", "FlipEncoder", "FlipEncoderLayer", "FlipMLP", "FlipQueryKeyValue"]
