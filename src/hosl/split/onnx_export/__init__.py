"""A client half as ONNX graphs, for a device with an inference engine and no torch. Needs torch, onnx and onnxscript.

Every block is a graph whose weights are inputs, and so is its vector-Jacobian product: an engine that can only infer
runs both, and that is exact backprop. Reading them: `hosl.split.reading.runtime_json`, which needs none of the three.
"""

from hosl.split.onnx_export.export import export_graphs

__all__ = ["export_graphs"]
