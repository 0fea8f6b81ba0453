"""A trained network for use elsewhere: safetensors, timm and the Hub, ONNX, RobustBench."""
