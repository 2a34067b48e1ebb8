"""Write a trained model to a file: artifact, ONNX, StableHLO or safetensors."""
