"""Where the weights of a model come from: folders, the Hub and peers; and the store that keeps blocks on
disk.
"""
