"""What the commands do and answer with, as plain values; nothing here prints."""
