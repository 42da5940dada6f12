"""Block files for other servers, and from them."""
