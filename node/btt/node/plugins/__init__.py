"""The services of a node as parts that may fail: their life, their tasks, the guard around their calls."""
