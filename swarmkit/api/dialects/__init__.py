"""The wire formats: each file translates requests and answers of one of them."""
