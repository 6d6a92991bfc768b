"""Upstream models: their state dicts, their blocks, and fusing them in place."""
