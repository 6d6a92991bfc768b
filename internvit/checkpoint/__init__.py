"""Reading and writing checkpoints: layouts of state dicts, files, the hub."""
