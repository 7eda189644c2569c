"""Reading a store: batches for training, held-out rows, statistics of whole layers."""
