"""The private ledger: accounts, channels, receipts and a journal anyone can check.

books (pure rules) <- verify (makes operations) ; overlay + store (SQLite) ; sequencer (group
commit) ; service and server (gRPC over pinned TLS) ; cli (`btt ledger`).
"""
