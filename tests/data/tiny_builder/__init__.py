"""A tfds data set with typed features, as users write them."""
