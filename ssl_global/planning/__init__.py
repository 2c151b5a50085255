"""What a run will need, before it is paid for."""
