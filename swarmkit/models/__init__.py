"""Cutting a model into blocks.

Here lives everything that knows what a checkpoint is and how transformers builds a model from it:

* `checkpoint.Checkpoint`: where a model's files are, which tensor lies in which file, its fingerprint;
* `stage.Stage` and `stage.StageCache`: some consecutive blocks of a model, and one session's keys and
  values for them;
* `head.build_head`: the ordinary causal language model whose blocks are somebody else's;
* `quirks`: the one table that says which architectures are supported and what each needs.

The room owns weights and caches of the stages that it was asked to load. It never talks to peers (only
to the Hugging Face Hub, for files), never unpickles anything and holds no model code: all arithmetic is
transformers' own. Importing this door imports neither torch nor transformers.
"""
