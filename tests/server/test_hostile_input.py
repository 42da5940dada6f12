"""Whatever a stranger sends: the sender is told what is wrong, nobody else notices, and nothing stays behind.

`attacks.ATTACKS` is the list of what is tried. The other end of the same protocol is in
`tests/client/test_hostile_servers.py`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
import torch

from swarmkit.errors import PeerUnreachableError
from swarmkit.net.protocol.messages import FATAL, Fault
from swarmkit.net.rpc import server_stream
from swarmkit.net.rpc.message_stream import CHUNK_BYTES
from swarmkit.net.rpc.receive_budget import ReceiveReservation

from ..net.worlds import HivemindWorld
from ..waiting import eventually
from .attacks import (
    ATTACKS,
    BYTES,
    HELD,
    LARGE,
    LARGE_HEAD,
    LENGTH,
    RANGES,
    ROWS,
    STEP,
    STEPPING,
    Attack,
    each_attack,
)
from .worlds import (
    TinyClient,
    TinyServer,
    World,
    alone,
    fault_of,
    hidden_states,
    same,
    small_settings,
)

# who plays


async def attacker_at(server: TinyServer, attack: Attack) -> TinyClient:
    client = await server.client()
    if attack.in_session:
        await client.open(max_length=LENGTH)
        await client.step(hidden_states(ROWS, HELD))
    return client


async def told(server: TinyServer, attack: Attack) -> Fault:
    """What the attacker hears."""
    return await strike(await attacker_at(server, attack), attack)


async def strike(attacker: TinyClient, attack: Attack) -> Fault:
    """The same, of one who stands ready."""
    await attacker.send_frames(*attack.frames)
    fault = await fault_of(attacker.answer())
    attacker.close()
    return fault


async def seen_by_another(
    server: TinyServer,
    attack: Callable[[], Any],
    equal: Callable[[torch.Tensor, torch.Tensor], bool] = torch.equal,
) -> bool:
    """Whether a session in whose midst the attack falls is disturbed."""
    steps = [hidden_states(1, 3, 5), hidden_states(1, 1, 6), hidden_states(1, 2, 7)]
    session = await server.session()
    outputs = [await session.step(steps[0])]
    during = asyncio.create_task(session.step(steps[1]))
    await attack()
    outputs += [await during, await session.step(steps[2])]
    session.close()
    return not all(map(equal, outputs, alone(server.world, steps)))


# the sender is told


@each_attack
async def test_the_sender_gets_an_error_that_names_the_fault(server: TinyServer, attack: Attack) -> None:
    fault = await told(server, attack)
    assert (fault.code, bool(re.search(attack.says, fault.message))) == (attack.code, True), fault


@pytest.mark.parametrize("blocks", RANGES)
async def test_a_range_that_is_not_held_is_named(server: TinyServer, blocks: tuple[int, int]) -> None:
    fault = await fault_of((await server.client()).open(*blocks))
    assert (fault.code, f"{blocks[0]}:{blocks[1]}" in fault.message) == ("blocks_not_held", True)


@pytest.mark.parametrize("length", [0, 129, 2**31])
async def test_a_session_length_out_of_range_is_named(server: TinyServer, length: int) -> None:
    fault = await fault_of((await server.client()).open(max_length=length))
    assert (fault.code, "1 to 128" in fault.message) == ("too_long", True)


async def test_half_a_message_is_waited_for_no_longer_than_allowed(world: World) -> None:
    server = await TinyServer(world, small_settings(message_timeout_s=0.3)).start()
    attacker = await server.session()
    await attacker.send_frames(STEP.replace(b"\x04", b"\x00", 1)[:-1])
    fault = await fault_of(attacker.answer())
    assert (fault.code, bool(re.search("255 of 256 bytes.*within 0.3 s", fault.message))) == (
        "bad_message",
        True,
    )
    await server.close()


async def test_a_large_step_that_is_refused_is_named_when_all_of_it_has_come(server: TinyServer) -> None:
    attacker = await server.session()
    await attacker.send_frames(LARGE_HEAD, bytes(CHUNK_BYTES), bytes(CHUNK_BYTES))
    assert (await fault_of(attacker.answer())).code == "too_large"


# nobody else notices


@each_attack
async def test_other_sessions_go_on_bit_equal(server: TinyServer, attack: Attack) -> None:
    # Ready before: lawful steps of several sessions may run together, and are then equal but for rounding.
    attacker = await attacker_at(server, attack)
    assert not await seen_by_another(server, lambda: strike(attacker, attack))


@pytest.mark.parametrize("attack", [a for a in STEPPING if a.code not in FATAL], ids=str)
async def test_the_attackers_own_session_is_as_before(server: TinyServer, attack: Attack) -> None:
    attacker = await attacker_at(server, attack)
    await attacker.send_frames(*attack.frames)
    await attacker.answer()
    if attack.code == "too_large" and "allowed" in attack.says:
        return  # what it announced could not be waited for: its stream has ended
    following = hidden_states(ROWS, 1, 9)
    output = await attacker.step(following)
    assert torch.equal(output, alone(server.world, [hidden_states(ROWS, HELD), following])[1])


@pytest.mark.parametrize("attack", [a for a in BYTES if a.code in FATAL][:3], ids=str)
async def test_a_stream_on_which_the_two_may_disagree_is_ended(
    server: TinyServer, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_stream, "LINGER_S", 0.01)
    attacker = await attacker_at(server, attack)
    await attacker.send_frames(*attack.frames)
    await attacker.answer()
    with pytest.raises(PeerUnreachableError):
        await attacker.answer()


# nothing stays behind


@each_attack
async def test_the_servers_memory_returns_to_where_it_was(server: TinyServer, attack: Attack) -> None:
    tasks_before = len(asyncio.all_tasks())
    await told(server, attack)
    await server.empty()
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks_before, "the tasks of the streams have ended")


async def test_a_session_is_freed_before_the_attacker_has_left(server: TinyServer) -> None:
    attacker = await attacker_at(server, BYTES[0])
    await attacker.send_frames(b"")
    await attacker.answer()
    await server.empty()


ENDINGS = {
    "at once": [],
    "within the head": [STEP[:10]],
    "within the payload": [STEP[:-7]],
    "within a large payload": [LARGE_HEAD, bytes(CHUNK_BYTES)],
    "after a step": [STEP],
    "after many steps": [STEP] * 5,
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_stream_that_is_cut_off_leaves_nothing(server: TinyServer, ending: str) -> None:
    attacker = await attacker_at(server, STEPPING[0])
    await attacker.send_frames(*ENDINGS[ending])
    attacker.close()
    await server.empty()


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_machine_that_dies_leaves_nothing(server: TinyServer, ending: str) -> None:
    attacker = await attacker_at(server, STEPPING[0])
    await attacker.send_frames(*ENDINGS[ending])
    server.network.kill(server.transports[-1].peer_id)
    await server.empty()


@pytest.mark.parametrize("ending", ENDINGS)
async def test_other_sessions_do_not_notice_a_stream_that_is_cut_off(server: TinyServer, ending: str) -> None:
    attacker = await attacker_at(server, STEPPING[0])

    async def attack() -> None:
        await attacker.send_frames(*ENDINGS[ending])
        attacker.close()

    # Some endings begin with lawful steps, which may run together with the other session's.
    assert not await seen_by_another(server, attack, same)


# memory that many could take together


@pytest.fixture
async def roomy(world: World) -> AsyncIterator[TinyServer]:
    """A server with steps so large that only two of them fit its memory at a time."""
    settings = small_settings(
        max_step_tokens=LARGE.shape[1],
        max_session_length=2**20,
        receive_budget_bytes=2 * LARGE.nbytes,
        message_timeout_s=0.5,
    )
    server = await TinyServer(world, settings).start()
    yield server
    await server.close()


async def half_sent(server: TinyServer) -> TinyClient:
    client = await server.session(max_length=2**20)
    await client.send_frames(LARGE_HEAD, bytes(CHUNK_BYTES))
    return client


async def test_large_messages_in_arrival_are_counted(roomy: TinyServer) -> None:
    await half_sent(roomy)
    await eventually(lambda: roomy.service.receive_budget.held_bytes, "the payload has arrived")
    assert roomy.used() == (1, 0, LARGE.nbytes)


async def test_no_more_large_messages_arrive_than_fit(roomy: TinyServer) -> None:
    clients = [await half_sent(roomy) for _ in range(4)]
    await asyncio.sleep(0.01)
    assert roomy.used() == (len(clients), 0, 2 * LARGE.nbytes)


async def test_who_waits_for_room_in_vain_is_told_that_the_server_is_busy(roomy: TinyServer) -> None:
    receive_budget = roomy.service.receive_budget
    await receive_budget.take(2 * LARGE.nbytes, ReceiveReservation(receive_budget))
    client = await half_sent(roomy)
    await client.send_frames(bytes(CHUNK_BYTES))
    assert (await fault_of(client.answer())).code == "busy"


async def test_small_steps_need_no_room(roomy: TinyServer, world: World) -> None:
    for _ in range(3):
        await half_sent(roomy)
    steps = [hidden_states(1, 3), hidden_states(1, 1)]
    session = await roomy.session()
    outputs = [await session.step(hidden) for hidden in steps]
    assert all(map(same, outputs, alone(world, steps)))


async def test_the_room_of_a_message_that_is_cut_off_is_free_again(roomy: TinyServer) -> None:
    clients = [await half_sent(roomy) for _ in range(4)]
    for client in clients:
        client.close()
    await roomy.empty()


# over the real transport

CORE_NAMES = [
    "garbage",
    "an empty frame",
    "a later version",
    "another model",
    "unknown session",
    "too many tokens",
    "bytes over the limit",
    "nan as float32",
    "hidden of integers",
    "a position left out",
    "pieces that are too much",
]
CORE = [attack for attack in ATTACKS if attack.name in CORE_NAMES]
over_libp2p = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def far_server(world: World) -> AsyncIterator[TinyServer]:
    """The same service behind a p2p daemon, with clients behind another."""
    peers = HivemindWorld()
    serving, using = await peers.peer(), await peers.peer(client_mode=True)

    async def connect() -> Any:
        return using

    server = await TinyServer(world).start(serving, connect)
    yield server
    await peers.close()
    await server.close()


@over_libp2p
@pytest.mark.parametrize("attack", CORE, ids=str)
async def test_the_sender_is_told_over_libp2p_as_well(far_server: TinyServer, attack: Attack) -> None:
    fault = await told(far_server, attack)
    assert (fault.code, bool(re.search(attack.says, fault.message))) == (attack.code, True), fault


@over_libp2p
@pytest.mark.parametrize("attack", CORE, ids=str)
async def test_others_do_not_notice_over_libp2p(far_server: TinyServer, attack: Attack) -> None:
    attacker = await attacker_at(far_server, attack)
    assert not await seen_by_another(far_server, lambda: strike(attacker, attack))
    await far_server.empty()


@over_libp2p
@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_stream_that_is_cut_off_leaves_nothing_over_libp2p(
    far_server: TinyServer, ending: str
) -> None:
    attacker = await attacker_at(far_server, STEPPING[0])
    await attacker.send_frames(*ENDINGS[ending])
    attacker.close()
    await far_server.empty()
