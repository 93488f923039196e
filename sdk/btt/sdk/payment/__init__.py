"""Payment sessions over gRPC."""
