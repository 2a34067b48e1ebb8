"""A trained model as a file that runs without the experiment's code."""
