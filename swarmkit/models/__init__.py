"""Cutting a model into blocks.

This package knows what a checkpoint is and how transformers builds a model from it. Each of its folders
imports only from those before it:

* `architecture`, `kernels`, `loading`: the parts of an architecture, faster linear layers, transformers'
loader;
* `adapters`, `quantization`, `checkpoint`: adapters, stored and chosen precisions, a model's files and
weights;
* `kv`: one session's keys, values and states;
* `execution`, `head`, `plan`: running blocks, the client's part of a model, what fits into memory;
* `check`: whether an architecture can be cut into blocks at all.

It owns weights and caches of the stages that it was asked to load. It never talks to peers (only to the
Hugging Face Hub, for files), never unpickles anything and holds no model code: all arithmetic is
transformers' own. Importing `swarmkit.models` imports neither torch nor transformers.
"""
