"""Keys, values and recurrent states of sessions, in the three layouts that a stage can hold them in."""
