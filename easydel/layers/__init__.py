"""Building blocks that families share."""

from easydel.layers.activations import activation
from easydel.layers.attention import Attention, AttentionMask, CrossAttention, RelativePositions
from easydel.layers.blocks import PreNormBlock, attention_fields, mlp_fields
from easydel.layers.dropout import make_dropout
from easydel.layers.embedding import Embed
from easydel.layers.linear import Linear
from easydel.layers.mlp import MLP, GatedMLP
from easydel.layers.moe import SparseMoE
from easydel.layers.norms import GatedRMSNorm, RMSNorm, layer_norm
from easydel.layers.rotary import RotaryByKind, RotaryEmbedding
from easydel.layers.scan import ScannedLayers, make_layers
from easydel.layers.selective import SelectiveMixer
from easydel.layers.ssm import StateSpaceMixer
from easydel.layers.stack import LayerInputs, LayerOutput, LayerStack

__all__ = [
    "MLP",
    "Attention",
    "AttentionMask",
    "CrossAttention",
    "Embed",
    "GatedMLP",
    "GatedRMSNorm",
    "LayerInputs",
    "LayerOutput",
    "LayerStack",
    "Linear",
    "PreNormBlock",
    "RMSNorm",
    "RelativePositions",
    "RotaryByKind",
    "RotaryEmbedding",
    "ScannedLayers",
    "SelectiveMixer",
    "SparseMoE",
    "StateSpaceMixer",
    "activation",
    "attention_fields",
    "layer_norm",
    "make_dropout",
    "make_layers",
    "mlp_fields",
]
