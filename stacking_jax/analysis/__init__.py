"""What a trained stack is like inside: similarity of its layers, and how it uses its depth.

Everything reads a checkpoint on the run's own held-out data; nothing is trained or changed.
"""
