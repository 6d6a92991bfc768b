"""InternViT as a fast, exact, drop-in PyTorch module."""
