"""The clients on the inference engine; nothing is imported here, so that a device loads only the one it runs."""
