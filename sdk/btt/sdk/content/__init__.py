"""Content by infohash: what a torrent says, how its bytes are verified and where they are kept."""
