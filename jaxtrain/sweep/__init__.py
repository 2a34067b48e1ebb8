"""Many runs: seeds and settings, trained one after the other or together, and their table."""
