"""What the system promises, told by real parts."""
