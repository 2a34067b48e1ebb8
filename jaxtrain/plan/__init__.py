"""What an experiment needs, told before it runs."""
