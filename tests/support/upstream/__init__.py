"""Upstream classes that no wheel carries, re-stated: their class, attribute and parameter names, their arithmetic."""
