"""What ``scripts/gpu_check.sh`` runs on an NVIDIA GPU."""
