"""Beginning, following and ending a run at this terminal."""
