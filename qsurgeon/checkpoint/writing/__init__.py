"""How a checkpoint is written: laid out first, then streamed, and moved into place when it is whole."""
