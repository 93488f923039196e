"""The content service: publishes files as hybrid torrents and serves them in paid runs."""
