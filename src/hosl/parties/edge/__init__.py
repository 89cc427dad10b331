"""The client parties on an inference engine: numpy arrays and exported graphs in place of torch.

Each is the twin of one in `hosl.parties.clients`. Nothing here imports torch or transformers, and the engine is
imported when the first graph is opened. The graphs and their description: `hosl split --runtime onnx`.
"""
