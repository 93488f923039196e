"""The peers that our own code is measured against, each tuned as well as we know how."""
