"""Models in files for other runtimes: ONNX, OpenVINO, AOTInductor, torch.export."""

from internvit.export.decompositions import decompositions
from internvit.export.export import Export, export_model
from internvit.export.onnx_ops import onnx_table
from internvit.export.program import ExportedModel, export_program

__all__ = ["Export", "ExportedModel", "decompositions", "export_model", "export_program", "onnx_table"]
