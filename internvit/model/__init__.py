"""The InternViT module and its parts."""
