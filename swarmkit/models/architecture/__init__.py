"""What an architecture is made of: where its parts are, what it needs beyond being cut, and its language
model inside others.
"""
