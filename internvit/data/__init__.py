"""Images in, features out."""

from internvit.data.embedder import Embedder

__all__ = ["Embedder"]
