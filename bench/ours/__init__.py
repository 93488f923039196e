"""Our own contestants: the product as a user runs it, and parts of it left out on purpose."""
