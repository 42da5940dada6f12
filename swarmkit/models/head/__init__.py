"""The part of a model that stays with its user: embeddings, final norm and output layer."""
