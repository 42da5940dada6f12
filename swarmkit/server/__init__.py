"""Serving blocks of a model: which ones, on what device, to which clients.

`ModelServer` is the life of one server: it chooses blocks, loads, announces, serves and drains them, and may
move to others. `Serving` is one run of blocks, with all that answers requests about them. `placement` and
`scheduler` decide (pure); `engine` is the one thread that touches the device, and runs the steps of many
sessions together; `kv_budget` accounts for every byte of keys and values.
Never imports `swarmkit.client`. The face that users see is `swarmkit.Server`, in `swarmkit/node/`.
"""
