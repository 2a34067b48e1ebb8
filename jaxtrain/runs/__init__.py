"""Many runs: find their folders, read and compare what they recorded, and free disk. Needs no JAX.

The folders are the only database: every call reads what is on the disk now.
"""
