"""From files of text to the packed micro-batches of optimizer steps."""
