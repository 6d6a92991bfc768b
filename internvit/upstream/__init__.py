"""Upstream models: their blocks, and fusing them in place."""
