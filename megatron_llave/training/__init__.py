"""Parts of the training step: gradient cache, optimizer, metrics, logging, fault tolerance."""
