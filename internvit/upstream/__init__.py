"""Upstream models: the layouts of their blocks, and fusing them in place."""

from internvit.upstream.layouts import DINOV2, OPENGVLAB, TIMM, TRANSFORMERS, Layout, known_layouts, register_layout

__all__ = ["DINOV2", "OPENGVLAB", "TIMM", "TRANSFORMERS", "Layout", "known_layouts", "register_layout"]
