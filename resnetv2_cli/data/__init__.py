"""Images: where they are found, how they are decoded once, ordered, augmented and fed."""
