"""Images in, features out."""
