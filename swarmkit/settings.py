"""Settings: defaults < `SWARMKIT_*` environment variables < arguments.

Each group belongs to the room that reads it. Times are in seconds unless a name says otherwise.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

LossyCodec = Literal["bfloat16", "float16", "int8"]
"""What hidden states may travel in, besides as they are; see `net.codec`."""


class NetSettings(BaseSettings):
    """How this peer talks to others."""

    model_config = SettingsConfigDict(env_prefix="SWARMKIT_NET_", frozen=True, extra="forbid")

    startup_timeout: float = Field(default=30.0, gt=0, description="for the p2p daemon to start")
    connect_timeout: float = Field(default=5.0, gt=0, description="to reach a peer and open a stream")


class ServerSettings(BaseSettings):
    """How a server serves."""

    model_config = SettingsConfigDict(env_prefix="SWARMKIT_SERVER_", frozen=True, extra="forbid")

    announce_period: float = Field(default=10.0, gt=0, description="between two announcements")
    record_lifetime: float = Field(default=30.0, gt=0, le=3600, description="until an announcement expires")
    cache_bytes: int = Field(
        default=2 * 1024**3, gt=0, description="memory for keys and values of all sessions"
    )
    prefix_cache: Literal["off", "client", "everyone"] = Field(
        default="client",
        description="keep full pages of keys and values for sessions that begin alike: those of one client, "
        "or of everyone, which lets strangers find out by timing what others have asked",
    )
    receive_budget_bytes: int = Field(
        default=512 * 1024**2, gt=0, description="memory for large steps that arrive or wait for their turn"
    )
    cache_tokens: int = Field(default=16_384, ge=1, description="to plan for when blocks are counted")
    max_step_tokens: int = Field(default=4096, ge=1, description="batch x tokens of one step")
    prefill_chunk_tokens: int = Field(
        default=512, ge=1, description="batch x tokens of long steps in one forward pass, at most"
    )
    decode_slowdown: float = Field(
        default=1.6,
        ge=1,
        description="how many times its usual time a decode step may take beside others' prompts",
    )
    cuda_graph_slots: int = Field(
        default=4,
        ge=0,
        description="that decode by recorded work on an NVIDIA or AMD accelerator, which is quicker; where "
        "there are more at a time, they all decode without. 0 = never",
    )
    cuda_graph_tokens: int = Field(
        default=2048,
        ge=16,
        description="of a session, until it decodes without records; memory for the keys and values of one "
        "session more than there are with records is held",
    )
    adapter_bytes: int = Field(default=512 * 1024**2, ge=0, description="memory for adapters of all clients")
    client_adapter_bytes: int = Field(
        default=128 * 1024**2, ge=0, description="memory for adapters of one client"
    )
    adapter_max_rank: int = Field(default=256, ge=1, description="rank of a client's LoRA adapters")
    gradient_slice: float = Field(
        default=0.05, gt=0, description="for which training may keep the device before others have their turn"
    )
    gradient_memory_bytes: int = Field(
        default=512 * 1024**2,
        ge=0,
        description="memory for what training computed on its way there, so that it is not computed again on "
        "the way back; 0: it always is",
    )
    max_gradient_streams: int = Field(default=256, ge=1, description="streams for training at a time")
    max_session_length: int = Field(
        default=2**20, ge=1, description="tokens per row that a session may declare"
    )
    max_sessions: int = Field(default=1024, ge=1, description="sessions at a time")
    max_queue_s: float = Field(
        default=30.0,
        gt=0,
        description="longest expected wait of a step; one for which it is longer is refused",
    )
    max_admission_wait_s: float = Field(
        default=2.0, gt=0, description="for a large step to wait for memory to arrive in before it is refused"
    )
    evict_after: float = Field(
        default=15.0,
        ge=0,
        description="without a step until a session may have to make room for others, the longest idle first",
    )
    report_resources: bool = Field(
        default=False, description="tell who asks how many streams, tasks and bytes there are, as soaks do"
    )
    idle_timeout: float = Field(default=1800.0, gt=0, description="without a step until a session is closed")
    message_timeout: float = Field(
        default=60.0, gt=0, description="for the rest of a message that has begun, and to send a reply"
    )
    push: bool = Field(default=True, description="outputs may go straight to the server with the next blocks")
    codecs: tuple[LossyCodec, ...] = Field(
        default=("bfloat16", "float16", "int8"),
        description="in which hidden states may come and go if a client wishes it, besides as they are",
    )
    link_timeout: float = Field(default=3.0, gt=0, description="to reach the server with the next blocks")
    drain_timeout: float = Field(default=30.0, ge=0, description="for sessions to move away when leaving")


class ClientSettings(BaseSettings):
    """How a client finds, uses and replaces servers."""

    model_config = SettingsConfigDict(env_prefix="SWARMKIT_CLIENT_", frozen=True, extra="forbid")

    route_timeout: float = Field(
        default=60.0, ge=0, description="to wait for somebody to serve a missing block"
    )
    refresh_period: float = Field(default=10.0, gt=0, description="between two looks at who serves what")
    first_step_timeout: float = Field(
        default=30.0, gt=0, description="for a step, before any step was measured"
    )
    min_step_timeout: float = Field(
        default=1.0, gt=0, description="the deadline of a step is never below this"
    )
    step_deadline: float | None = Field(
        default=None,
        gt=0,
        description="no step takes longer, whatever recovery would still do: generate(max_time=…) looks at "
        "the time between steps only. None = as long as route_timeout and the servers' deadlines allow",
    )
    deadline_factor: float = Field(
        default=8.0, ge=4, description="deadline = factor x usual time; below 4 a swarm bans itself"
    )
    ban_seconds: float = Field(
        default=2.0, gt=0, description="a failed peer is left aside; doubles with each failure"
    )
    max_ban_seconds: float = Field(default=60.0, gt=0, description="the longest that a peer is left aside")
    push: bool = Field(default=True, description="have servers hand outputs on to each other where they can")
    codecs: tuple[LossyCodec, ...] = Field(
        default=(),
        description="in which hidden states may travel, besides as they are; each of these changes values, "
        "and so perhaps tokens",
    )
    compress: Literal["where it pays", "always"] = Field(
        default="where it pays",
        description="use these codecs on links that were measured to be slow, or the smallest one on all",
    )
    prefix_cache_bytes: int = Field(
        default=256 * 1024**2,
        ge=0,
        description="what ended sessions had sent and got, so that one that begins alike sends only the rest",
    )
    speculation: Literal["off", "auto", "prompt-lookup"] = Field(
        default="auto",
        description="guess tokens by looking them up in the text, as many as pay: never; where the answer is "
        "the same without; or wherever it can be done, sampling too (another answer, by the same chances)",
    )
    recovery: bool = Field(
        default=True,
        description="keep what sessions need to survive a lost server; without, one that is lost ends them",
    )
    precisions: tuple[str, ...] = Field(
        default=(), description="use only servers of these precisions, such as float32; none = any"
    )
    trace_steps: int = Field(default=256, ge=1, description="steps kept in `model.trace`")
