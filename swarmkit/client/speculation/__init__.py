"""Draft tokens: how many to guess ahead, and which assistant guesses them."""
