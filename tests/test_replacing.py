"""Functions of other packages are replaced for a while or for good, and nothing of anybody's is lost."""

from __future__ import annotations

import functools
import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from engine_loader.replacing import is_wrapped, replaced, wrap, wrapped_in_thread


class Base:
    def size(self) -> str:
        return f"size of {type(self).__name__}"

    @classmethod
    def made(cls) -> str:
        return f"made by {cls.__name__}"

    @staticmethod
    def constant() -> str:
        return "constant"


class Child(Base):
    pass


@pytest.fixture
def module() -> Any:
    """With one function, which says the number that it is given."""
    return SimpleNamespace(say=str)


def louder(original: Any, *args: Any) -> str:
    return f"{original(*args)}!"


def in_thread(action: Any) -> Any:
    """What ``action`` returns in a thread of its own."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(action()))
    thread.start()
    thread.join()
    return results[0]


def test_a_replacement_holds_for_all_threads_until_the_block_ends(module: Any) -> None:
    with replaced(module, "say", lambda number: f"{number}?"):
        assert module.say(1) == "1?"
        assert in_thread(lambda: module.say(1)) == "1?"
    assert module.say is str


def test_a_wrapper_holds_for_its_own_thread_only(module: Any) -> None:
    with wrapped_in_thread(module, "say", louder):
        assert module.say(1) == "1!"
        assert in_thread(lambda: module.say(1)) == "1"
    assert module.say is str


@pytest.mark.parametrize("manager", [replaced, wrapped_in_thread])
def test_an_exception_restores_too(module: Any, manager: Any) -> None:
    with pytest.raises(RuntimeError, match="in the block"), manager(module, "say", louder):
        assert module.say is not str
        raise RuntimeError("in the block")
    assert module.say is str


@pytest.mark.parametrize("manager", [replaced, wrapped_in_thread])
def test_a_name_that_is_not_there_is_an_error(module: Any, manager: Any) -> None:
    with pytest.raises(AttributeError, match="sing"), manager(module, "sing", louder):
        pass
    assert not hasattr(module, "sing")
    with pytest.raises(AttributeError, match="sing"):
        wrap(module, "sing", louder)


@pytest.mark.parametrize("manager", [replaced, wrapped_in_thread])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
def test_blocks_may_end_in_any_order(module: Any, manager: Any, order: tuple[int, ...]) -> None:
    stacks = [ExitStack() for _ in order]
    for stack in stacks:
        stack.enter_context(manager(module, "say", lambda *_: "replaced"))
    for number in order:
        assert module.say(1) == "replaced"
        stacks[number].close()
    assert module.say is str


def test_wrappers_of_two_threads_do_not_see_each_other(module: Any) -> None:
    ours, theirs = ExitStack(), ExitStack()
    ours.enter_context(wrapped_in_thread(module, "say", louder))

    def begin() -> str:
        theirs.enter_context(wrapped_in_thread(module, "say", lambda original, number: f"({original(number)})"))
        return str(module.say(1))

    assert in_thread(begin) == "(1)"
    assert module.say(1) == "1!"
    ours.close()  # the first to begin is the first to end
    assert module.say(1) == "1"
    theirs.close()
    assert module.say is str


def test_many_threads_at_a_time_each_get_their_own(module: Any) -> None:
    wrong: list[str] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(200):
            with wrapped_in_thread(module, "say", lambda original, given: f"{number}:{original(given)}"):
                if (said := module.say(7)) != f"{number}:7":
                    wrong.append(said)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert module.say is str


@pytest.mark.parametrize("manager", [replaced, wrapped_in_thread])
def test_what_other_code_set_meanwhile_stays(module: Any, manager: Any) -> None:
    def plugin(number: int) -> str:
        return f"plugin {number}"

    with manager(module, "say", louder):
        module.say = plugin
    assert module.say is plugin


def test_a_plugin_that_wrapped_the_wrapper_reaches_the_original_after_the_block(module: Any) -> None:
    with wrapped_in_thread(module, "say", louder):
        inner = module.say
        module.say = plugin = functools.wraps(inner)(lambda number: f"plugin {inner(number)}")
        assert module.say(1) == "plugin 1!"
    assert module.say is plugin
    assert module.say(1) == "plugin 1"


def test_one_block_over_a_plugin_over_another_leaves_the_plugin(module: Any) -> None:
    below, above = ExitStack(), ExitStack()
    below.enter_context(wrapped_in_thread(module, "say", louder))
    inner = module.say
    module.say = plugin = lambda number: f"plugin {inner(number)}"
    above.enter_context(wrapped_in_thread(module, "say", lambda original, number: f"({original(number)})"))
    assert module.say(1) == "(plugin 1!)"
    below.close()
    assert module.say(1) == "(plugin 1)"
    above.close()
    assert module.say is plugin


def test_what_is_inherited_is_inherited_again() -> None:
    child = Child()
    with wrapped_in_thread(child, "size", louder), wrapped_in_thread(Child, "size", louder):
        assert child.size() == "size of Child!"  # the instance's own wrapper took the method before the class had one
        assert Child().size() == "size of Child!"
        assert Base().size() == "size of Base"
    assert "size" not in vars(child)
    assert "size" not in vars(Child)


def test_class_and_static_methods_stay_what_they_are() -> None:
    with wrapped_in_thread(Base, "made", louder), wrapped_in_thread(Base, "constant", louder):
        assert (Base.made(), Child().made()) == ("made by Base!", "made by Child!")
        assert (Base.constant(), Child().constant()) == ("constant!", "constant!")
    assert (Child.made(), Child().constant()) == ("made by Child", "constant")


def test_wrapping_for_good_happens_once(module: Any) -> None:
    assert not is_wrapped(module, "say")
    wrap(module, "say", louder)
    once = module.say
    wrap(module, "say", louder)
    assert module.say is once
    assert module.say(1) == "1!"
    assert is_wrapped(module, "say")


def test_the_mark_is_seen_through_wrappers_of_others(module: Any) -> None:
    wrap(module, "say", louder)
    module.say = functools.wraps(module.say)(lambda number: "another plugin's")
    assert is_wrapped(module, "say")
    module.say = str
    assert not is_wrapped(module, "say")
