"""One module per sub-command of `convoy-train`: its flags, and the order of its steps."""
