"""Running blocks: a stage, its packed batches, its CUDA graphs, and full sequences forward and backward."""
