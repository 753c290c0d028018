"""How bytes move: the mover (priority lanes, bounded bytes in flight) and the data paths."""
