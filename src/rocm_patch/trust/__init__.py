"""What may run on this machine, and what is best."""
