"""Quantization: number formats, layers that compute with them, and putting these into models."""

from easydel.quantization.apply import dequantize_module, quantize_module
from easydel.quantization.experts import QuantizedExpertLinear
from easydel.quantization.layer import QuantizedLayer, QuantizedWeight
from easydel.quantization.linear import QuantizedLinear
from easydel.quantization.methods import METHODS
from easydel.quantization.products import quantized_product
from easydel.quantization.report import LayerReport, QuantizationReport, quantized_layers, report_of

__all__ = [
    "METHODS",
    "LayerReport",
    "QuantizationReport",
    "QuantizedExpertLinear",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedWeight",
    "dequantize_module",
    "quantize_module",
    "quantized_layers",
    "quantized_product",
    "report_of",
]
