"""Images in, batches out: which image is the n-th (`order`), what a folder holds (`folder`), pixels (`images`),
batches (`stream`).
"""
