"""Settings of servers, clients and the network, grouped by the part that reads them.

A field gets its value from the argument, else from its environment variable, else from its default. The
variable is the prefix of the settings and the field's own name, whichever group holds the field: that of
`ServerSettings.limits.cache_bytes` is `SWARMKIT_SERVER_CACHE_BYTES`. So a name occurs once under a prefix.

Units: names of durations end in `_s` (seconds), of amounts of memory in `_bytes`, of rates in `_per_s`.
`docs/settings.md` is written from the descriptions here by `make settings`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from typing_extensions import Self

LossyCodec = Literal["bfloat16", "float16", "int8"]
"""An encoding that hidden states may travel in, besides the exact one; see `net.protocol.codec`."""

Rate = Annotated[float, Field(gt=0)]
"""Bytes per second."""


class SettingsGroup(BaseSettings):
    """Fields that one part of the program reads. Each field has an environment variable of its own."""

    def replace(self, **changes: Any) -> Self:
        """Return a checked copy in which the named fields have other values.

        Raises:
            ValidationError: a field does not exist, or its value is not allowed.
        """
        return type(self)(**{**dict(self), **changes})


class Settings(BaseModel):
    """Groups of settings, each an attribute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def replace(self, **changes: Any) -> Self:
        """Return a checked copy in which the named fields, of any groups, have other values.

        Raises:
            TypeError: no group has such a field.
            ValidationError: a value is not allowed.
        """
        groups = {}
        for name, group in self:
            own = {field: changes.pop(field) for field in type(group).model_fields if field in changes}
            groups[name] = group.replace(**own) if own else group
        if changes:
            raise TypeError(f"{type(self).__name__} has no field named {', '.join(sorted(changes))}")
        return type(self)(**groups)

    def environment(self) -> dict[str, str]:
        """Return the environment variables from which another process reads these same settings."""
        variables = {}
        for _, group in self:
            prefix = type(group).model_config["env_prefix"]
            for name, value in group.model_dump(mode="json").items():
                if value is not None:
                    text = value if isinstance(value, str) else json.dumps(value)
                    variables[f"{prefix}{name}".upper()] = text
        return variables


def read_from(prefix: str) -> SettingsConfigDict:
    """Return the configuration of a group whose environment variables begin with a prefix."""
    return SettingsConfigDict(env_prefix=prefix, frozen=True, extra="forbid")


class NetSettings(SettingsGroup):
    """Connections to other peers."""

    model_config = read_from("SWARMKIT_NET_")

    startup_timeout_s: float = Field(
        default=30.0, gt=0, description="How long the p2p daemon may take to start."
    )
    connect_timeout_s: float = Field(
        default=5.0, gt=0, description="How long it may take to reach a peer and open a stream."
    )
    keep_alive_s: float = Field(
        default=60.0,
        ge=2,
        description="How long the machine of a peer may be silent before a direct connection to it ends. A "
        "machine that is there answers the kernel's probes.",
    )
    reachability: Literal["auto", "private", "public"] = Field(
        default="auto",
        description="Whether others can reach this peer from outside its network. With `public` it passes "
        "connections on to peers that cannot be reached, and with `private` it looks for such a peer at "
        "once; with `auto` it waits for what other peers find, which takes minutes.",
    )
    swarm_key_file: Path | None = Field(
        default=None,
        description="The file with the key of a private swarm, as `swarmkit swarm-key` writes one. Without a "
        "value, the swarm is open to everybody.",
    )


class Limits(SettingsGroup):
    """What a server may use of its machine. These can be replaced while it runs (`Server.set_limits`)."""

    model_config = read_from("SWARMKIT_SERVER_")

    max_sessions: int = Field(default=1024, ge=1, description="How many sessions may be open at a time.")
    cache_bytes: int = Field(
        default=2 * 1024**3, gt=0, description="Memory for the keys and values of all sessions together."
    )
    activation_cache_bytes: int = Field(
        default=512 * 1024**2,
        ge=0,
        description="Memory for activations that training computes in its forward pass and needs again in "
        "its backward pass. With 0, every backward pass computes them again.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="How many processor threads a step may use. Without a value, PyTorch decides.",
    )
    compute_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="The share of time in which the device may compute. It rests between two forward passes "
        "for the others.",
    )
    client_tokens_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="How many tokens (batch x tokens) of each client the server computes in a minute, for "
        "generation and training together. It refuses more as busy, and says when to come back. Without a "
        "value, no limit.",
    )
    upload_bytes_per_s: Rate | None = Field(
        default=None,
        description="How fast all services of the server together send. Without a value, no limit.",
    )
    download_bytes_per_s: Rate | None = Field(
        default=None,
        description="How fast all services of the server together receive. Without a value, no limit.",
    )


class NodeSettings(SettingsGroup):
    """Announcements, planning and shutdown of a server."""

    model_config = read_from("SWARMKIT_SERVER_")

    announce_period_s: float = Field(default=10.0, gt=0, description="Time between two announcements.")
    record_lifetime_s: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="How long clients believe an announcement that is not renewed.",
    )
    cache_tokens: int = Field(
        default=16_384,
        ge=1,
        description="How many tokens of keys and values a server leaves room for when it counts the blocks "
        "that fit into its memory.",
    )
    throughput: float | None = Field(
        default=None,
        gt=0,
        description="How many decode steps per second the server announces that it computes. Without a "
        "value, it measures this when it starts, and again from the steps of its clients.",
    )
    measure_period_s: float = Field(
        default=300.0,
        gt=0,
        description="How long a server that no client uses waits until it measures its speed again, and "
        "asks itself for a token to see that it still answers.",
    )
    drain_timeout_s: float = Field(
        default=30.0, ge=0, description="How long a server that leaves waits for its sessions to move away."
    )
    report_resources: bool = Field(
        default=False,
        description="Whether the server tells any peer that asks how many streams, tasks and bytes it "
        "holds. Tests of long runs need this.",
    )


class MovingSettings(SettingsGroup):
    """Moves of a server to blocks that need it more. A server whose blocks were named stays with them."""

    model_config = read_from("SWARMKIT_SERVER_")

    moves: bool = Field(
        default=False,
        description="Whether the server moves by itself. `swarmkit serve` turns this on where no blocks are "
        "named.",
    )
    move_period_s: float = Field(
        default=60.0,
        gt=0,
        description="The mean time between two looks at whether another place is better. The server looks "
        "four times as often while some block has no server.",
    )
    move_notice_s: float = Field(
        default=2.0,
        ge=0,
        description="For how long a server tells the others that it means to move before it looks again "
        "whether it may. An announcement has to be known to all within this time: then servers that move at "
        "the same moment leave no block without a server.",
    )
    move_gain: float = Field(
        default=0.2,
        ge=0,
        description="How much better the swarm must become by a move, as a share, for the server to move. A "
        "block without a server is reason enough.",
    )


class EngineSettings(SettingsGroup):
    """The order and size of forward passes on a server's device."""

    model_config = read_from("SWARMKIT_SERVER_")

    prefill_chunk_tokens: int = Field(
        default=512,
        ge=1,
        description="The largest batch x tokens of a prompt that one forward pass computes. Longer prompts "
        "are cut.",
    )
    decode_slowdown: float = Field(
        default=1.6,
        ge=1,
        description="How many times its usual time a decode step may take while prompts of other sessions "
        "are computed in the same forward passes. Beside a prompt of another client it may take 20 ms longer "
        "in any case, but not often.",
    )
    cuda_graph_slots: int = Field(
        default=4,
        ge=0,
        description="How many sessions may decode through CUDA graphs at a time, which is faster. When "
        "more sessions decode at once, all of them decode without graphs. 0 turns CUDA graphs off.",
    )
    cuda_graph_tokens: int = Field(
        default=2048,
        ge=16,
        description="The longest session that decodes through CUDA graphs. The server holds memory for "
        "this many tokens of keys and values for each slot, and for one slot more.",
    )
    compile: Literal["off", "auto", "on"] = Field(
        default="auto",
        description="Whether a server on a CPU has the decode step of its blocks compiled, in the "
        "background. It needs a C++ compiler. With `auto` it compiles when it has decoded for as long as "
        "compiling takes, and uses what was compiled where that is measured to be faster. With `on` it "
        "compiles at once, and uses that wherever it computes the same.",
    )
    compile_slots: int = Field(
        default=4,
        ge=1,
        le=64,
        description="How many sessions may decode through compiled steps at a time. When more sessions "
        "decode at once, all of them decode without.",
    )
    compile_tokens: int = Field(
        default=2048,
        ge=512,
        description="The longest session that decodes through compiled steps. The server holds memory for "
        "this many tokens of keys and values for each slot, and for one slot more.",
    )


class RequestSettings(SettingsGroup):
    """Requests of any kind that a server answers."""

    model_config = read_from("SWARMKIT_SERVER_")

    max_step_tokens: int = Field(default=4096, ge=1, description="The largest batch x tokens of one step.")
    receive_budget_bytes: int = Field(
        default=512 * 1024**2,
        ge=1,
        description="Memory for large steps that are being received or wait for their turn.",
    )
    max_queue_s: float = Field(
        default=30.0,
        gt=0,
        description="The longest expected wait with which a step is still accepted. The server refuses "
        "others as busy, and their clients try other servers.",
    )
    max_admission_wait_s: float = Field(
        default=2.0,
        gt=0,
        description="How long a large step waits for receive memory before the server refuses it as busy.",
    )
    message_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="How long the rest of a message may take once it has begun to arrive, and how long it "
        "may take to send a reply.",
    )
    idle_timeout_s: float = Field(
        default=1800.0, gt=0, description="How long a session may send no step before the server closes it."
    )


class SessionSettings(SettingsGroup):
    """Sessions of clients on a server."""

    model_config = read_from("SWARMKIT_SERVER_")

    max_session_length: int = Field(
        default=2**20, ge=1, description="The largest number of tokens per row that a session may declare."
    )
    evict_after_s: float = Field(
        default=15.0,
        ge=0,
        description="How long a session must be idle before the server may close it to make room for "
        "another. It closes the session that is idle longest first.",
    )
    prefix_cache: Literal["off", "client", "everyone"] = Field(
        default="client",
        description="For which sessions the server keeps full pages of keys and values after they end, so "
        "that later sessions with the same beginning need not compute it: none, later sessions of the same "
        "client, or those of everyone. With `everyone`, strangers can measure what others have asked.",
    )
    codecs: tuple[LossyCodec, ...] = Field(
        default=("bfloat16", "float16", "int8"),
        description="The encodings, besides the exact one, in which clients may ask for hidden states, and "
        "their gradients, to travel.",
    )
    push: bool = Field(
        default=True,
        description="Whether the server sends its outputs directly to the server with the next blocks when "
        "the client asks for it.",
    )
    link_timeout_s: float = Field(
        default=3.0, gt=0, description="How long it may take to reach the server with the next blocks."
    )


class AdapterSettings(SettingsGroup):
    """LoRA adapters and prompts that clients send to a server."""

    model_config = read_from("SWARMKIT_SERVER_")

    adapter_bytes: int = Field(
        default=512 * 1024**2, ge=0, description="Memory for the adapters of all clients together."
    )
    client_adapter_bytes: int = Field(
        default=128 * 1024**2, ge=0, description="Memory for the adapters of one client."
    )
    adapter_max_rank: int = Field(
        default=256, ge=1, description="The largest rank of a client's LoRA adapter."
    )


class ServedHeadSettings(SettingsGroup):
    """The output layer that a server computes for clients."""

    model_config = read_from("SWARMKIT_SERVER_")

    offer_head: bool = Field(
        default=False,
        description="Whether the server computes the model's output layer for clients that ask for it, in "
        "float32. Its weights take memory beside those of the blocks.",
    )


class AccessSettings(SettingsGroup):
    """The peers that a server deals with: clients, and servers that it exchanges outputs or weights with."""

    model_config = read_from("SWARMKIT_SERVER_")

    allowed_peers: tuple[str, ...] = Field(
        default=(),
        description="The peer ids of the only peers that the server deals with. It opens no streams to "
        "others and serves none of theirs. Only they, and the peers that it joins, may use its part of the "
        "shared table. An empty list allows all.",
    )
    blocked_peers: tuple[str, ...] = Field(
        default=(),
        description="The peer ids of peers that the server never deals with. It neither keeps nor believes "
        "their records.",
    )


class TrainingSettings(SettingsGroup):
    """Forward and backward passes that a server computes for clients that train."""

    model_config = read_from("SWARMKIT_SERVER_")

    gradient_slice_s: float = Field(
        default=0.05,
        gt=0,
        description="How long training may keep the device before waiting decode steps have their turn.",
    )
    max_gradient_streams: int = Field(
        default=256, ge=1, description="How many streams for training may be open at a time."
    )


class ServerSettings(Settings):
    """How a server serves its blocks."""

    limits: Limits = Field(default_factory=Limits)
    node: NodeSettings = Field(default_factory=NodeSettings)
    moving: MovingSettings = Field(default_factory=MovingSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    requests: RequestSettings = Field(default_factory=RequestSettings)
    sessions: SessionSettings = Field(default_factory=SessionSettings)
    adapters: AdapterSettings = Field(default_factory=AdapterSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    head: ServedHeadSettings = Field(default_factory=ServedHeadSettings)
    access: AccessSettings = Field(default_factory=AccessSettings)


class RoutingSettings(SettingsGroup):
    """The choice and replacement of servers by a client."""

    model_config = read_from("SWARMKIT_CLIENT_")

    route_timeout_s: float = Field(
        default=60.0,
        ge=0,
        description="How long a client waits for a server with a block that no server has, and a session "
        "that has not begun for servers that have no room.",
    )
    room_timeout_s: float = Field(
        default=600.0,
        ge=0,
        description="How long a session that has begun waits for servers that are there, but have no room "
        "for it. It waits for `route_timeout_s` at least.",
    )
    refresh_period_s: float = Field(
        default=10.0, gt=0, description="Time between two reads of which servers have which blocks."
    )
    ban_s: float = Field(
        default=2.0,
        gt=0,
        description="How long a client avoids a peer after its first failure. Each further failure doubles "
        "it.",
    )
    max_ban_s: float = Field(default=60.0, gt=0, description="The longest time that a client avoids a peer.")
    precisions: tuple[str, ...] = Field(
        default=(),
        description="The precisions, such as `float32`, of which the client accepts servers. An empty list "
        "accepts all.",
    )
    allowed_servers: tuple[str, ...] = Field(
        default=(),
        description="The peer ids of the only servers that the client uses. An empty list allows all.",
    )
    blocked_servers: tuple[str, ...] = Field(
        default=(),
        description="The peer ids of servers that the client never uses. It asks them for no records, and "
        "believes none of theirs.",
    )
    spares: bool = Field(
        default=True,
        description="Whether the client keeps a stream to each server that would be used next if one in use "
        "were lost, and asks it every `refresh_period_s` seconds whether it is there.",
    )


class DeadlineSettings(SettingsGroup):
    """Deadlines of a client's steps."""

    model_config = read_from("SWARMKIT_CLIENT_")

    first_step_timeout_s: float = Field(
        default=30.0, gt=0, description="The deadline of a step while no step has been measured yet."
    )
    min_step_timeout_s: float = Field(default=1.0, gt=0, description="The shortest deadline of a step.")
    untried_wait_s: float = Field(
        default=1.25,
        gt=0,
        description="How long a server that has never worked for this client is waited for, beyond the time "
        "that it claims, before others are tried beside it.",
    )
    deadline_factor: float = Field(
        default=8.0,
        ge=4,
        description="The deadline of a step, as a multiple of its usual time. Below 4, busy servers would "
        "be taken for lost.",
    )
    step_deadline_s: float | None = Field(
        default=None,
        gt=0,
        description="The longest time that a step may take with all its retries, after which it raises "
        "`DeadlineError`. Without a value, a step goes on while `route_timeout_s` and the servers' "
        "deadlines allow. (`generate(max_time=...)` looks at the clock only between steps.)",
    )


class TransferSettings(SettingsGroup):
    """The way of hidden states between a client and its servers."""

    model_config = read_from("SWARMKIT_CLIENT_")

    push: bool = Field(
        default=True,
        description="Whether servers send their outputs directly to the server with the next blocks, where "
        "they can.",
    )
    codecs: tuple[LossyCodec, ...] = Field(
        default=(),
        description="The encodings, besides the exact one, in which hidden states may travel, and their "
        "gradients in training. Each of them changes values, and so may change tokens.",
    )
    compress: Literal["where it pays", "always"] = Field(
        default="where it pays",
        description="Whether `codecs` are used only on links that are measured to be slow, or whether the "
        "smallest one is used on every link.",
    )


class ClientSessionSettings(SettingsGroup):
    """What a client's sessions keep and try."""

    model_config = read_from("SWARMKIT_CLIENT_")

    recovery: bool = Field(
        default=True,
        description="Whether sessions keep the inputs from which a lost server can be replaced. Without "
        "them, a lost server ends the session.",
    )
    prefix_cache_bytes: int = Field(
        default=256 * 1024**2,
        ge=0,
        description="Memory for what ended sessions sent and received, so that a later session with the "
        "same beginning sends only the rest.",
    )
    speculation: Literal["off", "auto", "prompt-lookup"] = Field(
        default="auto",
        description="Whether drafts of the next tokens are looked up in the text and checked in one step: "
        "never, where this does not change the answer, or wherever it is possible, when sampling too (the "
        "answer then differs, with the same probabilities).",
    )
    hand_over: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether a server that leaves brings a session's keys and values to the server that "
        "takes its place: where that is quicker than to compute them again, wherever it can be, or never.",
    )
    trace_steps: int = Field(default=256, ge=1, description="How many steps `model.trace` keeps.")


class CheckSettings(SettingsGroup):
    """A client's checks of what servers compute."""

    model_config = read_from("SWARMKIT_CLIENT_")

    check_share: float = Field(
        default=0.002,
        ge=0,
        le=1,
        description="The share of a session's steps after which a second server computes, beside the answer, "
        "what one server has computed in the session so far. 0 turns this off.",
    )
    check_ban_s: float = Field(
        default=3600.0,
        gt=0,
        description="How long a client avoids a peer whose outputs two other servers found wrong.",
    )


class HeadSettings(SettingsGroup):
    """Where a client has the output layer of its model computed."""

    model_config = read_from("SWARMKIT_CLIENT_")

    head: Literal["auto", "local", "remote"] = Field(
        default="auto",
        description="Where `generate()` has the output layer computed: `local` is on this machine, `remote` "
        "is by a server that offers it, and `auto` is wherever it is measured to be quicker. Where no server "
        "offers it, and where a call needs what no server gives, it is computed on this machine.",
    )
    head_top: int = Field(
        default=64,
        ge=2,
        le=4096,
        description="How many of the largest logits of a token a server is asked for. A call with a larger "
        "`top_k` asks for more by itself. Where they do not suffice, all logits are computed.",
    )


class ClientSettings(Settings):
    """How a client finds, uses and replaces servers."""

    routing: RoutingSettings = Field(default_factory=RoutingSettings)
    deadlines: DeadlineSettings = Field(default_factory=DeadlineSettings)
    transfer: TransferSettings = Field(default_factory=TransferSettings)
    sessions: ClientSessionSettings = Field(default_factory=ClientSessionSettings)
    checks: CheckSettings = Field(default_factory=CheckSettings)
    head: HeadSettings = Field(default_factory=HeadSettings)


class ApiSettings(SettingsGroup):
    """What clients of the HTTP API may ask for."""

    model_config = read_from("SWARMKIT_API_")

    max_running: int = Field(
        default=64, ge=1, le=1024, description="How many requests are answered at a time, each in a thread."
    )
    max_waiting: int = Field(
        default=256,
        ge=0,
        description="How many more requests wait for their turn. All others are refused with status 429.",
    )
    max_body_bytes: int = Field(
        default=8 * 1024**2, gt=0, description="The largest body of a request; larger ones get status 413."
    )
    max_tokens: int = Field(
        default=4096,
        ge=1,
        description="The longest answer in tokens. An answer that reaches it ends with the reason `length`.",
    )
    max_stored_bytes: int = Field(
        default=64 * 1024**2,
        ge=0,
        description="Memory for responses that requests can name with `previous_response_id`. The oldest "
        "make room for new ones.",
    )
