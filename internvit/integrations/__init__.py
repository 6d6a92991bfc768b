"""InternViT inside other frameworks."""
