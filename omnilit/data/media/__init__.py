"""Images, videos and sounds: what is known of them before training, and what is read in it."""
