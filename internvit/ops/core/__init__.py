"""What every op is made of: registration, choice of backend, validation, shared arithmetic."""
