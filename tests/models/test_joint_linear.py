"""Threads that ask an output layer for logits at the same time: one product for all, and nobody disturbed."""

from __future__ import annotations

import copy
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head import head
from swarmkit.models.head.head import MOST_JOINT_ROWS, JointLinear, build_head
from swarmkit.models.head.head_kind import HeadKind
from swarmkit.models.kernels.few_rows import PLAIN, cut_product

from ..waiting import WITHIN, wait_until
from .tiny import make_checkpoint

IN, OUT = 48, 160
OTHERS = 7
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference that the order of additions may make, where values are about 1."""


def plain_layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)


def joint_layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> JointLinear:
    layer = plain_layer(bias, dtype)
    JointLinear.adopt(layer)
    assert isinstance(layer, JointLinear)
    return layer


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Hidden states `[*shape, in]`."""
    return torch.randn(*(shape or (1, 1)), IN, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Crowd:
    """Threads that ask a layer for logits while a product of it is under way, until the block's end.

    Attributes:
        together: rows of each product that was computed for several threads.
        answers: of the threads, in the order in which they asked.
    """

    def __init__(self, patch: pytest.MonkeyPatch, pool: ThreadPoolExecutor) -> None:
        self.together: list[int] = []
        self.answers: list[Future[Tensor]] = []
        self.first: Future[Tensor]
        self._pool = pool
        self._is_held = threading.Event()
        self._may_end = threading.Event()
        linear, multiply_rows = functional.linear, head.multiply_rows

        def held(*given: Tensor) -> Tensor:
            if not self._is_held.is_set():
                self._is_held.set()
                assert self._may_end.wait(WITHIN)
            return linear(*given)

        def noted(given: Tensor, *others: object) -> Tensor:
            self.together.append(len(given))
            return multiply_rows(given, *others)  # type: ignore[arg-type]

        patch.setattr(functional, "linear", held)
        patch.setattr(head, "multiply_rows", noted)

    def begin(self, layer: JointLinear) -> None:
        """A thread's product is under way."""
        self.first = self._pool.submit(quietly, layer, rows(99, dtype=layer.weight.dtype))
        assert self._is_held.wait(WITHIN)

    def ask(self, layer: JointLinear, *inputs: Tensor) -> None:
        """Ask in threads, each after the one before waits or has its answer."""
        for each in inputs:
            before = layer.num_waiting
            answer = self._pool.submit(quietly, layer, each)
            self.answers.append(answer)
            wait_until(lambda: layer.num_waiting > before or answer.done(), "a thread asked")  # noqa: B023

    def end(self) -> None:
        """Let the product that is under way end."""
        self._may_end.set()

    def logits(self) -> list[Tensor]:
        return [answer.result(WITHIN) for answer in self.answers]


def quietly(layer: nn.Module, given: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = layer(given)
        return logits


@pytest.fixture(autouse=True)
def cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together is faster, in parts, and alone nothing is."""
    monkeypatch.setattr(head, "ways_together", lambda *shape: (PLAIN, PLAIN, *["cut 16"] * MOST_JOINT_ROWS))
    monkeypatch.setattr(head, "fastest_ways", lambda *shape: ())


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crowd]:
    with ThreadPoolExecutor(OTHERS + 2) as pool:
        crowd = Crowd(monkeypatch, pool)
        try:
            yield crowd
        finally:
            crowd.end()


# ---------------------------------------------------------------------- together


def test_threads_that_ask_while_a_product_is_under_way_share_the_next_one(crowd: Crowd) -> None:
    layer = joint_layer()
    crowd.begin(layer)
    crowd.ask(layer, *map(rows, range(OTHERS)))
    crowd.end()
    crowd.logits()
    assert crowd.together == [OTHERS]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_each_gets_its_own_logits(crowd: Crowd, bias: bool, dtype: torch.dtype) -> None:
    layer, plain = joint_layer(bias, dtype), plain_layer(bias, dtype)
    given = [rows(number, number + 1, 1, dtype=dtype) for number in range(4)]
    crowd.begin(layer)
    crowd.ask(layer, *given)
    crowd.end()
    for each, logits in zip(given, crowd.logits(), strict=True):
        torch.testing.assert_close(logits, quietly(plain, each), rtol=0, atol=BOUND[dtype])


def test_nobody_keeps_the_logits_of_others_in_memory(crowd: Crowd) -> None:
    layer = joint_layer()
    crowd.begin(layer)
    crowd.ask(layer, *map(rows, range(OTHERS)))
    crowd.end()
    assert {each.untyped_storage().nbytes() for each in crowd.logits()} == {OUT * 4}


def test_more_rows_than_a_product_takes_are_two_products(crowd: Crowd) -> None:
    layer = joint_layer()
    crowd.begin(layer)
    crowd.ask(layer, *(rows(number, MOST_JOINT_ROWS // 2) for number in range(3)))
    crowd.end()
    crowd.logits()
    assert crowd.together == [MOST_JOINT_ROWS, MOST_JOINT_ROWS // 2]


def test_logits_are_fit_for_the_mode_of_their_thread(crowd: Crowd) -> None:
    layer = joint_layer()

    def inferred() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = layer(rows(1))
            return logits

    crowd.begin(layer)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(inferred)
        wait_until(lambda: layer.num_waiting == 1, "a thread in inference mode waited")
        crowd.ask(layer, rows(2))
        crowd.end()
        assert other.result(WITHIN).is_inference()
    assert not crowd.logits()[0].is_inference()


# ---------------------------------------------------------------------- alone


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 7), (2, 1, 33), (0,)])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_alone_it_gives_exactly_what_the_plain_layer_gives(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    given = rows(1, *shape, dtype=dtype)
    assert torch.equal(quietly(joint_layer(dtype=dtype), given), quietly(plain_layer(dtype=dtype), given))


@pytest.mark.parametrize("shape", [(), (1, 1), (3, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_alone_it_computes_in_the_fastest_way(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], bias: bool
) -> None:
    monkeypatch.setattr(head, "fastest_ways", lambda *shape: (PLAIN, *["cut 16"] * 30))
    layer, given = joint_layer(bias), rows(1, *shape)
    expected = cut_product(given.reshape(-1, IN), layer.weight, layer.bias, 16).view(*given.shape[:-1], OUT)
    assert torch.equal(quietly(layer, given), expected)


def taking_gradients(layer: JointLinear) -> Tensor:
    logits: Tensor = layer(rows(1).requires_grad_())
    return logits


def trained(layer: JointLinear) -> Tensor:
    layer.requires_grad_(True)
    logits: Tensor = layer(rows(1))
    return logits


def autocast(layer: JointLinear) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return quietly(layer, rows(1))


def many(layer: JointLinear) -> Tensor:
    return quietly(layer, rows(1, MOST_JOINT_ROWS + 1))


@pytest.mark.parametrize("ask", [taking_gradients, trained, autocast, many])
def test_what_cannot_be_shared_waits_for_nobody(crowd: Crowd, ask: Callable[[JointLinear], Tensor]) -> None:
    layer = joint_layer()
    crowd.begin(layer)
    ask(layer)
    assert not crowd.first.done()


def test_where_it_is_not_faster_nobody_waits(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "ways_together", lambda *shape: None)
    layer = joint_layer()
    crowd.begin(layer)
    quietly(layer, rows(1))
    assert not crowd.first.done()


def test_a_compiled_layer_is_the_plain_one() -> None:
    layer, given = joint_layer(), rows(1)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(quietly(compiled, given), quietly(layer, given))  # type: ignore[arg-type]


# ---------------------------------------------------------------------- what fails


def test_a_thread_whose_input_does_not_fit_disturbs_nobody(crowd: Crowd) -> None:
    layer = joint_layer()
    crowd.begin(layer)
    crowd.ask(layer, rows(1), torch.randn(1, IN + 1), rows(2))
    crowd.end()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        crowd.answers[1].result(WITHIN)
    assert torch.allclose(crowd.answers[2].result(WITHIN), quietly(plain_layer(), rows(2)), atol=1e-5)


def test_where_the_product_of_all_fails_each_computes_its_own(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(head, "multiply_rows", fail)
    layer = joint_layer()
    crowd.begin(layer)
    crowd.ask(layer, rows(1), rows(2))
    crowd.end()
    for seed, logits in zip((1, 2), crowd.logits(), strict=True):
        assert torch.equal(logits, quietly(plain_layer(), rows(seed)))


@contextmanager
def interrupted_when(condition: Callable[[], bool]) -> Iterator[None]:
    """The main thread is interrupted, as by Ctrl-C, once the condition holds."""
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        wait_until(condition, "the main thread was to be interrupted")
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    thread.join(WITHIN)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals to a thread")
def test_an_interrupted_thread_leaves_its_place_to_the_others(crowd: Crowd) -> None:
    layer = joint_layer()
    crowd.begin(layer)
    with interrupted_when(lambda: layer.num_waiting == 1):
        quietly(layer, rows(1))
    crowd.ask(layer, rows(2), rows(3))
    crowd.end()
    crowd.logits()
    assert crowd.together == [2]


def test_a_product_that_does_not_end_holds_nobody_for_ever(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LONGEST_WAIT_S", 0.01)
    layer = joint_layer()
    crowd.begin(layer)
    assert torch.equal(quietly(layer, rows(1)), quietly(plain_layer(), rows(1)))


# ---------------------------------------------------------------------- the user's module


def test_a_model_has_one_whose_weights_are_the_checkpoints(checkpoints: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(checkpoints, "llama", num_blocks=4))
    layer = build_head(checkpoint, nn.Identity()).get_output_embeddings()
    assert type(layer) is JointLinear
    assert torch.equal(layer.weight, checkpoint.read(["lm_head.weight"])["lm_head.weight"])


def test_a_classifiers_layer_stays_the_plain_one(checkpoints: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(checkpoints, "llama", num_blocks=4))
    model = build_head(checkpoint, nn.Identity(), kind=HeadKind("classifier"))
    assert type(model.score) is nn.Linear


def test_it_remains_the_same_module_with_the_same_weights() -> None:
    layer = plain_layer()
    weight, state = layer.weight, list(layer.state_dict())
    JointLinear.adopt(layer)
    assert layer.weight is weight
    assert list(layer.state_dict()) == state


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_with_its_own_weights(copied: Callable[[nn.Linear], nn.Linear]) -> None:
    layer = joint_layer(bias=False)
    other = copied(layer)
    other.weight.mul_(2.0)
    assert torch.equal(quietly(other, rows(1)), 2 * quietly(layer, rows(1)))


@pytest.mark.parametrize("other", [nn.Identity(), None, nn.Bilinear(2, 2, 2)])
def test_what_is_no_plain_linear_layer_stays_as_it_is(other: nn.Module | None) -> None:
    kind = type(other)
    JointLinear.adopt(other)
    assert type(other) is kind
