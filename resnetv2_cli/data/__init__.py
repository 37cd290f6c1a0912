"""Images: finding, decoding, ordering, augmenting and loading them."""
