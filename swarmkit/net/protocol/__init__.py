"""What peers say to each other: messages, tensor codecs and the choice between codecs."""
