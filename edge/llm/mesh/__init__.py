"""How machines talk: sockets, frames, sums in one order, and who may listen and call."""
