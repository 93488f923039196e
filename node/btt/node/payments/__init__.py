"""The payee side of payment sessions: books, sessions, meters."""
