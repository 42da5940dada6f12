"""Which servers have which blocks: signed records in the shared table, and the view that is made of them."""
