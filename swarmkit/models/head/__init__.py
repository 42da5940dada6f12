"""The part of a model that stays with the client: embeddings, final norm and output layer."""
