"""Deployment: export to TFLite and ONNX, the runtimes that execute the files, and parity with Keras."""
