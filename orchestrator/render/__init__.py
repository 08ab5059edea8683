"""What people see: everything that imports rich."""
