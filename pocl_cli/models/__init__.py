"""Models: loading, splitting into backbone and output head, vocabulary, teacher, generation."""
