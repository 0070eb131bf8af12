"""What is checked before a training: each failure is one clear error, none costs training time."""
