"""ONNX folders of a student: builders in child processes, checks, and what is in the files."""
