"""The backends that ops run on."""
