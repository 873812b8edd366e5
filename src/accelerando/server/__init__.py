"""The server: governed models over the Open Inference Protocol."""
