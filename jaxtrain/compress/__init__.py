"""Smaller models: quantization to int8, pruning, distillation. Each wraps a function that is there."""
