"""One run from its first step to its last: session, loop, dispatch, run folder, and what can go wrong."""
