"""What a GPU can do, what the service gets of it, and what its settings change: one command for the whole table."""
