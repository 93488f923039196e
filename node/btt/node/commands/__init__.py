"""The commands for operators; each is thin over functions of the node."""
