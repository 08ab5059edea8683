"""One node over SSH: connections, commands, and files both ways."""
