"""The background process that carries a run on: observe, decide, perform."""
