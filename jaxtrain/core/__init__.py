"""Types shared by every room (state, batch, model), errors, and helpers for this process."""
