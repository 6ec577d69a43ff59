"""Building blocks that families share."""

from easydel.layers.activations import activation
from easydel.layers.attention import (
    Attention,
    AttentionBias,
    AttentionMask,
    CrossAttention,
    KeyBias,
    LatentAttention,
    RelativePositions,
    alibi_slopes,
    counted,
)
from easydel.layers.blocks import PreNormBlock, SandwichBlock, attention_fields, head_size, latent_fields, mlp_fields
from easydel.layers.delta_net import GatedDeltaNet
from easydel.layers.dropout import make_dropout
from easydel.layers.embedding import Embed
from easydel.layers.linear import Linear
from easydel.layers.mlp import MLP, GatedMLP
from easydel.layers.moe import SparseMoE
from easydel.layers.norms import GatedRMSNorm, HeadLayerNorm, OffsetLayerNorm, RMSNorm, layer_norm
from easydel.layers.rotary import RotaryByKind, RotaryEmbedding
from easydel.layers.scan import ScannedLayers, make_layers
from easydel.layers.selective import SelectiveMixer
from easydel.layers.ssm import StateSpaceMixer
from easydel.layers.stack import LayerInputs, LayerOutput, LayerStack

__all__ = [
    "MLP",
    "Attention",
    "AttentionBias",
    "AttentionMask",
    "CrossAttention",
    "Embed",
    "GatedDeltaNet",
    "GatedMLP",
    "GatedRMSNorm",
    "HeadLayerNorm",
    "KeyBias",
    "LatentAttention",
    "LayerInputs",
    "LayerOutput",
    "LayerStack",
    "Linear",
    "OffsetLayerNorm",
    "PreNormBlock",
    "RMSNorm",
    "RelativePositions",
    "RotaryByKind",
    "RotaryEmbedding",
    "SandwichBlock",
    "ScannedLayers",
    "SelectiveMixer",
    "SparseMoE",
    "StateSpaceMixer",
    "activation",
    "alibi_slopes",
    "attention_fields",
    "counted",
    "head_size",
    "latent_fields",
    "layer_norm",
    "make_dropout",
    "make_layers",
    "mlp_fields",
]
