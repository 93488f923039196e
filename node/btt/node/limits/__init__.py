"""The one limiter of a node: bytes a second up and down, of all services together and of each."""
