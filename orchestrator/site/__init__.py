"""What happens on the nodes of a run: the lanes that prepare it, the watch over it, and what is brought home."""
