"""A real network in the loop: predicted seconds against those that bytes take over sockets."""
