"""The HTTP front: bytes and statuses on one side, the engine on the other."""
